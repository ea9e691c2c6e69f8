"""Jobs on a real Slurm, with a fake driver and a fake Ray: what the launcher does around them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.integration.slurm.conftest import Launcher, Submission

pytestmark = pytest.mark.slow


def started(job: Submission, where: str = "") -> bool:
    return (job.directory / where / "calls").exists()


def calls(job: Submission, where: str = "") -> list[str]:
    """How the driver was called, attempt by attempt."""
    file = job.directory / where / "calls"
    return file.read_text().splitlines() if file.exists() else []


def finish(job: Submission, code: int = 0, where: str = "") -> None:
    job.wait_until(lambda: started(job, where), 20)
    (job.directory / where / "finish").write_text(str(code))


def ask_to_save(job: Submission, number: str) -> None:
    """What Slurm does some time before the limit: `--signal=B:USR1@SECONDS`."""
    job.cluster.command("scancel", "--batch", "--signal=USR1", number)


def test_two_nodes_run_one_driver_and_secrets_reach_nothing_else(faked: Launcher, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets.env"
    secrets.write_text("WANDB_API_KEY=d41d8cd98f00\n")
    secrets.chmod(0o600)
    with faked.site.open("a") as site:
        site.write(f"secrets: {secrets}\noptions: ['--comment=two words']\n")
    job = faked.submit("--nodes", "2")
    job.wait_until(lambda: started(job))
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for node in faked.cluster.nodes for pid in node.processes()]
    finish(job)
    assert job.wait() == "COMPLETED"
    assert calls(job) == [f"-m mopd_nemo train --config {job.directory}/job/config.yaml run_dir={job.directory} seed=0"]
    assert "complete" in job.output() and "error" not in job.output()
    assert "node node1 at" in job.log("node1.log") and "node node2 at" in job.log("node2.log")

    environment = (job.directory / "environment").read_text()
    assert f"RAY_ADDRESS={faked.cluster.nodes[0].address}:1200" in environment
    assert "HF_HUB_OFFLINE=1" in environment and "SLURM_" not in environment
    assert "WANDB_API_KEY=d41d8cd98f00" in environment
    (job.directory / "environment").unlink()
    seen = [file.read_bytes() for file in job.directory.rglob("*") if file.is_file() and "code" not in file.parts]
    shown = faked.cluster.command("scontrol", "show", "job", job.job).encode()
    assert b"Comment=two words" in shown
    assert len(seen) > 8 and len(lines) > 8
    assert not [text for text in (*seen, *lines, shown) if b"d41d8cd98f00" in text]


def test_failure_of_the_driver_is_the_job_s_and_takes_those_after_it_out_of_the_queue(faked: Launcher) -> None:
    job = faked.submit("--chain", "2")
    first = job.jobs[0]
    finish(job, code=3)
    assert job.wait() == "CANCELLED"
    assert faked.cluster.state(first) == "FAILED"
    assert "FAILED: node node1: driver ended with exit code 3" in job.output()
    assert "driver.log" in job.output()


def test_death_of_ray_on_a_node_ends_the_job_quickly_and_names_the_node(faked: Launcher) -> None:
    job = faked.submit("--nodes", "2")
    job.wait_until(lambda: started(job))
    job.wait_until(lambda: faked.cluster.nodes[1].kill("sleep infinity") > 0)
    before = time.monotonic()
    assert job.wait() == "FAILED"
    assert time.monotonic() - before < 20
    assert "FAILED: node node2: Ray worker has ended with exit code 137" in job.output()
    assert "node2.log" in job.output()


def test_node_that_falls_silent_ends_the_job_and_is_named(faked: Launcher) -> None:
    job = faked.submit("--nodes", "2", "cluster.silent_seconds=6")
    job.wait_until(lambda: started(job))
    node = faked.cluster.nodes[1]
    mine = [pid for pid in node.processes() if b"node.sh" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in mine:
        os.kill(pid, signal.SIGSTOP)  # as a node that hangs: nothing ends, nothing answers
    before = time.monotonic()
    try:
        job.wait_until(lambda: "FAILED" in job.output(), 40)
        assert time.monotonic() - before < 20
        assert "FAILED: node node2: has given no sign of life for" in job.output()
    finally:
        for pid in mine:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert job.wait() == "FAILED"


def test_log_directory_that_is_not_shared_is_named_with_the_node(faked: Launcher) -> None:
    node = faked.cluster.nodes[1]
    faked.cluster.hide(node, faked.directory)
    try:
        job = faked.submit("--nodes", "2", "cluster.silent_seconds=6")
        assert job.wait() == "FAILED"
    finally:
        faked.cluster.show(node, faked.directory)
    assert "node node2 does not see" in job.output()
    assert "the log directory is not shared by all nodes" in job.output()
    assert not started(job)


def test_signal_at_the_limit_saves_and_queues_again_and_a_stop_file_only_saves(faked: Launcher) -> None:
    job = faked.submit()
    job.wait_until(lambda: started(job))
    ask_to_save(job, job.job)
    job.wait_until(lambda: len(calls(job)) == 2)
    assert calls(job)[1] == f"-m mopd_nemo train --resume {job.directory}"
    (job.directory / "job" / "logs" / "latest" / "stop").touch()
    assert job.wait() == "COMPLETED"
    assert "saved and stopped as asked" in job.output()
    logs = sorted(path.name for path in (job.directory / "job" / "logs").glob("*-attempt-*"))
    assert logs == [f"{job.job}-attempt-0", f"{job.job}-attempt-1"]


def test_run_that_met_its_own_deadline_is_queued_again_while_it_brings_checkpoints(faked: Launcher) -> None:
    job = faked.submit()
    job.wait_until(lambda: started(job))
    (job.directory / "checkpoints" / "step_000003").mkdir(parents=True)
    finish(job, code=128 + signal.SIGUSR1)
    assert job.wait() == "FAILED"  # the second attempt ends so too, with no checkpoint of its own
    assert (
        len(calls(job)) == 2
        and "saved at step_000003, written" in job.output()
        and "queueing the job again" in job.output()
    )
    assert "no new checkpoint in this attempt" in job.output()


def test_interactive_job_has_ray_and_can_be_attached_to(faked: Launcher) -> None:
    job = faked.submit("--nodes", "2", "--task", "interactive")
    job.wait_until(lambda: "Ray is up at" in job.log("driver.log"))
    logs = job.directory / "job" / "logs" / "latest"
    for arguments, node in (("", "node1"), ("node2", "node2")):
        command = ["script", "--quiet", "--return", "--command", f"{logs}/attach.sh {arguments}", "/dev/null"]
        shell = subprocess.run(
            command, input="hostname\nexit\n", capture_output=True, text=True, env=faked.cluster.environment, timeout=30
        )
        assert node in shell.stdout.split(), shell
    (logs / "stop").touch()
    assert job.wait() == "COMPLETED"


def test_slurm_itself_sends_the_signal_before_the_limit(faked: Launcher) -> None:
    job = faked.submit("cluster.time_limit=0:01:10", "cluster.stop_minutes=1")
    job.wait_until(lambda: "the time limit is near" in job.output(), 90)
    job.wait_until(lambda: len(calls(job)) == 2)
    finish(job)
    assert job.wait() == "COMPLETED"


def test_seeds_are_a_job_array_with_a_run_directory_each(faked: Launcher) -> None:
    job = faked.submit("--seeds", "0,3")
    for seed in (0, 3):
        finish(job, where=f"seed={seed}")
    job.wait_until(lambda: not faked.cluster.command("squeue", "-h"))
    assert job.wait() == "COMPLETED"
    for seed in (0, 3):
        (call,) = calls(job, f"seed={seed}")
        assert call.endswith(f"run_dir={job.directory}/seed={seed} seed={seed}")


def test_chain_goes_on_where_the_job_before_it_saved(faked: Launcher) -> None:
    job = faked.submit("--chain", "3")
    first, second, _ = job.jobs
    job.wait_until(lambda: started(job))
    assert faked.cluster.state(second) == "PENDING"
    ask_to_save(job, first)
    job.wait_until(lambda: len(calls(job)) == 2)
    assert faked.cluster.state(first) == "COMPLETED"
    assert "--resume" in calls(job)[1]
    finish(job)
    assert job.wait() == "COMPLETED"
    assert f"complete already, by job {second}" in job.output() and len(calls(job)) == 2


def test_container_is_asked_of_pyxis(faked: Launcher) -> None:
    """With a plugin that knows pyxis' options and starts no container."""
    if not faked.cluster.knows_pyxis:
        pytest.skip("no stand-in for pyxis: it needs gcc and libslurm-dev")
    with faked.site.open("a") as site:
        site.write(f"image: registry#image:tag\nmounts: [{faked.directory}]\n")
    job = faked.submit()
    finish(job)
    assert job.wait() == "COMPLETED"
    environment = (job.directory / "environment").read_text()
    assert "PYXIS_CONTAINER_IMAGE=registry#image:tag" in environment
    assert f"{faked.directory}:{faked.directory}," in environment
    assert f"PYXIS_CONTAINER_NAME=mopd-{job.job}" in environment
    assert "PYXIS_CONTAINER_ENV=TOKENIZERS_PARALLELISM,HF_HUB_OFFLINE" in environment


def test_slurm_s_refusal_names_the_key_of_the_site_file(faked: Launcher) -> None:
    for key, value, remedy in (
        ("partition", "nowhere", "partition in the site file; there are: batch, closed"),
        ("partition", "closed", "account in the site file"),
    ):
        faked.write_site(**{key: value})
        done = faked.try_submit("--output", str(faked.directory / value))
        assert done.returncode == 2
        assert remedy in done.stderr, done.stderr
        assert not (faked.directory / value).exists()
