"""Rows of a long computation on disk, so that it can be stopped at any moment and continued.

manifest.json    inputs and settings of the rows; a rerun with others is refused
NAME.jsonl       the rows
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mopd_nemo.config import UserError
from mopd_nemo.embedded import resolve_model_path
from mopd_nemo.files import append_row, read_rows, write_json, write_rows

Key = tuple[str, str]


class RowStore(Mapping[Key, dict[str, Any]]):
    """Rows by two of their fields.

    Args:
        name: of the file, which says what a row is: `scores`, for example.
        fields: the two that identify a row.
        manifest: inputs and settings of the rows, as JSON.
        restart: drop earlier rows instead of refusing a changed manifest.

    Raises:
        UserError: `directory` is a file, or holds rows of another manifest.
    """

    def __init__(
        self, directory: Path, name: str, fields: Key, manifest: Mapping[str, Any], restart: bool = False
    ) -> None:
        self._fields = fields
        self._file = directory / f"{name}.jsonl"
        manifest_file = directory / "manifest.json"
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"--output {directory}: a file is in its place; name a directory") from None
        except OSError as error:
            raise UserError(f"--output {directory}: {error.strerror}; choose another place") from error
        if not restart and manifest_file.exists():
            self._check(json.loads(manifest_file.read_text()), manifest)
        rows = read_rows(self._file) if self._file.exists() and not restart else []
        write_rows(self._file, rows)  # drops a last line that a kill has left incomplete
        self._rows = {self._key(row): row for row in rows}
        write_json(manifest_file, manifest)

    def _check(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        changed = [name for name in new if old.get(name) != new[name]]
        if changed:
            raise UserError(
                f"{self._file}: its rows were made with other values of {', '.join(changed)}; choose another "
                "--output, or begin anew with --restart"
            )

    def _key(self, row: Mapping[str, Any]) -> Key:
        first, second = self._fields
        return row[first], row[second]

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self._rows[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and force it to disk."""
        append_row(self._file, row)
        self._rows[self._key(row)] = row


def file_fingerprint(file: Path) -> str:
    """The hash of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def text_fingerprint(text: str) -> str:
    """The hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def model_fingerprint(path: str) -> str:
    """The hash of a model directory's files; for a model of the hub, its name."""
    directory = Path(resolve_model_path(path))
    if not directory.is_dir():
        return path
    files = sorted(f for f in directory.glob("*") if f.suffix in {".json", ".safetensors", ".bin", ".jinja", ".model"})
    own = [f for f in files if f.name not in ("trainer.json", "manifest.json")]
    return text_fingerprint("".join(f"{f.name} {file_fingerprint(f)}\n" for f in own))
