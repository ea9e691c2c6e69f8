"""Shared by the parts of `make real`: outputs appear whole or not at all, and errors end without a traceback."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mopd_nemo.config import UserError


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def building(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory`, renamed to it when the block ends without an error."""
    new = directory.with_name(f"{directory.name}.unfinished")
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(parents=True)
    yield new
    new.rename(directory)


@contextmanager
def ending_with_user_errors() -> Iterator[None]:
    """A `UserError` becomes its message and exit code 2, as in the `mopd` command."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
