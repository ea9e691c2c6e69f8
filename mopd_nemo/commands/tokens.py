"""`mopd analyze tokens`: the same response under several contexts, token by token."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopd_nemo.commands import Overrides, check_output
from mopd_nemo.config import Config, TeacherConfig, UserError
from mopd_nemo.config.schema import GenerationConfig, LoraConfig
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.terminal import Terminal

if TYPE_CHECKING:
    from mopd_nemo.engines.base import Engine

RunDir = Annotated[Path, typer.Argument(help="Run directory.")]
Step = Annotated[int | None, typer.Option(help="Training step. Default: the last recorded one.")]
Evaluation = Annotated[bool, typer.Option("--evaluation", help="The held-out samples after this step instead.")]
Contexts = Annotated[str, typer.Option(help="What teachers read, as in `mopd preflight`: 1s is one success peer.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Weights to score with. Default: the run's newest that are no later than the rollouts."),
]
Model = Annotated[
    str | None, typer.Option(help="Score with this model directory or hub name instead of the run's weights.")
]


def tokens(
    run_dir: RunDir,
    problem: Annotated[str, typer.Option(help="Problem id; `mopd inspect RUN_DIR --step N` lists them.")],
    overrides: Overrides = None,
    step: Step = None,
    evaluation: Evaluation = False,
    contexts: Contexts = "1s,2s+1f,1f",
    rollout: Annotated[list[int] | None, typer.Option(help="Only this rollout; may be repeated.")] = None,
    checkpoint: Checkpoint = None,
    model: Model = None,
    top: Annotated[int, typer.Option(min=1, max=50, help="Likeliest tokens to show of each model.")] = 5,
    output: Annotated[Path | None, typer.Option(help="HTML file. Default: in RUN_DIR/tokens.")] = None,
) -> None:
    """What would peers of this and that kind make of the same response? Every token, coloured by log Q - log P.

    The page has everything; the terminal shows the rollouts that --rollout names, and else a summary.

    mopd analyze tokens runs/a --step 11 --problem arithmetic-17 --contexts 1s,2s+1f,1f
    """
    from mopd_nemo.analysis.tokens import Column, TokenView, names_of, score_contexts, write_token_page
    from mopd_nemo.commands.token_view import show_tokens, summarise_tokens
    from mopd_nemo.peers.render import build_contexts
    from mopd_nemo.preflight.contexts import label_of, parse_contexts, peers_of
    from mopd_nemo.run.rollouts import RecordedRun, to_rollout_group

    names = parse_contexts(contexts)
    run = RunDirectory.open(run_dir)
    recorded = RecordedRun.find(run, step, evaluation)
    group = recorded.group(problem)
    known = [row["rollout"] for row in group.rows]
    if unknown := sorted(set(rollout or ()) - set(known)):
        raise UserError(f"--rollout {unknown[0]}: {problem} has rollouts {known[0]} to {known[-1]}")
    slug = re.sub(r"[^\w.=+-]+", "-", problem)
    file = output or run.path / "tokens" / f"{recorded.file.stem}-{slug}.html"
    check_output(file, "--output")
    config, engine, weights = _run_engine(run, recorded.policy_step, checkpoint, model, overrides or [])
    rebuilt = to_rollout_group(group, engine.chat, recorded.file)
    seed = f"peers/{config.seed}/{recorded.step}"
    built = {name: build_contexts([rebuilt], engine.chat, peers_of(name, config.peers), seed) for name in names}
    found = score_contexts([rebuilt], built, engine, config, top)
    views = []
    for i, row in enumerate(group.rows):
        columns = [
            Column(label_of(name), signal, "" if built[name][0][i].complete else "(the group has no more of these)")
            for name in names
            if (signal := found[name][0][i]) is not None
        ]
        if columns and (not rollout or row["rollout"] in rollout):
            views.append(TokenView(row, tuple(engine.chat.token_texts(row["response_ids"])), tuple(columns)))
    if not views:
        raise UserError(f"{problem}, step {recorded.step}: no rollout has a peer that {contexts} could show")
    about = {"problem": problem, "rollouts": recorded.described, "weights": weights, "divergence": _divergence(config)}
    texts = names_of(views, engine.chat)
    written = write_token_page(file, views, texts, about, str(group.rows[0]["prompt"]))
    console = Terminal()
    if rollout:
        show_tokens(views, texts, console)
    else:
        summarise_tokens(views, console)
    Terminal(stderr=True).print(f"weights: {weights}", soft_wrap=True)
    Terminal(stderr=True).print(str(written), soft_wrap=True)


def _run_engine(
    run: RunDirectory, policy_step: int, checkpoint: Path | None, model: str | None, overrides: Sequence[str]
) -> tuple[Config, Engine[Any], str]:
    """A run's settings, its engine with the weights that are asked for, and these in words.

    A method without a teacher gets the student itself, as the reader of its own peers.
    """
    from mopd_nemo.run.checkpoints import fault, load_checkpoint, newest_up_to

    config = run.load_config(overrides) if overrides else run.read_config()
    changes: dict[str, Any] = {"generation": GenerationConfig()}
    if (kind := config.teacher.kind) in ("server", "several"):
        raise UserError(
            f"{run.path}: teacher.kind={kind}: no one model here reads every context. Add settings that name one: "
            "teacher.kind=live for the student, or teacher.kind=external and teacher.path=DIR"
        )
    if config.teacher.kind == "none":
        changes["teacher"] = TeacherConfig(kind="live")
    if model is not None:
        if checkpoint is not None:
            raise UserError("--model and --checkpoint both name weights: give one of them")
        student = config.model.model_copy(update={"path": model})
        changes |= {"model": student, "lora": LoraConfig(), "engine": "local"}
    elif config.engine != "local":
        raise UserError(
            f"{run.path}: engine={config.engine} tells no signal of single tokens: name weights that one process can "
            "load with --model DIR"
        )
    else:
        checkpoint = checkpoint or newest_up_to(run.checkpoints, policy_step)
    if checkpoint is not None and (problem := fault(checkpoint)):
        raise UserError(f"--checkpoint {checkpoint}: {problem}")
    config = config.model_copy(update=changes)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from mopd_nemo.engines import make_engine

    engine = make_engine(config)
    if checkpoint is None:
        of_run = "" if model else f"; the run had those after step {policy_step} then"
        return config, engine, f"{config.model.path}, before training{of_run}"
    load_checkpoint(checkpoint, engine)
    return config, engine, f"{checkpoint.name}; the run had the weights after step {policy_step} then"


def _divergence(config: Config) -> str:
    """The divergence of each token, in words."""
    divergence = config.divergence
    kind = "reverse_kl on full" if divergence.support == "sampled" else f"{divergence.kind} on {divergence.support}"
    return f"{kind}, teacher {config.teacher.kind}"
