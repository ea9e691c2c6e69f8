"""Responses that the teacher wrote, kept on disk: each problem's once, reused in later epochs, resumes and runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mopd_nemo.config import UserError
from mopd_nemo.files import read_rows, write_rows
from mopd_nemo.types import Problem, Rollout

Write = Callable[[list[Problem]], list[list[Rollout]]]
"""Writes the responses of some problems, in order."""


class CompletionStore:
    """A directory with `writer.json`, which says how the responses came about, and numbered JSONL files.

    Args:
        writer: what the responses depend on; responses of another writer are refused.
    """

    def __init__(self, directory: Path, writer: dict[str, Any]) -> None:
        self._directory = directory
        self._kept: dict[str, list[Rollout]] = {}
        self._writer = writer
        recorded = directory / "writer.json"
        if recorded.exists():
            self._check(json.loads(recorded.read_text()))
        self._files = sorted(directory.glob("[0-9]*.jsonl"))
        for file in self._files:
            for row in read_rows(file):
                self._kept[row["problem"]] = [_to_rollout(response) for response in row["responses"]]

    def respond(self, problems: Sequence[Problem], write: Write) -> list[list[Rollout]]:
        """The responses of each problem; `write` makes those that are missing, and they are kept before this returns.

        A file holds what one call made and is written as a whole, so that after a kill the same call makes the same.
        """
        missing = [problem for problem in problems if problem.id not in self._kept]
        if missing:
            made = write(missing)
            self._directory.mkdir(parents=True, exist_ok=True)
            write_rows(self._directory / "writer.json", [self._writer])
            file = self._directory / f"{len(self._files):06d}.jsonl"
            rows = [
                {"problem": p.id, "responses": [_to_row(r) for r in rs]} for p, rs in zip(missing, made, strict=True)
            ]
            write_rows(file, rows)
            self._files.append(file)
            self._kept |= {problem.id: _forget_logprobs(rs) for problem, rs in zip(missing, made, strict=True)}
        return [self._kept[problem.id] for problem in problems]

    def _check(self, recorded: dict[str, Any]) -> None:
        for key, value in self._writer.items():
            if recorded.get(key) != value:
                raise UserError(
                    f"gkd.completions={self._directory}: written with {key}={recorded.get(key)!r}, "
                    f"this run has {value!r}; name another directory"
                )


def _to_row(rollout: Rollout) -> dict[str, Any]:
    return {"ids": list(rollout.response_ids), "text": rollout.text, "finished": rollout.finished}


def _to_rollout(row: dict[str, Any]) -> Rollout:
    return Rollout(tuple(row["ids"]), row["text"], row["finished"], ())


def _forget_logprobs(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """As they will be read back."""
    return [_to_rollout(_to_row(rollout)) for rollout in rollouts]
