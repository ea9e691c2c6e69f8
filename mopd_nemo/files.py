"""Files that stay whole after a kill: replaced in one move, or extended by one synced line at a time."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

from pydantic import BaseModel, ValidationError

_Model = TypeVar("_Model", bound=BaseModel)


STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
"""Errors of a write that begins well: no space, over a quota or a file-size limit, a device that fails."""


class WriteError(Exception):
    """A file cannot be written. The message names it and says why, how much room there is, and what to do.

    The `mopd` command prints it without a traceback and exits with code 4.
    """


class DamagedError(ValueError):
    """A file is not what it should be: text, or as this package wrote it. The message names file and line.

    The `mopd` command prints it without a traceback and exits with code 2, like bad input.
    """


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file to write in place of `path`; see `replacing_bytes`."""
    with replacing_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        yield text
        text.flush()
        text.detach()


@contextmanager
def replacing_bytes(path: Path) -> Iterator[BinaryIO]:
    """A file to write in place of `path`, in a directory that is made if there is none.

    Readers see the old one until the block ends without an error.

    Raises:
        WriteError: the directory cannot be made or written, or its disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("wb")
    except OSError as error:
        raise WriteError(cannot_write(path, error)) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in STORAGE:
            raise WriteError(cannot_write(path, error)) from error
        raise


def cannot_write(path: Path, error: OSError) -> str:
    """What a failed write means to the user: path, reason, room, remedy."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            why = f"{error.strerror}; {in_bytes(free_space(path))} are free there: make room"
        case errno.EFBIG:
            why = f"a file would be larger than {in_bytes(file_limit())}, this process's limit: raise it (ulimit -f)"
        case _:
            why = f"{error.strerror}"
    return f"{path}: cannot be written: {why}"


def free_space(path: Path) -> int:
    """Bytes that this user can still write on the file system of `path`, which need not exist yet."""
    return shutil.disk_usage(next(parent for parent in (path, *path.absolute().parents) if parent.exists())).free


def file_limit() -> int | None:
    """Bytes that a file of this process may have; None: no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if limit == resource.RLIM_INFINITY else limit


def in_bytes(count: int | None) -> str:
    """1234567 -> 1.2 MB."""
    if count is None:
        return "any size"
    size, units = float(count), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 1000 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.3g} {unit}" if unit != "TB" else f"{size:.1f} TB"


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
    """Append one JSON line and force it to disk.

    Raises:
        WriteError: it does not fit. The file is then as before.
    """
    data = to_line(row).encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise WriteError(cannot_write(path, error)) from error


def to_line(row: Mapping[str, Any]) -> str:
    """A row of a JSONL file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file that this package wrote.

    What a kill or a power loss has left of the last rows is left out: a line cut short, blocks of zeros.

    Raises:
        DamagedError: a line before a good one is not a row, or no line is.
    """
    rows: list[dict[str, Any]] = []
    bad, whole = 0, False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            row = _row(line)
            if row is None:
                bad, whole = bad or number, whole or line.endswith(b"\n")
            elif bad:
                raise DamagedError(
                    f"{path}, line {bad}: damaged, with good rows after it; restore the file, or remove this line"
                )
            else:
                rows.append(row)
    if whole and not rows:
        raise DamagedError(f"{path}, line {bad}: not JSON Lines, as this package writes them")
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that a whole line holds, if it holds one."""
    try:
        row = json.loads(line.decode())
    except ValueError:  # no JSON, or no UTF-8
        return None
    return row if isinstance(row, dict) and line.endswith(b"\n") else None


_NOT_TEXT = {
    b"PAR1": "a parquet file",
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""First bytes of what is often given in place of UTF-8 text."""


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file that a person wrote, without a byte order mark.

    Raises:
        DamagedError: it is not UTF-8 text.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                kind = next((kind for start, kind in _NOT_TEXT.items() if line.startswith(start)), None)
                if kind is not None:
                    raise DamagedError(f"{path}: {kind}, not UTF-8 text: write it as plain UTF-8")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DamagedError(
                    f"{path}, line {number}: not UTF-8 text (byte {line[error.start]:#04x}): save the file as UTF-8"
                ) from error


def read_text(path: Path) -> str:
    """A text file that a person wrote, without a byte order mark.

    Raises:
        DamagedError: it is not UTF-8 text.
    """
    return "".join(line for _, line in text_lines(path))


def read_models(path: Path, model: type[_Model]) -> Iterator[tuple[int, str, _Model | ValidationError]]:
    """(line number, text, row or error) for each line of a JSONL file that a person wrote. Skips blank lines.

    Raises:
        DamagedError: it is not UTF-8 text.
    """
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            row: _Model | ValidationError = model.model_validate_json(line.strip())
        except ValidationError as error:
            row = error
        yield number, line, row


def explain(error: ValidationError) -> str:
    """A pydantic error as `field: reason; field: reason`."""
    reasons = []
    for item in error.errors():
        field = ".".join(map(str, item["loc"]))
        reasons.append(f"{field}: {reason_of(item)}" if field else reason_of(item))
    return "; ".join(reasons)


_REASONS = {
    "bool_parsing": "write true or false",
    "bool_type": "write true or false",
    "dict_type": "must be a mapping, as in {key: value}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "list_type": "must be a list, as in [a, b]",
    "missing": "missing",
    "model_type": "must be a block of settings, as in {key: value}",
    "string_type": "must be text; write it in quotes",
    "tuple_type": "must be a list, as in [a, b]",
}
"""In the user's words, what pydantic says in Python's."""


def reason_of(item: Any) -> str:
    """What one error of pydantic says, in the user's words."""
    if reason := _REASONS.get(item["type"]):
        return reason
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "json_invalid":
        return message.replace("Invalid JSON", "not valid JSON").replace("at line 1 column", "at column")
    return message if item["type"] == "value_error" else f"{message[0].lower()}{message[1:]}"
