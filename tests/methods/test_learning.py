"""Each method for a few steps on the embedded model, through the whole loop: same budget, real learning."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import fmean

import pytest
from rich.console import Console

from mopd_nemo.commands.sample import complete
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.files import read_rows
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.trainer import Trainer
from tests.conftest import EMBEDDED, QUICKSTART

FEW = [
    "rollout.num_prompts_per_step=8",
    "rollout.num_rollouts_per_prompt=6",
    "data.num_train=32",
    "train.num_steps=4",
    "train.eval_every=0",
    "optimizer.warmup_steps=0",
]
TEACHER = f"teacher.path={EMBEDDED}"


def run(path: Path, *overrides: str) -> RunDirectory:
    trainer = Trainer.new(load_config(QUICKSTART, [f"run_dir={path}", *FEW, *overrides]), Console(file=io.StringIO()))
    assert trainer.fit()
    return trainer.run


def settings_of(path: Path, settings: list[str]) -> list[str]:
    """With completions written where they are asked for."""
    file = path / "completions.jsonl"
    named = [setting.replace("COMPLETIONS", str(file)) for setting in settings]
    if named != settings:
        complete(QUICKSTART, file, ["method=gkd", TEACHER, *FEW])
    return named


@pytest.mark.parametrize(
    "method",
    [
        ["mopd"],
        ["mopd", "policy_gradient.weight=0.5", "train.num_updates_per_step=2"],
        ["mopd", "peers.failures=1", "divergence.contrast=0.5", "divergence.weights=sharper"],
        ["mopd", "divergence.targets=failures", "divergence.weights=student_entropy", "divergence.entry_clip=0.05"],
        ["sdpo"],
        ["opd", TEACHER],
        ["gkd", TEACHER, "gkd.completions=COMPLETIONS"],
        ["grpo"],
        ["dpo"],
        ["simpo"],
        ["verified_sft"],
        ["suppress"],
        ["mopd", "reference.kl=0.1"],
    ],
    ids=lambda method: "-".join(method[:1] + [item.split("=")[0] for item in method[1:]]),
)
def test_each_method_runs_at_the_same_rollout_budget(tmp_path: Path, method: list[str]) -> None:
    done = run(tmp_path / "run", f"method={method[0]}", *settings_of(tmp_path, method[1:]))
    rows = read_rows(done.metrics_file)
    assert len(rows) == 4
    assert all(row["grad_norm"] > 0 and row["update/skipped"] == 0 for row in rows if "grad_norm" in row)
    for step in range(1, 5):
        rollouts = read_rows(done.rollouts_file(step))
        assert len(rollouts) == 48
        taught = [row for row in rollouts if row["teacher_prompt"] is not None]
        assert bool(taught) == (method[0] in ("mopd", "sdpo", "opd"))
    if method[0] in ("grpo", "simpo", "verified_sft", "gkd"):
        assert fmean(row["seconds/score"] for row in rows) < 0.01, "no teacher, no teacher's cost"


@pytest.mark.parametrize("name", ["mopd", "sdpo", "opsd", "sdft", "sibling"])
def test_each_method_of_configs_trains_a_tiny_model(name: str, tmp_path: Path, random_model: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"defaults: [{QUICKSTART}, {QUICKSTART.parent}/methods/{name}.yaml]\n")
    settings = [f"run_dir={tmp_path}/run", *FEW, "train.num_steps=2", f"model.path={random_model}"]
    if name in ("mopd", "sdpo", "sibling"):  # a random model has no successes
        settings[-1] = f"model.path={EMBEDDED}"
    trainer = Trainer.new(load_config(config, settings), Console(file=io.StringIO()))
    assert trainer.fit()
    rows = read_rows(trainer.run.metrics_file)
    assert len(rows) == 2 and all(row["signal"] > 0 and row["grad_norm"] > 0 for row in rows)


def test_verified_sft_raises_the_success_rate(tmp_path: Path) -> None:
    rows = read_rows(
        run(tmp_path / "run", "method=verified_sft", "train.num_steps=12", "optimizer.learning_rate=3e-4").metrics_file
    )
    assert fmean(row["success_rate"] for row in rows[-3:]) > fmean(row["success_rate"] for row in rows[:3]) + 0.1


def test_gkd_learns_what_the_teacher_wrote(tmp_path: Path) -> None:
    file = tmp_path / "completions.jsonl"
    complete(QUICKSTART, file, ["method=gkd", TEACHER, *FEW])
    done = run(tmp_path / "run", "method=gkd", TEACHER, f"gkd.completions={file}", "train.num_steps=1")
    written = {row["problem"]: [r["text"] for r in row["responses"]] for row in read_rows(file)[1:]}
    for row in read_rows(done.rollouts_file(1)):
        assert row["response"] == written[row["problem"]][row["rollout"]]


def test_gkd_in_two_stages_needs_every_problem_and_has_it(tmp_path: Path) -> None:
    """11 problems, 4 a step: an epoch leaves 3 out, each epoch others. The teacher has written for all of them."""
    file = tmp_path / "completions.jsonl"
    few = [*FEW, "data.num_train=11", "rollout.num_prompts_per_step=4", "rollout.num_rollouts_per_prompt=2"]
    complete(QUICKSTART, file, ["method=gkd", TEACHER, *few])
    settings = ["method=gkd", TEACHER, f"gkd.completions={file}", *few[-3:], "train.num_steps=8"]
    done = run(tmp_path / "run", *settings)
    drawn = {row["problem"] for step in range(1, 9) for row in read_rows(done.rollouts_file(step))}
    assert len(drawn) == 11, "also those that the first epoch leaves out"
    assert all(row["loss"] > 0 for row in read_rows(done.metrics_file))

    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:9]))  # the header and 8 problems: what an epoch of training draws
    with pytest.raises(UserError, match="no completions of 3 of the 11 problems"):
        run(tmp_path / "short", *settings)


def test_dpo_resumes_with_its_reference(tmp_path: Path) -> None:
    """The reference is the initial model, not the student of the moment of the resume."""
    whole = run(tmp_path / "whole", "method=dpo")
    part = run(tmp_path / "part", "method=dpo", "train.num_steps=2")
    assert Trainer.resumed(part, ["train.num_steps=4"], Console(file=io.StringIO())).fit()
    losses = [[row["loss"] for row in read_rows(done.metrics_file)] for done in (whole, part)]
    assert losses[0] == losses[1]
