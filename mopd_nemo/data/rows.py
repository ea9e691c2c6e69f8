"""Rows of a data file (JSON, JSONL or parquet), and the treatment of malformed ones."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mopd_nemo.config import UserError
from mopd_nemo.files import read_text, text_lines

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class RowError(ValueError):
    """A malformed row. The message starts with the field."""


class BadRows:
    """Stops at the first malformed row, or skips and counts them.

    Args:
        setting: the option that skips such rows, named in the error.
    """

    def __init__(self, policy: Literal["stop", "skip"], setting: str = "data.on_bad_row=skip") -> None:
        self._policy = policy
        self._setting = setting
        self.skipped: Counter[str] = Counter()
        """Number of rows left out, by file."""

    def report(self, file: str, position: str, reason: str) -> None:
        """Report a malformed row at `position` of `file`.

        Raises:
            UserError: the policy is to stop.
        """
        if self._policy == "stop":
            raise UserError(f"{file}, {position}: {reason} (leave such rows out with {self._setting})")
        logger.warning("%s, %s: %s; the row is left out", file, position, reason)
        self.skipped[file] += 1


def read_rows(path: Path, bad: BadRows) -> Iterator[tuple[str, Row]]:
    """The rows of a file with their positions: `line 3` of JSONL, `row 3` of a JSON list or of parquet.

    Raises:
        UserError: the file cannot be read as a whole.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    begun = False
    for number, line in text_lines(path):
        if not begun and line.lstrip().startswith("["):
            yield from _json_rows(path, read_text(path), bad)
            return
        if line.strip():
            begun = True
            yield from _checked(path, f"line {number}", line, bad)


def _json_rows(path: Path, text: str, bad: BadRows) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield f"row {number}", row
        else:
            bad.report(str(path), f"row {number}", "not a JSON object")


def _checked(path: Path, position: str, line: str, bad: BadRows) -> Iterator[tuple[str, Row]]:
    try:
        row = json.loads(line)
    except ValueError as error:
        bad.report(str(path), position, f"not valid JSON: {error}")
        return
    if isinstance(row, dict):
        yield position, row
    else:
        bad.report(str(path), position, "not a JSON object")


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install 'mopd-nemo[data]'") from error
    try:
        batches = ParquetFile(path).iter_batches()
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as parquet: {error}") from error


def text_field(row: Row, name: str) -> str:
    """A field that must be non-empty text.

    Raises:
        RowError: it is missing, empty or of another type.
    """
    value = row.get(name)
    if value is None:
        raise RowError(f"{name}: missing")
    if not isinstance(value, str):
        raise RowError(f"{name}: {value!r} is not text")
    if not value.strip():
        raise RowError(f"{name}: empty")
    return value
