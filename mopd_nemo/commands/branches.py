"""`mopd analyze branches`: where failed responses leave the successful ones, and whether the teacher objects there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopd_nemo.commands import Overrides, default_output, print_table, progress, scoring_config
from mopd_nemo.config import Config, PeersConfig, TeacherConfig, UserError
from mopd_nemo.config.schema import GenerationConfig
from mopd_nemo.terminal import Terminal

if TYPE_CHECKING:
    from mopd_nemo.analysis.branches.scoring import SignalStore
    from mopd_nemo.run.rollouts import RecordedGroup

UNRELATED = ", of other problems"
"""Ends the name of a context whose peers are those of other problems."""

Rollouts = Annotated[Path, typer.Option(help="Rollouts file (JSONL), or a run directory: its newest evaluation.")]
Contexts = Annotated[str, typer.Option(help="What teachers read, as in `mopd preflight`: 1s is one success peer.")]
Radius = Annotated[list[int], typer.Option(min=0, help="Tokens on each side of a point; may be repeated.")]
Student = Annotated[
    str | None,
    typer.Option(help="Student: the weights that sampled the rollouts. Default: the run's, else model.path."),
]
Teacher = Annotated[str | None, typer.Option(help="Teacher: model directory or hub name. Default: the student itself.")]
Output = Annotated[Path | None, typer.Option(help="Directory. Default: RUN_DIR/branches.")]
Settings = Annotated[
    Path | None, typer.Option("--config", "-c", help="Settings. Default: those of the run of the rollouts.")
]
NumPrompts = Annotated[int | None, typer.Option(min=1, help="Use only the first N prompts.")]
Restart = Annotated[bool, typer.Option("--restart", help="Drop earlier scores in --output.")]


def branches(
    rollouts: Rollouts,
    overrides: Overrides = None,
    contexts: Contexts = "1s,2s,1f,1s+1f,2s+1f",
    radius: Radius = [5, 1],  # noqa: B006 - typer copies it
    model: Student = None,
    teacher: Teacher = None,
    output: Output = None,
    config_file: Settings = None,
    num_prompts: NumPrompts = None,
    restart: Restart = False,
) -> None:
    """Where does a failed response leave the successful ones, and does the teacher object there? Resumable.

    mopd analyze branches --rollouts runs/a/rollouts/step_000001.jsonl --output runs/a/branches
    """
    from mopd_nemo.analysis.branches.figures import branch_figures
    from mopd_nemo.analysis.branches.scoring import SignalStore, attempts_of, contrasting, manifest_of
    from mopd_nemo.engines.models import load_chat
    from mopd_nemo.preflight.contexts import PLAIN, label_of, parse_contexts, peers_of
    from mopd_nemo.run.rollouts import find_rollouts, one_of_each_problem, read_groups

    source = find_rollouts(rollouts)
    names = parse_contexts(contexts)
    config = _config(source, model, teacher, config_file, overrides or [])
    directory = output or default_output(rollouts, "branches")
    read = one_of_each_problem(read_groups(source))[:num_prompts]
    groups = contrasting(read)
    if not groups:
        raise UserError(f"{source}: no problem in it has both a success and a failure, so nothing branches off")
    controls = {name: name + UNRELATED for name in names}
    peers = {name: peers_of(name, config.peers) for name in names}
    peers |= {controls[name]: peers[name].model_copy(update={"control": "unrelated_prompt"}) for name in names}
    labels = {name: label_of(name) for name in (PLAIN, *names)}
    labels |= {controls[name]: labels[name] + UNRELATED for name in names}
    store = SignalStore(directory, manifest_of(source, len(groups), config), restart)
    if any((group.key, name) not in store for group in groups for name in labels):
        _score(groups, source, peers, config, store)
    chat = load_chat(config.model)
    attempts = [attempts_of(group, {name: store[group.key, name] for name in labels}, chat) for group in groups]
    about = {
        "rollouts": f"{source.name}: {len(groups)} of {len(read)} problems have a success and a failure",
        "student": Path(config.model.path).name,
        "teacher": Path(teacher).name if teacher else "the student itself",
    }
    figures = branch_figures(attempts, list(labels), controls, radius)
    _show({"about": about, "labels": labels, "controls": controls, **figures}, directory)


def _config(
    source: Path, model: str | None, teacher: str | None, config_file: Path | None, overrides: Sequence[str]
) -> Config:
    """Settings with the student's weights, and with itself as the teacher unless another is named."""
    config = scoring_config(source, model or _checkpoint_of(source), config_file, overrides)
    if config.engine != "local" and model is None:
        raise UserError(f"{source}: engine={config.engine}: name weights that one process can load with --model DIR")
    told = TeacherConfig(kind="external", path=teacher) if teacher else TeacherConfig(kind="live")
    return config.model_copy(update={"teacher": told, "engine": "local", "generation": GenerationConfig()})


def _checkpoint_of(rollouts: Path) -> str | None:
    """The run's newest checkpoint that is no later than its rollouts; None where it has none, or no run is there."""
    from mopd_nemo.run.checkpoints import newest_up_to
    from mopd_nemo.run.directory import RunDirectory

    run = RunDirectory(rollouts.parent.parent)
    sampled_after = {file: step for step, file in run.rollout_files("eval").items()}
    sampled_after |= {file: step - 1 for step, file in run.rollout_files("step").items()}
    if rollouts not in sampled_after or not run.config_file.is_file():
        return None
    found = newest_up_to(run.checkpoints, sampled_after[rollouts])
    return None if found is None else str(found)


def _score(
    groups: Sequence[RecordedGroup], source: Path, peers: Mapping[str, PeersConfig], config: Config, store: SignalStore
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from mopd_nemo.analysis.branches.scoring import score_signals
    from mopd_nemo.engines import make_engine

    about = f"{len(groups)} problems in {len(peers) + 1} contexts"
    with progress("scoring") as report:
        score_signals(groups, source, peers, make_engine(config), config, store, lambda done: report(done, about))


def _show(result: Mapping[str, Any], directory: Path) -> None:
    from mopd_nemo.analysis.branches.figures import POINTS
    from mopd_nemo.analysis.branches.output import left_out, main_table, write_result

    for kind in POINTS:
        title, head, body = main_table(result, kind)
        print_table(head, body, title=title)
        if reason := left_out(result, kind):
            Terminal().print(reason, style="yellow")
    for path in write_result(result, directory):
        Terminal(stderr=True).print(str(path), soft_wrap=True)
