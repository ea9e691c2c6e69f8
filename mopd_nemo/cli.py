"""The `mopd` command: its subcommands by name."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mopd_nemo import __version__
from mopd_nemo.commands import (
    analyze,
    chat,
    config,
    data,
    doctor,
    estimate,
    export,
    init,
    inspect,
    preflight,
    report,
    sample,
    submit,
    train,
    verify,
    watch,
)
from mopd_nemo.config import UserError
from mopd_nemo.files import STORAGE, DamagedError, WriteError
from mopd_nemo.terminal import Terminal, in_words, visible

app = typer.Typer(
    name="mopd",
    help="Multi-Rollout On-Policy Distillation: train, evaluate, and look at what the teacher saw.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    init.init,
    train.train,
    watch.watch,
    inspect.inspect,
    report.report,
    verify.verify,
    train.sweep,
    report.compare,
):
    app.command()(command)
app.command("eval")(sample.evaluate)
app.command()(export.export)
app.command()(chat.chat)
app.command()(sample.complete)
app.command()(preflight.preflight)
app.command()(submit.submit)
app.command()(estimate.estimate)
app.command()(doctor.doctor)
app.add_typer(analyze.app, name="analyze")
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


SPINS = "2000"
"""How often a thread of torch on a CPU looks whether there is work before it gives its core to others."""


def main() -> None:
    """Entry point: bad input ends with its message and exit code 2, a file that cannot be written with 4."""
    # By default threads wait for each other without end, and on a busy machine a step takes many times as long. torch
    # reads this when it is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        if sum(word in ("-c", "--config") or word.startswith("--config=") for word in sys.argv[1:]) > 1:
            raise UserError(
                "--config is given twice, and only the last would count: name one file, whose "
                "`defaults: [a.yaml, b.yaml]` name the others"
            )
        app()
    except (UserError, DamagedError) as error:
        _fail(str(error), 2)
    except WriteError as error:
        _fail(str(error), train.FULL)
    except OSError as error:
        if error.errno not in STORAGE:
            raise
        _fail(f"{error.filename or 'a file'}: cannot be written: {error.strerror}", train.FULL)


def _fail(message: str, code: int) -> None:
    console = Terminal(stderr=True)
    console.print("error: ", style="bold red", end="")
    lines = [in_words(line, console) for line in f"error: {visible(message)}".splitlines()]
    print("\n".join(lines).removeprefix("error: "), file=sys.stderr)
    sys.exit(code)
