"""`mopd data`: list the sources, prepare one as JSONL that `data.train` and `data.eval` name, and look at such rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.panel import Panel
from rich.table import Table

from mopd_nemo.commands import Overrides, check_output
from mopd_nemo.config import Config, UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.data.load import load_problems, num_available, write_problems
from mopd_nemo.data.prepare import prepare
from mopd_nemo.data.rows import BadRows
from mopd_nemo.data.sources import SOURCES, find_source
from mopd_nemo.files import write_json
from mopd_nemo.terminal import Terminal, plain, shortened
from mopd_nemo.types import Problem
from mopd_nemo.verifiers.pool import VerifierPool

if TYPE_CHECKING:
    from mopd_nemo.chat import Chat

app = typer.Typer(help="Problems: look at them, and prepare the paper's benchmarks as JSONL.", no_args_is_help=True)
SHOWN_FAULTS = 10
"""Of a kind. The others are counted."""


@app.command("list")
def list_sources() -> None:
    """List the data sources."""
    table = Table(box=None)
    for name in ("name", "what", "hub"):
        table.add_column(name, overflow="fold", no_wrap=name == "hub")
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


@app.command("preview")
def preview(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="Problems as JSONL, or a config (.yaml).")],
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose tokenizer and template are used. Default: the config's, else none.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Number of rows to show.")] = 2,
    problem: Annotated[str | None, typer.Option("--id", help="Show this problem alone.")] = None,
) -> None:
    """Show problems as the student reads them, their lengths, and all that is wrong with them.

    Exit code 2: a run would be stopped by what was found.

    mopd data preview train.jsonl --model path/to/model

    mopd data preview mine.yaml
    """
    if source.suffix in (".yaml", ".yml"):
        config = load_config(source, overrides or [])
        model = model or config.model.path
        splits = ("train", "eval") if config.train.eval_every else ("train",)
    else:
        config, splits = load_config(None, [*(overrides or []), f"data.train={json.dumps(str(source))}"]), ("train",)
    console = Terminal()
    seen = [_Split(config, split, model) for split in splits]
    wrong = [split.report(console) for split in seen]
    if len(seen) == 2:
        texts = {repr(problem.messages) for problem in seen[0].problems}
        if shared := sum(repr(problem.messages) in texts for problem in seen[1].problems):
            console.print(f"{shared} prompts are both trained on and held out: the evaluation is too good", style="red")
    for split in seen:
        known = [one for one in split.problems if problem in (None, one.id)]
        for one in known[: rows if problem is None else None]:
            split.show(one, console)
    if problem is not None and not any(one.id == problem for split in seen for one in split.problems):
        raise UserError(f"--id {problem}: no usable row has this id")
    raise typer.Exit(2 if any(wrong) else 0)


class _Collected(BadRows):
    """Keeps what is wrong and goes on."""

    def __init__(self, policy: Literal["stop", "skip"]) -> None:
        super().__init__("skip")
        self.stops = policy == "stop"
        self.reasons: list[str] = []

    def report(self, file: str, position: str, reason: str) -> None:
        self.reasons.append(f"{position}: {reason}")


class _Split:
    """The problems of a split, and what is wrong with its rows."""

    def __init__(self, config: Config, name: Literal["train", "eval"], model: str | None) -> None:
        self._bad = _Collected(config.data.on_bad_row)
        self.source = config.data.train if name == "train" else config.data.eval
        self._there = num_available(self.source, name)
        self._limit = config.data.max_prompt_tokens if model else None
        self.problems = load_problems(config, name, self._bad)
        with VerifierPool(config.verifier, {problem.task for problem in self.problems}) as verifiers:
            faults = [verifiers.gold_fault(problem.task, problem.answer) for problem in self.problems]
            reasons = [fault.result() for fault in faults]
        for problem, reason in zip(self.problems, reasons, strict=True):
            if reason:
                self._bad.report(self.source, f"id {problem.id!r}", reason)
        self.problems = [one for one, reason in zip(self.problems, reasons, strict=True) if not reason]
        self._chat: Chat | None = None
        if model is not None:
            from mopd_nemo.chat import with_prompt_ids
            from mopd_nemo.engines.models import load_chat

            self._chat = load_chat(config.model.model_copy(update={"path": model}))
            escape = config.data.escape_control_tokens
            self.problems = with_prompt_ids(self.problems, self._chat, 10**9, escape_control_tokens=escape)

    def report(self, console: Terminal) -> bool:
        """Print what was found. Whether it would stop a run."""
        console.print(self.source, style="bold", soft_wrap=True)
        unit, sizes = "tokens", [len(one.prompt_ids) for one in self.problems]
        if self._chat is None:
            unit, sizes = "characters", [sum(len(turn["content"]) for turn in one.messages) for one in self.problems]
        tasks = Counter(one.task for one in self.problems)
        kinds = ", ".join(f"{count} {task}" for task, count in tasks.most_common()) or "none"
        console.print(f"usable      {kinds}; {self._there} there", soft_wrap=True)
        if sizes:
            half, most = (sorted(sizes)[int(share * (len(sizes) - 1))] for share in (0.5, 0.95))
            spread = f"{min(sizes)} to {max(sizes)} {unit}, half of them up to {half}, 95 % up to {most}"
            console.print(f"prompts     {spread}", soft_wrap=True)
        if self._chat is None:
            console.print("            (give --model DIR to see them as its student does, in tokens)", style="dim")
        again = len(self.problems) - len({repr(one.messages) for one in self.problems})
        if again:
            console.print(f"{again} prompts repeat an earlier one", style="yellow")
        outcome = "a run stops there (data.on_bad_row=stop)" if self._bad.stops else "left out"
        self._list(self._bad.reasons, f"malformed: {outcome}", console)
        long = [f"id {one.id!r}: {len(one.prompt_ids)}" for one in self.problems if self._is_long(one)]
        self._list(long, f"longer than data.max_prompt_tokens={self._limit}: a run stops there", console)
        return bool((self._bad.reasons and self._bad.stops) or long or not self.problems)

    def _is_long(self, problem: Problem) -> bool:
        return self._limit is not None and len(problem.prompt_ids) > self._limit

    def _list(self, reasons: Sequence[str], what: str, console: Terminal) -> None:
        if reasons:
            console.print(f"{len(reasons)} {what}", style="red", soft_wrap=True)
        for reason in reasons[:SHOWN_FAULTS]:
            console.print(f"  {reason}", soft_wrap=True)
        if len(reasons) > SHOWN_FAULTS:
            console.print(f"  and {len(reasons) - SHOWN_FAULTS} more", soft_wrap=True)

    def show(self, problem: Problem, console: Terminal) -> None:
        """Print a problem as the student reads it, without a model its messages."""
        if self._chat is not None:
            text = self._chat.decode(problem.prompt_ids, skip_special_tokens=False)
            size = f", {len(problem.prompt_ids)} tokens"
        else:
            text, size = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in problem.messages), ""
        about = f"{problem.id}, {problem.task}, answer {shortened(problem.answer, 60)}{size}"
        console.print(Panel(plain(text), title=plain(about), title_align="left"))
