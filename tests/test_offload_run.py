"""Runs whose teacher is in host memory: those of a teacher on the device, however they are stopped and changed."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mopd_nemo.config.load import load_config
from mopd_nemo.run.checkpoints import checkpoints
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.trainer import Trainer
from tests.conftest import QUICKSTART, Mopd, make_random_model
from tests.test_trainer import SMALL, assert_same_run, finish_through_kills, new_run, start, without_times

SETTINGS = [
    "model.dtype=bfloat16",
    "rollout.lag=1",
    "logging.save_token_signal_every=2",
    "train.num_updates_per_step=2",
]


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with rollouts in flight at every moment, and two updates a step with one head."""
    return new_run(tmp_path_factory.mktemp("resident") / "run", *SETTINGS)


def test_a_whole_run_is_the_same_to_the_bit(resident: RunDirectory, tmp_path: Path, mopd: Mopd) -> None:
    run = new_run(tmp_path / "run", *SETTINGS, "teacher.offload=true")
    assert run.read_config().teacher.offload
    for step in (2, 4, 6):
        with np.load(run.signal_file(step)) as got, np.load(resident.signal_file(step)) as expected:
            assert all(np.array_equal(got[name], expected[name]) for name in expected)
    for of_one in (resident, run):
        for file in of_one.rollouts.glob("signal_*"):
            file.unlink()
    assert_same_run(run, resident)
    last = checkpoints(run.checkpoints)[-1]
    words = ("--config", str(QUICKSTART), "--checkpoint", str(last), *SMALL, "teacher.offload=true")
    code, printed = mopd("eval", *words)
    assert code == 0 and "mean@" in printed, printed


def test_a_killed_run_continues_with_the_other_setting(resident: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    process = start("--config", str(QUICKSTART), f"run_dir={run.path}", *SMALL, *SETTINGS, "teacher.offload=true")
    finish_through_kills(process, run, {3: "teacher.offload=false", 5: "teacher.offload=true"})
    assert without_times(run.rows(run.metrics_file)) == without_times(resident.rows(resident.metrics_file))
    last, other = checkpoints(run.checkpoints)[-1], checkpoints(resident.checkpoints)[-1]
    for weights in ("model.safetensors", "teacher/model.safetensors", "optimizer.pt"):
        assert (last / weights).read_bytes() == (other / weights).read_bytes(), weights


def test_one_of_several_teachers_is_in_host_memory(tmp_path: Path) -> None:
    """Each with its own head, in updates whose micro-batches hold rows of both."""
    data = tmp_path / "problems.jsonl"
    rows = [f'{{"id": "{n}", "prompt": "{n}+1?", "answer": "{n + 1}", "task": "arithmetic"' for n in range(4)]
    data.write_text("".join(f'{row}, "teacher": "{"ab"[n % 2]}"}}\n' for n, row in enumerate(rows)))
    models = [make_random_model(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    metrics = []
    for offload in ("false", "true"):
        teachers = [
            f"teachers.a={{kind: external, path: {models[0]}, offload: {offload}}}",
            f"teachers.b={{kind: external, path: {models[1]}}}",
        ]
        small = [word for word in SMALL if not word.startswith("peers.")]
        settings = ["method=opd", f"model.path={models[1]}", f"data.train={data}", f"data.eval={data}", *teachers]
        path = tmp_path / offload
        config = load_config(QUICKSTART, [f"run_dir={path}", *small, *settings, "train.num_steps=2"])
        trainer = Trainer.new(config, Console(file=io.StringIO()))
        assert trainer.fit()
        metrics.append(without_times(trainer.run.rows(trainer.run.metrics_file)))
    assert metrics[0] == metrics[1] and metrics[0][0]["loss"] > 0
