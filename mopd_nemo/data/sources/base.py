"""The form of a data source, and the ways to split one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mopd_nemo.data.rows import Row
from mopd_nemo.types import Message, Problem

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
    """A benchmark."""

    name: str
    title: str
    hub: Hub | None
    """None: it is not on the hub."""
    download: str
    """Where a person finds the files."""
    to_problem: Callable[[Row, str], Problem | None]
    """(row, id to use when the row has none) -> problem; None for a row that is not part of the benchmark. Raises
    `RowError`."""
    assign: Callable[[Mapping[str, list[Problem]]], Splits]
    """Problems by the split they were found in (`all` for files without one) -> the splits that we use."""
    sizes: Mapping[str, int]
    """Problems per split, where known; other numbers are reported."""
    expand: Callable[[Row], Iterable[Row]] = lambda row: (row,)
    """A row of a file -> the rows in it. Raises `RowError`."""
    shares_problems: bool = False
    """Train and eval hold the same problems, on purpose."""


def user(text: str) -> tuple[Message, ...]:
    """A prompt of one user turn."""
    return (Message(role="user", content=text),)


def train_and_test(by_split: Mapping[str, list[Problem]]) -> Splits:
    """The source's own split; files without one are for evaluation."""
    return {
        "train": list(by_split.get("train", [])),
        "eval": [*by_split.get("test", []), *by_split.get("all", [])],
    }


def all_for_evaluation(by_split: Mapping[str, list[Problem]]) -> Splits:
    """A benchmark that is only evaluated on."""
    return {"eval": [problem for problems in by_split.values() for problem in problems]}


def all_for_training(by_split: Mapping[str, list[Problem]]) -> Splits:
    """A corpus that is only trained on."""
    return {"train": [problem for problems in by_split.values() for problem in problems]}
