"""Files that stay whole after a kill: replaced in one move, or extended by one synced line at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pydantic import BaseModel, ValidationError

_Model = TypeVar("_Model", bound=BaseModel)


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A file to write in place of `path`. Readers see the old one until the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with replacing(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file as a whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSONL file as a whole."""
    with replacing(path) as file:
        file.writelines(to_line(row) for row in rows)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line and force it to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(to_line(row))
        file.flush()
        os.fsync(file.fileno())


def to_line(row: Mapping[str, Any]) -> str:
    """A row of a JSONL file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file that this package wrote. A last line that a kill truncated is left out."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def read_models(path: Path, model: type[_Model]) -> Iterator[tuple[int, str, _Model | ValidationError]]:
    """(line number, text, row or error) for each line of a JSONL file that a person wrote. Skips blank lines."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row: _Model | ValidationError = model.model_validate_json(line)
            except ValidationError as error:
                row = error
            yield number, line, row


def explain(error: ValidationError) -> str:
    """A pydantic error as `field: reason; field: reason`."""
    reasons = []
    for item in error.errors():
        field = ".".join(map(str, item["loc"]))
        message = item["msg"].removeprefix("Value error, ")
        reasons.append(f"{field}: {message}" if field else message)
    return "; ".join(reasons)
