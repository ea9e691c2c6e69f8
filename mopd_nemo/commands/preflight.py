"""`mopd preflight`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopd_nemo.commands import ConfigFile, Overrides, print_table, progress
from mopd_nemo.config import Config, TeacherConfig, UserError
from mopd_nemo.config.checks import uses
from mopd_nemo.config.load import load_config
from mopd_nemo.terminal import Terminal

if TYPE_CHECKING:
    from mopd_nemo.preflight.measure import Plan, Survey
    from mopd_nemo.run.resumable import RowStore
    from mopd_nemo.run.rollouts import RecordedGroup
    from mopd_nemo.types import Problem


def preflight(
    config_file: ConfigFile,
    overrides: Overrides = None,
    contexts: Annotated[
        str | None,
        typer.Option(help="Contexts, such as 1s,2s+1f,all. Default: 1s,2s,1f,1s+1f,2s+1f,all and the config's own."),
    ] = None,
    rollouts: Annotated[
        Path | None,
        typer.Option(help="Rollouts file (JSONL) or run directory to take the groups from. Default: sample them."),
    ] = None,
    problems: Annotated[int, typer.Option(min=2, help="Problems with every context to measure on.")] = 32,
    max_groups: Annotated[
        int | None, typer.Option(min=2, help="Groups to look through for them. Default: six times --problems.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Answers for each problem and context. Default: rollout.num_rollouts_per_prompt."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory. Default: runs/preflight-NAME.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop what --output holds already.")] = False,
) -> None:
    """Which peers should the self-teacher read? Measured on your model and problems, before training. Resumable.

    mopd preflight --config configs/quickstart.yaml
    """
    from mopd_nemo.data.load import judgeable, load_problems
    from mopd_nemo.preflight.contexts import CONTEXTS, check_group_size, name_of, parse_contexts
    from mopd_nemo.preflight.measure import Plan
    from mopd_nemo.run.rollouts import find_rollouts, one_of_each_problem, read_groups
    from mopd_nemo.verifiers.pool import VerifierPool

    config = _self_taught(load_config(config_file, overrides or []))
    names = parse_contexts(contexts) if contexts else tuple(dict.fromkeys((*CONTEXTS, name_of(config.peers))))
    limit = max_groups or 6 * problems
    plan = Plan(
        contexts=names,
        problems=problems,
        max_groups=limit,
        samples=samples or config.rollout.num_rollouts_per_prompt,
        seed=f"preflight/{config.seed}",
        order=config.seed,
    )
    source = find_rollouts(rollouts) if rollouts else None
    recorded = one_of_each_problem(read_groups(source))[:limit] if source else []
    train = load_problems(config, "train") if not source else []
    tasks = {row["task"] for group in recorded for row in group.rows} | {problem.task for problem in train}
    if source:
        _check_groups(plan, recorded, source, config)
    else:
        check_group_size(names, config.rollout.num_rollouts_per_prompt, "--contexts")
    with VerifierPool(config.verifier, tasks) as verifiers:
        train = judgeable(train, verifiers, config, "train")
        if not source:
            plan = _within_epoch(plan, len(train), config)
        directory = output or Path("runs") / f"preflight-{config.name}"
        store = _store(directory, config, plan, source, train, restart)
        found = _measure(config, plan, train, recorded, source, directory, store, verifiers)
    _finish(config, plan, found, store, source, directory)


def _self_taught(config: Config) -> Config:
    """The config with the student as its own teacher.

    Raises:
        UserError: its teacher reads no peers, or is another model.
    """
    if not uses(config.method, "peers.successes"):
        raise UserError(f"method={config.method} has no choice of peers to make; preflight is for method=mopd")
    if "peers" not in config.context:
        raise UserError(
            f"context=[{', '.join(config.context)}]: preflight compares peers, and this context shows none: add peers "
            "to it"
        )
    if config.divergence.contrast:
        raise UserError(
            f"divergence.contrast={config.divergence.contrast}: preflight measures contexts of one prompt, and a "
            "contrast reads two; set divergence.contrast=0"
        )
    if (kind := config.teacher.kind) in ("external", "server", "several"):
        raise UserError(
            f"teacher.kind={kind}: preflight measures what a self-teacher makes of peers; for another "
            "teacher set teacher.kind=live and model.path to its model"
        )
    return config.model_copy(update={"teacher": TeacherConfig(kind="live")})


def _check_groups(plan: Plan, recorded: Sequence[RecordedGroup], source: Path, config: Config) -> None:
    """Refuse a file in which a context is never complete, or that lacks what the config's context shows.

    Raises:
        UserError: names file and context.
    """
    from mopd_nemo.preflight.contexts import peers_needed

    if "privileged" in config.context and not any(row.get("privileged") for g in recorded for row in g.rows):
        raise UserError(
            f"{source}: its rows have no privileged text, which context=[{', '.join(config.context)}] shows: take "
            "privileged out of context, or leave out --rollouts"
        )
    outcomes = [[row["success"] for row in group.rows] for group in recorded]
    for name in plan.contexts:
        successes, failures = peers_needed(name)
        fitting = [o for o in outcomes if o.count(True) >= successes and o.count(False) >= failures]
        if not any(len(o) > successes + failures for o in fitting):
            raise UserError(
                f"{source}: none of its first {len(recorded)} groups has the peers of context {name} beside a target: "
                f"leave {name} out of --contexts, raise --max-groups, or give another file"
            )


def _within_epoch(plan: Plan, num_problems: int, config: Config) -> Plan:
    """No problem is sampled twice.

    Raises:
        UserError: there are fewer problems than a step takes.
    """
    size = config.rollout.num_prompts_per_step
    if num_problems < size:
        raise UserError(
            f"rollout.num_prompts_per_step={size} is more than the {num_problems} problems of "
            f"data.train={config.data.train}: lower it or add problems"
        )
    return replace(plan, max_groups=min(plan.max_groups, num_problems // size * size))


def _store(
    directory: Path, config: Config, plan: Plan, source: Path | None, train: Sequence[Problem], restart: bool
) -> RowStore:
    from mopd_nemo.preflight.contexts import CHOICES
    from mopd_nemo.run.resumable import RowStore, file_fingerprint, model_fingerprint, text_fingerprint

    rollout = config.rollout
    manifest = {
        "contexts": list(plan.contexts),
        "problems": plan.problems,
        "max_groups": plan.max_groups,
        "samples": plan.samples,
        "rollouts": file_fingerprint(source) if source else None,
        "data.train": text_fingerprint(str([(p.id, p.messages, p.answer) for p in train])),
        "model": model_fingerprint(config.model.path),
        "model.dtype": config.model.dtype,
        "model.chat_template_kwargs": config.model.chat_template_kwargs,
        "context": list(config.context),
        "feedback": config.feedback.model_dump(mode="json"),
        "peers": config.peers.model_dump(mode="json", exclude=set(CHOICES)),
        "rollout": rollout.model_dump(mode="json"),
        "verifier": config.verifier.model_dump(mode="json"),
        "seed": config.seed,
    }
    store = RowStore(directory, "written", ("problem", "context"), manifest, restart)
    if restart:
        (directory / "rollouts.jsonl").unlink(missing_ok=True)
    return store


def _measure(
    config: Config,
    plan: Plan,
    train: Sequence[Problem],
    recorded: Sequence[RecordedGroup],
    source: Path | None,
    directory: Path,
    store: RowStore,
    verifiers: Any,
) -> Survey:
    """Sample what is missing, then measure what is missing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from mopd_nemo.chat import with_prompt_ids
    from mopd_nemo.engines import make_engine
    from mopd_nemo.files import read_rows, write_rows
    from mopd_nemo.outlook import memory
    from mopd_nemo.preflight.measure import Survey, measure, sample_groups
    from mopd_nemo.run.rollouts import read_groups, rollout_records, to_rollout_group

    for _ in memory(config, lambda line: print(line, file=sys.stderr), phases=("generate",)):
        pass  # it is training that could not fit
    engine = make_engine(config)
    found = Survey(plan, engine.chat, config)
    file = source or directory / "rollouts.jsonl"
    rows = []
    if source is None and file.exists():
        rows, recorded = read_rows(file), read_groups(file)
    for _, block in groupby(recorded, key=lambda group: group.rows[0]["step"]):
        found.add([to_rollout_group(group, engine.chat, file) for group in block])
    if source is None:
        limit, escape = config.data.max_prompt_tokens, config.data.escape_control_tokens
        problems = with_prompt_ids(train, engine.chat, limit, escape_control_tokens=escape)
        with progress("sampling groups") as report:
            for groups in sample_groups(problems, engine, verifiers, config, plan, found):
                step = len(found.groups) // config.rollout.num_prompts_per_step
                rows += rollout_records(step, groups, None, engine.chat)
                write_rows(file, rows)
                share = max(len(found.groups) / plan.max_groups, len(found.cases) / plan.problems)
                report(share, f"{len(found.groups)} groups, {len(found.cases)} problems with every context")
    total = len(found.cases) * len(plan.measured)
    with progress("writing after each context") as report:
        for row in measure(found.cases, engine, verifiers, config, plan, store):
            store.add(row)
            report(len(store) / total, f"{row['context']}, {len(store)} of {total} problems and contexts")
    return found


def _finish(config: Config, plan: Plan, found: Survey, store: RowStore, source: Path | None, directory: Path) -> None:
    """The table, the finding and the files."""
    from mopd_nemo.preflight.figures import figures
    from mopd_nemo.preflight.output import HEAD, LEGEND, settings_text, table, write_result
    from mopd_nemo.preflight.rule import recommend

    result = figures(found, store, config, plan)
    recommendation = recommend(result)
    about = {"model": Path(config.model.path).name, "problems": source.name if source else Path(config.data.train).name}
    console = Terminal()
    print_table(
        HEAD,
        table(result),
        console,
        title=f"{result['num_problems']} problems (of {result['num_groups']} sampled), {plan.samples} answers each",
    )
    console.print("; ".join(f"{name}: {text}" for name, text in LEGEND.items()), style="dim")
    console.print()
    for sentence in recommendation.sentences:
        console.print(sentence)
    for caution in recommendation.cautions:
        console.print(f"Caution: {caution}", style="yellow")
    settings = settings_text(recommendation, config.peers)
    if settings:
        console.print(f"\n{settings}\n")
    for path in write_result(result, recommendation, settings, store, about, directory):
        console.print(str(path), soft_wrap=True, style="dim")
