"""The subcommands of `mopd`. Slow imports are inside the commands, so that `mopd --help` is fast."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from mopd_nemo.config import Config, TeacherConfig, UserError
from mopd_nemo.terminal import Terminal

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML config file.")]
OptionalConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML config file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file."),
]
SECONDS_BETWEEN_LINES = 20
"""Of progress, where there is no terminal to draw a bar on."""


def check_output(path: Path, option: str, directory: bool = False) -> None:
    """Find out before the work whether an output file, or a directory of them, can be written. Writes nothing.

    Raises:
        UserError: it cannot.
    """
    if path.exists() and path.is_dir() != directory:
        there, wanted = ("a file", "a directory") if directory else ("a directory", "a file")
        raise UserError(f"{option} {path}: {there} is in its place; name {wanted}")
    above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if path.is_file():
        above = path.absolute().parent
    if not above.is_dir():
        raise UserError(f"{option} {path}: {above} is no directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: no permission to write in {above}; choose another place")


def print_table(
    head: Sequence[str], body: Iterable[Sequence[str]], console: Console | None = None, title: str | None = None
) -> None:
    """Print a table whose first column is text and whose others are numbers; their headings stand word over word."""
    rows = [list(cells) for cells in body]
    head = [head[0], *(re.sub(r" (?=\w)", "\n", name) for name in head[1:])]
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for number, cells in enumerate(zip(head, *rows, strict=True)):
        longest = max((len(word) for cell in cells for word in cell.split()), default=0)
        table.add_column(cells[0], justify="right" if number else "left", min_width=longest, overflow="fold")
    for cells in rows:
        table.add_row(*cells)
    (console or Terminal()).print(table)


def scoring_config(source: Path, model: str | None, config_file: Path | None, overrides: Sequence[str]) -> Config:
    """The given config, else that of the run that recorded the rollouts, else the defaults. No teacher is loaded."""
    from mopd_nemo.config.load import load_config, read_config

    of_run = source.parent.parent / "config.yaml"
    if config_file is not None:
        config = load_config(config_file, overrides)
    elif of_run.is_file():
        config = load_config(of_run, overrides) if overrides else read_config(of_run)
    elif overrides:
        raise UserError(f"settings ({overrides[0]}) change a config, and {source} is not inside a run: add --config")
    else:
        config = load_config(None)
    changes = {"path": model} if model else {}
    return config.model_copy(
        update={"model": config.model.model_copy(update=changes), "teacher": TeacherConfig(kind="none")}
    )


def default_output(rollouts: Path, name: str) -> Path:
    """Inside the run. A file has none: it is refused without an output."""
    if not rollouts.is_dir():
        raise UserError(f"--rollouts {rollouts} is a file: say where the results go with --output DIR")
    return rollouts / name


@contextmanager
def progress(description: str) -> Iterator[Callable[[float, str], None]]:
    """A bar on a terminal, else a line now and then; both with the time left."""
    console = Terminal(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(20), TaskProgressColumn(), TimeRemainingColumn())
    began = said = time.monotonic()
    first: float | None = None
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=1.0)

        def report(share: float, text: str) -> None:
            nonlocal first, said
            bar.update(task, completed=share, description=f"{description}: {text}")
            now = time.monotonic()
            first = share if first is None else first
            if not console.is_terminal and (now - said >= SECONDS_BETWEEN_LINES or share >= 1):
                said, done = now, share - first
                left = timedelta(seconds=round((now - began) / done * (1 - share))) if done > 0 else "?"
                console.print(f"{description}: {text}, {left} left", soft_wrap=True)

        yield report
