"""`rollouts/signal_*.npz`: what student and teacher said of each token of a step, before it was learned from.

about                JSON: problem, rollout and token texts of each response, and the texts of the preferred tokens
student, teacher     log-probability of the sampled token, nats; all responses end to end, float32
divergence           of each token, as `divergence` has it
preferred            id of the teacher's likeliest token; preferred_logprob: its log-probability
own, own_logprob     the student's, one column; none where the engine does not tell
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mopd_nemo.chat import Chat
from mopd_nemo.config import UserError
from mopd_nemo.engines.base import TokenSignal
from mopd_nemo.files import replacing_bytes
from mopd_nemo.methods.batch import TrainBatch
from mopd_nemo.types import RolloutGroup

_NUMBERS = ("student", "teacher", "divergence", "preferred", "preferred_logprob", "own", "own_logprob")


@dataclass(frozen=True, slots=True)
class RecordedSignal:
    """One response's."""

    problem: str
    rollout: int
    texts: tuple[str, ...]
    """Of its tokens."""
    signal: TokenSignal
    """With the likeliest token of each alone, and none of the student's where the engine does not tell."""
    names: dict[int, str]
    """Texts of the likeliest tokens."""


def write_token_signal(
    file: Path, groups: Sequence[RolloutGroup], batch: TrainBatch, signals: Sequence[TokenSignal | None], chat: Chat
) -> None:
    """Record the signals of a batch's examples; those without a teacher are left out."""
    told = [(example, s) for example, s in zip(batch.examples, signals, strict=True) if s is not None]
    columns = [
        (
            *(s.student, s.teacher, s.divergence, s.teacher_top_ids[:, 0], s.teacher_top[:, 0]),
            *(s.student_top_ids[:, :1], s.student_top[:, :1]),
        )
        for _, s in told
    ]
    numbers = {
        name: np.concatenate(parts) for name, parts in zip(_NUMBERS, zip(*columns, strict=True), strict=bool(told))
    }
    preferred = np.unique(np.append(numbers["preferred"], numbers["own"])).tolist() if told else []
    about = {
        "rows": [
            {
                "problem": groups[example.group_index].problem.id,
                "rollout": example.rollout_index,
                "texts": chat.token_texts(example.response_ids),
            }
            for example, _ in told
        ],
        "names": {str(token): chat.decode([token], skip_special_tokens=False) for token in preferred},
    }
    encoded = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with replacing_bytes(file) as out:
        np.savez_compressed(out, allow_pickle=False, about=encoded, **numbers)


def read_token_signal(file: Path) -> list[RecordedSignal]:
    """What `write_token_signal` has written, response by response.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            rows = about["rows"]
            numbers = [arrays[name] for name in _NUMBERS] if rows else []
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}); delete it, and the run is shown without it") from error
    names = {int(token): text for token, text in about["names"].items()}
    found, start = [], 0
    for row in rows:
        end = start + len(row["texts"])
        student, teacher, divergence, ids, logprobs, own, own_logprobs = (values[start:end] for values in numbers)
        signal = TokenSignal(student, teacher, divergence, own, own_logprobs, ids[:, None], logprobs[:, None])
        found.append(RecordedSignal(row["problem"], row["rollout"], tuple(row["texts"]), signal, names))
        start = end
    return found
