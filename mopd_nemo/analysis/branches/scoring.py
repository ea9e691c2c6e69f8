"""What the teacher says of every response of the groups that have successes and failures, context by context.

manifest.json    inputs and settings of the scores; a rerun with others is refused
signals.jsonl    one row per problem and context
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mopd_nemo.analysis.branches.figures import Attempt, Told, first_new_part, first_new_token
from mopd_nemo.analysis.teacher_signal.scoring import PROMPTS_AT_ONCE, blocks
from mopd_nemo.analysis.tokens import Contexts, score_contexts
from mopd_nemo.chat import Chat
from mopd_nemo.config import Config, PeersConfig
from mopd_nemo.engines.base import Engine, TokenSignal
from mopd_nemo.peers.render import PeerContext, build_contexts, plain_contexts
from mopd_nemo.run.resumable import RowStore, file_fingerprint, model_fingerprint
from mopd_nemo.run.rollouts import RecordedGroup, num_successes, to_rollout_group
from mopd_nemo.types import RolloutGroup

PLAIN = "none"
"""The context that is the student's own prompt."""
DIGITS = 6


class SignalStore(RowStore):
    """What was said, by problem and context."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any], restart: bool = False) -> None:
        super().__init__(directory, "signals", ("prompt", "context"), manifest, restart)


def contrasting(groups: Sequence[RecordedGroup]) -> list[RecordedGroup]:
    """The groups with a success and a failure."""
    return [
        group for group in groups if num_successes(group.rows) and any(row["success"] is False for row in group.rows)
    ]


def manifest_of(rollouts: Path, num_groups: int, config: Config) -> dict[str, Any]:
    """Inputs and settings of the scores."""
    teacher = config.teacher
    return {
        "number of groups": num_groups,
        "rollouts": file_fingerprint(rollouts),
        "model": model_fingerprint(config.model.path),
        "teacher": model_fingerprint(teacher.path) if teacher.path else teacher.kind,
        "model.dtype": config.model.dtype,
        "model.chat_template_kwargs": config.model.chat_template_kwargs,
        "peers": config.peers.model_dump(mode="json"),
        "divergence": config.divergence.model_dump(mode="json"),
        "rollout.num_prompts_per_step": config.rollout.num_prompts_per_step,
        "seed": config.seed,
    }


def score_signals(
    groups: Sequence[RecordedGroup],
    source: Path,
    contexts: Mapping[str, PeersConfig],
    engine: Engine[Any],
    config: Config,
    store: SignalStore,
    on_progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Score all responses that the store lacks, a few problems at a time. `PLAIN` is scored beside the contexts.

    Problems are taken in blocks of about `rollout.num_prompts_per_step`, as in training: controls take their peers from
    the other problems of the block.
    """
    done = 0
    for number, block in enumerate(blocks(groups, config.rollout.num_prompts_per_step)):
        missing = [name for name in (PLAIN, *contexts) if any((group.key, name) not in store for group in block)]
        if missing:
            rebuilt = [to_rollout_group(group, engine.chat, source) for group in block]
            seed = f"{config.seed}/{number}"
            built = {
                name: plain_contexts(rebuilt)
                if name == PLAIN
                else build_contexts(rebuilt, engine.chat, contexts[name], seed)
                for name in missing
            }
            for start in range(0, len(block), PROMPTS_AT_ONCE):
                part = slice(start, start + PROMPTS_AT_ONCE)
                found = _score_part(rebuilt[part], {name: own[part] for name, own in built.items()}, engine, config)
                for name in missing:
                    for group, contexts_of, signals in zip(block[part], built[name][part], found[name], strict=True):
                        if (group.key, name) not in store:
                            store.add(_row(group, name, contexts_of, signals))
                on_progress((done + min(part.stop, len(block))) / len(groups))
        done += len(block)
        on_progress(done / len(groups))


def _score_part(
    groups: Sequence[RolloutGroup], contexts: Contexts, engine: Engine[Any], config: Config
) -> dict[str, list[list[TokenSignal | None]]]:
    """As `score_contexts`, of complete contexts alone, and what is said twice computed once: short answers repeat."""
    first: dict[tuple[Any, ...], tuple[str, int, int]] = {}
    source: dict[tuple[str, int, int], tuple[str, int, int]] = {}
    asked: dict[str, list[list[PeerContext]]] = {}
    for name, of_groups in contexts.items():
        asked[name] = [[PeerContext(None)] * len(own) for own in of_groups]
        for g, own in enumerate(of_groups):
            for i, context in enumerate(own):
                if context.prompt_ids is None or not (context.complete or name == PLAIN):
                    continue
                key = g, context.prompt_ids, groups[g].rollouts[i].response_ids
                if key not in first:
                    first[key] = name, g, i
                    asked[name][g][i] = context
                source[name, g, i] = first[key]
    found = score_contexts(groups, asked, engine, config, top=1)
    return {
        name: [[_at(found, source.get((name, g, i))) for i in range(len(own))] for g, own in enumerate(of_groups)]
        for name, of_groups in contexts.items()
    }


def _at(
    found: Mapping[str, Sequence[Sequence[TokenSignal | None]]], place: tuple[str, int, int] | None
) -> TokenSignal | None:
    return None if place is None else found[place[0]][place[1]][place[2]]


def attempts_of(group: RecordedGroup, rows: Mapping[str, Mapping[str, Any]], chat: Chat) -> list[Attempt]:
    """The judged responses of a group, with what was said of them.

    Args:
        rows: of the store, by context.
    """
    judged = [i for i, row in enumerate(group.rows) if row["success"] is not None]
    successes = [i for i in judged if group.rows[i]["success"]]
    found = []
    for i in judged:
        row = group.rows[i]
        others = [group.rows[j] for j in successes if group.rows[j]["response_ids"] != row["response_ids"]]
        texts = chat.token_texts(row["response_ids"])
        text = row["response"] if "".join(texts).startswith(row["response"]) else "".join(texts)
        points = {
            "tokens": first_new_token(row["response_ids"], [other["response_ids"] for other in others]),
            "parts": first_new_part(text, [other["response"] for other in others], texts),
        }
        told = {
            name: said
            for name, own in rows.items()
            if own["complete"][i]
            and own["log_ratio"][i] is not None
            and not (said := Told(*(np.array(own[part][i], float) for part in ("log_ratio", "divergence")))).silent
        }
        surprise = -np.array(rows[PLAIN]["student"][i], float)
        found.append(Attempt(bool(row["success"]), points, np.maximum(surprise, 0.0), told))
    return found


def _row(
    group: RecordedGroup, name: str, contexts: Sequence[PeerContext], signals: Sequence[TokenSignal | None]
) -> dict[str, Any]:
    def numbers(values: np.ndarray) -> list[float]:
        return np.round(values.astype(float), DIGITS).tolist()

    row: dict[str, Any] = {
        "prompt": group.key,
        "context": name,
        "complete": [name == PLAIN or context.complete for context in contexts],
        "log_ratio": [signal and numbers(signal.advantage) for signal in signals],
        "divergence": [signal and numbers(signal.divergence) for signal in signals],
    }
    return row | ({"student": [signal and numbers(signal.student) for signal in signals]} if name == PLAIN else {})
