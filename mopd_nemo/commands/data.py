"""`mopd data`: list the sources, and prepare one as JSONL that `data.train` and `data.eval` name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from mopd_nemo.commands import check_output
from mopd_nemo.config import UserError
from mopd_nemo.data.load import write_problems
from mopd_nemo.data.prepare import prepare
from mopd_nemo.data.rows import BadRows
from mopd_nemo.data.sources import SOURCES, find_source
from mopd_nemo.files import write_json
from mopd_nemo.terminal import Terminal

app = typer.Typer(help="The paper's benchmarks: list them, and prepare one as JSONL.", no_args_is_help=True)


@app.command("list")
def list_sources() -> None:
    """List the data sources."""
    table = Table(box=None)
    for name in ("name", "what", "hub"):
        table.add_column(name, overflow="fold")
    for source in SOURCES.values():
        table.add_row(source.name, source.title, source.hub.repo if source.hub else "not on the hub")
    Terminal().print(table)


@app.command("prepare")
def prepare_source(
    name: Annotated[str, typer.Argument(help="A source of `mopd data list`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for train.jsonl and eval.jsonl.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", "-i", help="Local JSON, JSONL or parquet, or a directory of it. Default: the hub."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision on the hub. Default: the one that is known.")] = None,
    on_bad_row: Annotated[Literal["stop", "skip"], typer.Option(help="What to do about a malformed row.")] = "stop",
) -> None:
    """Write a source's problems as JSONL for data.train and data.eval.

    mopd data prepare sciknoweval-chemistry --output data/chemistry
    """
    inputs = inputs or []
    check_output(output, "--output", directory=True)
    source = find_source(name)
    if revision is not None and inputs:
        raise UserError(f"--revision {revision}: local files of --input have no revision; leave one of the two out")
    bad = BadRows(on_bad_row, setting="--on-bad-row skip")
    prepared = prepare(source, inputs, revision, bad)
    output.mkdir(parents=True, exist_ok=True)
    for split, problems in prepared.splits.items():
        write_problems(output / f"{split}.jsonl", problems)
    record = {
        "source": source.name,
        "title": source.title,
        "hub": None if inputs or source.hub is None else source.hub.repo,
        "revision": None if inputs or source.hub is None else revision or source.hub.revision,
        "files": [path.name for path in inputs],
        "problems": {split: len(problems) for split, problems in prepared.splits.items()},
        "skipped_rows": prepared.skipped,
        "repeated_prompts_left_out": prepared.repeated,
    }
    write_json(output / "source.json", record)
    console = Terminal()
    for split, problems in prepared.splits.items():
        console.print(f"{output / f'{split}.jsonl'}: {len(problems)} problems", soft_wrap=True)
    for file, count in bad.skipped.items():
        console.print(f"{file}: {count} malformed rows left out", style="yellow", soft_wrap=True)
    for note in prepared.notes:
        console.print(note, style="yellow", soft_wrap=True)
