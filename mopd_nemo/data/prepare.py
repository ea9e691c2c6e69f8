"""Data sources: their form, and the way from rows, on the hub or in local files, to problems by split."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopd_nemo.config import UserError
from mopd_nemo.data.rows import BadRows, Row, RowError, read_rows
from mopd_nemo.types import Message, Problem

logger = logging.getLogger(__name__)

_SUFFIXES = (".json", ".jsonl", ".parquet")

Splits = dict[str, list[Problem]]
"""Problems by split: `train` and `eval`, either of which may be missing."""


@dataclass(frozen=True, slots=True)
class Hub:
    """A dataset on the Hugging Face hub."""

    repo: str
    splits: tuple[str, ...]
    config: str | None = None
    revision: str = "main"


@dataclass(frozen=True, slots=True)
class Source:
    """A benchmark or a training corpus."""

    name: str
    title: str
    hub: Hub | None
    """None: it is not on the hub."""
    download: str
    """Place of the files, for a person to read."""
    to_problem: Callable[[Row, str], Problem | None]
    """(row, id for a row without one) -> problem. None: the row is not part of the benchmark. Raises `RowError`."""
    assign: Callable[[Mapping[str, list[Problem]]], Splits]
    """Problems by their split in the source (`all` for files without one) -> problems by our split."""
    sizes: Mapping[str, int]
    """Known number of problems per split. Another number is reported."""
    expand: Callable[[Row], Iterable[Row]] = lambda row: (row,)
    """A row of a file -> the rows inside it. Raises `RowError`."""
    shares_problems: bool = False
    """Train and eval hold the same problems, on purpose."""


def user(text: str) -> tuple[Message, ...]:
    """A prompt of one user turn."""
    return (Message(role="user", content=text),)


def train_and_test(by_split: Mapping[str, list[Problem]]) -> Splits:
    """The source's own splits. Files without a split are for evaluation."""
    return {
        "train": list(by_split.get("train", [])),
        "eval": [*by_split.get("test", []), *by_split.get("all", [])],
    }


def all_for_evaluation(by_split: Mapping[str, list[Problem]]) -> Splits:
    """A benchmark for evaluation only."""
    return {"eval": [problem for problems in by_split.values() for problem in problems]}


def all_for_training(by_split: Mapping[str, list[Problem]]) -> Splits:
    """A corpus for training only."""
    return {"train": [problem for problems in by_split.values() for problem in problems]}


@dataclass(frozen=True, slots=True)
class Prepared:
    """The problems of a source, and a report."""

    splits: Splits
    skipped: int
    """Number of malformed rows left out."""
    repeated: int
    """Number of training problems left out because an evaluation problem has the same prompt."""
    notes: list[str]
    """Differences from the known sizes of the source, and repeated prompts."""


def prepare(source: Source, inputs: Sequence[Path], revision: str | None, bad: BadRows) -> Prepared:
    """Read a source from `inputs`, or from the hub when there are none.

    Raises:
        UserError: there is nothing to read, no network, or a malformed row and the policy is to stop.
    """
    parts = _local_parts(inputs, bad) if inputs else _hub_parts(source, revision)
    by_split: dict[str, list[Problem]] = {}
    for part in parts:
        by_split.setdefault(part.split, []).extend(_problems(source, part, bad))
    splits = {split: problems for split, problems in source.assign(by_split).items() if problems}
    if not splits:
        read = ", ".join(map(str, inputs)) or "the hub"
        raise UserError(f"{source.name}: none of the rows of {read} belong to it; see {source.download}")
    repeated = 0 if source.shares_problems else _drop_repeated(splits)
    for split, problems in splits.items():
        _check_ids(source, split, problems)
    return Prepared(splits, sum(bad.skipped.values()), repeated, _notes(source, splits, repeated))


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one file, or of one split on the hub."""

    split: str
    """`train`, `test`, or `all` where the source has no splits."""
    where: str
    rows: Iterable[tuple[str, Row]]
    """Position and content of each row."""


def _problems(source: Source, part: _Part, bad: BadRows) -> Iterator[Problem]:
    number = 0
    for position, row in part.rows:
        try:
            singles = list(source.expand(row))
        except RowError as error:
            bad.report(part.where, position, str(error))
            continue
        for single in singles:
            try:
                problem = source.to_problem(single, f"{source.name}/{part.split}/{number}")
            except RowError as error:
                name = f" ({single['idx']})" if len(singles) > 1 and "idx" in single else ""
                bad.report(part.where, f"{position}{name}", str(error))
                continue
            if problem is not None:
                number += 1
                yield problem


def _local_parts(inputs: Sequence[Path], bad: BadRows) -> Iterator[_Part]:
    """A directory's train.* and test.* are splits; a file named otherwise is `all`."""
    for path in inputs:
        if not path.exists():
            raise UserError(f"--input {path}: no such file or directory")
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES) if path.is_dir() else [path]
        if not files:
            raise UserError(f"--input {path}: no {', '.join(_SUFFIXES)} file in it")
        for file in files:
            name = file.stem.split("-")[0]
            split = name if path.is_dir() and name in ("train", "test") else "all"
            yield _Part(split, str(file), read_rows(file, bad))


def _hub_parts(source: Source, revision: str | None) -> Iterator[_Part]:
    if source.hub is None:
        raise UserError(f"{source.name} is not on the Hugging Face hub: download {source.download}, {_then(source)}")
    hub = source.hub
    revision = revision or hub.revision
    for split in hub.splits:
        rows = ((f"row {number}", row) for number, row in enumerate(_load(source, split, revision), start=1))
        yield _Part(split if len(hub.splits) > 1 else "all", f"{hub.repo}@{revision} ({split})", rows)


def _load(source: Source, split: str, revision: str) -> Iterable[Row]:
    assert source.hub is not None
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"{source.name}: reading the Hugging Face hub needs `datasets`: pip install 'mopd-nemo[data]'; or download "
            f"{source.download}, {_then(source)}"
        ) from error
    try:
        rows: Any = load_dataset(source.hub.repo, source.hub.config, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds of errors when network or hub refuse
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source.name}: cannot load {source.hub.repo} at revision {revision} from the hub ({reason}). "
            f"Without network, download {source.download} elsewhere, {_then(source)}"
        ) from error
    return rows


def _then(source: Source) -> str:
    return f"and run `mopd data prepare {source.name} --input PATH --output DIR` where PATH is the place of the files"


def _drop_repeated(splits: Splits) -> int:
    """Remove training problems whose prompt is also an evaluation prompt. Returns their number."""
    evaluated = {repr(problem.messages) for problem in splits.get("eval", [])}
    train = splits.get("train", [])
    kept = [problem for problem in train if repr(problem.messages) not in evaluated]
    if train:
        splits["train"] = kept
    return len(train) - len(kept)


def _check_ids(source: Source, split: str, problems: Sequence[Problem]) -> None:
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise UserError(f"{source.name}: id {problem.id!r} appears twice in {split}: was a file given twice?")
        seen.add(problem.id)


def _notes(source: Source, splits: Splits, repeated: int) -> list[str]:
    notes = []
    if repeated:
        notes.append(f"{repeated} training problems left out: their prompts are in the evaluation split")
    for split, problems in splits.items():
        known = source.sizes.get(split)
        number = len(problems) + (repeated if split == "train" else 0)
        if known is not None and known != number:
            notes.append(f"{split} has {number} problems where {known} were expected: another revision of the data?")
    return notes
