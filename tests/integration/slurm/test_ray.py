"""A real run on a real Ray cluster over two nodes of a real Slurm."""

from __future__ import annotations

import importlib.util
import time

import pytest

from mopd_nemo.files import read_rows
from mopd_nemo.run.checkpoints import checkpoints
from mopd_nemo.run.directory import RunDirectory
from tests.integration.slurm.conftest import Launcher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install ray"),
]


def test_run_on_two_ray_nodes_is_saved_queued_again_resumed_and_ended_by_the_death_of_a_node(
    launcher: Launcher,
) -> None:
    job = launcher.submit("--nodes", "2", "train.num_steps=500", "train.checkpoint_every=500")
    run = RunDirectory(job.directory)

    def steps() -> list[int]:
        return [row["step"] for row in read_rows(run.metrics_file)] if run.metrics_file.exists() else []

    job.wait_until(lambda: len(steps()) >= 2, 120)
    assert {"node node1 answers", "node node2 answers"} <= set(job.log("node1.log").splitlines())
    launcher.cluster.command("scancel", "--batch", "--signal=USR1", job.job)
    job.wait_until(lambda: "queueing the job again" in job.output(), 60)
    (saved,) = checkpoints(run.checkpoints)
    first = steps()
    assert saved.name == f"step_{len(first):06d}"

    job.wait_until(lambda: len(steps()) > len(first), 120)
    assert steps() == list(range(1, len(steps()) + 1))
    assert launcher.cluster.nodes[1].kill("raylet")
    before = time.monotonic()
    assert job.wait() == "FAILED"
    assert time.monotonic() - before < 60
    assert "FAILED: node node2: Ray worker has ended" in job.output()


def test_quickstart_on_two_ray_nodes_completes(launcher: Launcher) -> None:
    job = launcher.submit("--nodes", "2", "train.num_steps=2")
    assert job.wait(seconds=180) == "COMPLETED"
    run = RunDirectory(job.directory)
    assert [row["step"] for row in read_rows(run.metrics_file)] == [1, 2]
    assert run.report_file.exists()
