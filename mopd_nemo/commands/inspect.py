"""`mopd inspect`: a rollout group in readable form."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mopd_nemo.config import UserError
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.rollouts import SHOWN, describe_peers, read_groups
from mopd_nemo.terminal import Terminal, plain, shortened

_STYLE = {"correct": "green", "verifier_error": "yellow"}


def inspect(
    run_dir: Annotated[Path, typer.Argument(help="Run directory.")],
    step: Annotated[int | None, typer.Option(help="Training step. Default: the last recorded one.")] = None,
    problem: Annotated[str | None, typer.Option(help="Problem id. Default: list the problems of the step.")] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="What the teacher said of each token, where the run has recorded it.")
    ] = False,
) -> None:
    """Show a rollout group: responses, verdicts, and exactly what the teacher of each rollout read."""
    run = RunDirectory.open(run_dir)
    rows = _read_step(run, step)
    console = Terminal()
    if problem is None:
        _list_problems(rows, run, console)
        return
    chosen = [row for row in rows if row["problem"] == problem]
    if not chosen:
        known = ", ".join(dict.fromkeys(row["problem"] for row in rows))
        raise UserError(f"--problem {problem}: not in step {rows[0]['step']} of {run.path}; that step has: {known}")
    if tokens:
        _show_tokens(chosen, run, console)
    else:
        _show(chosen, console)


def _show_tokens(rows: Sequence[Mapping[str, Any]], run: RunDirectory, console: Console) -> None:
    from mopd_nemo.analysis.tokens import Column, TokenView
    from mopd_nemo.commands.token_view import show_tokens
    from mopd_nemo.run.token_signal import read_token_signal

    file = run.signal_file(rows[0]["step"])
    if not file.is_file():
        config = run.read_config()
        if config.teacher.kind == "none":
            raise UserError(f"{file}: not recorded: method={config.method} has no teacher; see `mopd analyze tokens`")
        raise UserError(
            f"{file}: not recorded; train with logging.save_token_signal_every=1, or see `mopd analyze tokens`"
        )
    by_rollout = {row["rollout"]: row for row in rows}
    told = [own for own in read_token_signal(file) if own.problem == rows[0]["problem"]]
    if not told:
        console.print("no teacher had a context for these rollouts", style="yellow")
        return
    views = [
        TokenView(by_rollout[own.rollout], own.texts, (Column(describe_peers(by_rollout[own.rollout]), own.signal),))
        for own in told
    ]
    show_tokens(views, told[0].names, console)


def _read_step(run: RunDirectory, step: int | None) -> list[Mapping[str, Any]]:
    recorded = list(run.rollout_files())
    if not recorded:
        raise UserError(f"{run.rollouts}: no rollouts recorded; set logging.save_rollouts_every=1")
    if step is not None and step not in recorded:
        raise UserError(f"--step {step}: not recorded in {run.rollouts}; recorded: {recorded[0]} to {recorded[-1]}")
    groups = read_groups(run.rollouts_file(step if step is not None else recorded[-1]), SHOWN)
    return [row for group in groups for row in group.rows]


def _list_problems(rows: Sequence[Mapping[str, Any]], run: RunDirectory, console: Console) -> None:
    table = Table(title=f"step {rows[0]['step']}", box=None, title_justify="left")
    for name in ("problem", "answer", "correct", "with signal"):
        table.add_column(name, overflow="fold")
    for problem, group in groupby(rows, key=lambda row: row["problem"]):
        members = list(group)
        correct = sum(row["success"] is True for row in members)
        signal = sum(row["teacher_prompt"] is not None for row in members)
        table.add_row(problem, shortened(members[0]["answer"]), f"{correct}/{len(members)}", f"{signal}/{len(members)}")
    console.print(table)
    first = rows[0]["problem"]
    command = shlex.join(["mopd", "inspect", str(run.path), "--step", str(rows[0]["step"]), "--problem", first])
    console.print(f"\n{command}", style="dim", soft_wrap=True)


def _show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    head = rows[0]
    right = f"{sum(row['success'] is True for row in rows)} of {len(rows)} right"
    about = f", step {head['step']}, {right}, answer {shortened(head['answer'], 2000)}"
    console.print(plain(head["problem"], "bold").append_text(plain(about)))
    console.print(Panel(plain(head["prompt"]), title="student prompt", title_align="left"))
    for row in rows:
        style = _STYLE.get(row["outcome"], "red")
        title = f"rollout {row['rollout']}: {row['outcome']}, reward {row['reward']:g}, {row['response_tokens']} tokens"
        console.print(Panel(_body(row), title=plain(title), title_align="left", border_style=style))
    console.rule("what the teachers read")
    contexts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        contexts.setdefault(row["teacher_prompt"] or "", []).append(row)
    for prompt, targets in contexts.items():
        names = ", ".join(str(row["rollout"]) for row in targets)
        if not prompt:
            console.print(f"rollout {names}: no teacher context", style="yellow")
            continue
        first = targets[0]
        title = f"for rollout {names}: {describe_peers(first)}, {first['teacher_prompt_tokens']} tokens"
        console.print(Panel(plain(prompt), title=plain(title), title_align="left", border_style="cyan"))


def _body(row: Mapping[str, Any]) -> Group:
    parts: list[Text] = [plain(row["response"])]
    if not row["finished"]:
        parts.append(plain("[truncated at the token limit]", "yellow"))
    if row["feedback"]:
        parts.append(plain(f"feedback: {row['feedback']}", "dim"))
    for leak in row["leaks"]:
        said = row["response"][leak["start"] : leak["end"]]
        parts.append(plain(f"leaks the teacher's prompt ({leak['kind']}): {shortened(said)}", "yellow"))
    if row["details"].get("error"):
        parts.append(plain(row["details"]["error"], "yellow"))
    return Group(*parts)
