"""Runs in trouble: damaged checkpoints, two processes, no room, a closed terminal. Resumed, each equals a whole run."""

import fcntl
import io
import os
import pty
import resource
import shutil
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from mopd_nemo.commands.export import export
from mopd_nemo.commands.train import FULL, run_training
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.files import WriteError, read_rows
from mopd_nemo.run.checkpoints import checkpoints, fault
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.trainer import Trainer
from tests.conftest import QUICKSTART
from tests.test_trainer import assert_same_run, resume, start, wait_for_step

SMALL = [
    "rollout.num_prompts_per_step=2",
    "rollout.num_rollouts_per_prompt=4",
    "rollout.max_response_tokens=32",
    "data.num_train=8",
    "train.num_steps=6",
    "train.eval_every=0",
    "train.checkpoint_every=2",
]


def new_run(path: Path, *overrides: str) -> RunDirectory:
    """A whole run in this process."""
    trainer = Trainer.new(load_config(QUICKSTART, [f"run_dir={path}", *SMALL, *overrides]), Console(file=io.StringIO()))
    assert trainer.fit()
    return trainer.run


def start_new(path: Path) -> subprocess.Popen[str]:
    return start("--config", str(QUICKSTART), f"run_dir={path}", *SMALL)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that nobody disturbed."""
    return new_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(whole_run: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A copy of it."""
    shutil.copytree(whole_run.path, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "teacher/model.safetensors", "trainer.json"])
def test_a_run_goes_on_from_the_newest_intact_checkpoint(name: str, whole_run: RunDirectory, run: RunDirectory) -> None:
    newest = run.checkpoints / "step_000006"
    file = newest / name
    os.truncate(file, file.stat().st_size // 2)
    shutil.copytree(run.checkpoints / "step_000004", run.checkpoints / "step_best")
    (run.rollouts / "my_notes.jsonl").write_text("mine\n")
    screen = io.StringIO()
    assert Trainer.resumed(run, (), Console(file=screen)).fit()
    assert f"checkpoint {newest} is passed over: {name} has" in screen.getvalue()
    (run.rollouts / "my_notes.jsonl").unlink()
    assert_same_run(whole_run, run)
    assert {fault(path) for path in checkpoints(run.checkpoints)} == {""}


def test_no_intact_checkpoint_is_an_error_with_a_remedy(run: RunDirectory) -> None:
    for path in checkpoints(run.checkpoints):
        (path / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is intact \(step_000006: optimizer.pt: .*put back one that is"):
        resume(run)
    RunDirectory(run.path).claim()  # it has been released


def test_a_second_process_is_refused(run: RunDirectory) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.path.rglob("*.*") if path.is_file() and path.name != "run.lock"}

    before = contents()
    run.claim()
    second = start("--resume", str(run.path), "train.num_steps=9")
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2 and "Traceback" not in output
    assert f"process {os.getpid()} on host {socket.gethostname()} trains here since" in " ".join(output.split())
    assert contents() == before


def test_two_new_runs_in_one_place_at_the_same_time(tmp_path: Path) -> None:
    both = [start_new(tmp_path / "run") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], outputs
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_an_unwritable_place_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write there"):
        new_run(tmp_path / "file" / "run", "model.path=/no/such/model")


@pytest.fixture
def small_disk(whole_run: RunDirectory, tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for a checkpoint and a half."""
    path = tmp_path / "disk"
    path.mkdir()
    size = sum(file.stat().st_size for file in checkpoints(whole_run.checkpoints)[-1].rglob("*"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "none", str(path)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs root and mount")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_the_estimate_of_the_first_checkpoint(whole_run: RunDirectory) -> None:
    saved = sum(file.stat().st_size for file in checkpoints(whole_run.checkpoints)[-1].rglob("*"))
    engine = LocalEngine(whole_run.read_config())
    assert 0.9 * saved < engine.checkpoint_bytes() < 1.1 * saved


def grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)


def test_a_disk_without_room_for_the_next_checkpoint(
    whole_run: RunDirectory, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(small_disk / "run")
    assert run_training(QUICKSTART, None, [f"run_dir={run.path}", *SMALL]) == FULL
    said = " ".join(capsys.readouterr().out.split())
    assert "WARNING: the next checkpoint will not be written: a checkpoint needs" in said
    assert f"{run.checkpoints}/step_000004: not written: a checkpoint needs" in said and "make room" in said
    assert f"continue mopd train --resume {run.path}" in said
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_000002"]
    grow(small_disk)
    resume(run)
    assert_same_run(whole_run, run)


def test_a_disk_that_is_full_in_the_middle_of_the_first_checkpoint(
    whole_run: RunDirectory, small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(small_disk / "run")
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free * 3 // 4))
    monkeypatch.setattr(LocalEngine, "checkpoint_bytes", lambda _: 0)  # as with engine: nemo
    assert run_training(QUICKSTART, None, [f"run_dir={run.path}", *SMALL]) == FULL
    said = " ".join(capsys.readouterr().out.split())
    assert (
        ".partial-000002: cannot be written: No space left on device" in said
        and "of the checkpoint were written" in said
    )
    assert list(run.checkpoints.iterdir()) == []
    (small_disk / "other").unlink()
    grow(small_disk)
    resume(run)
    assert_same_run(whole_run, run)


def test_a_disk_that_is_full_when_a_row_is_written(
    whole_run: RunDirectory, small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(small_disk / "run")
    trained = Trainer._train_step

    def fill(trainer: Trainer, step: int) -> None:
        if step == 4:
            with (small_disk / "other").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
        trained(trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", fill)
        assert run_training(QUICKSTART, None, [f"run_dir={run.path}", *SMALL]) == FULL
    said = " ".join(capsys.readouterr().out.split())
    assert "step_000004.jsonl: cannot be written: No space left on device; 0 B are free there" in said
    assert "no report:" in said and f"mopd train --resume {run.path}" in said
    assert not list(run.path.rglob("*.tmp"))
    (small_disk / "other").unlink()
    grow(small_disk)
    resume(run)
    assert_same_run(whole_run, run)


def test_a_limit_of_file_sizes(whole_run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        code = run_training(QUICKSTART, None, [f"run_dir={run.path}", *SMALL])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = " ".join(capsys.readouterr().out.split())
    assert code == FULL and "a file would be larger than 1.05 MB, this process's limit: raise it (ulimit -f)" in said
    resume(run)
    assert_same_run(whole_run, run)


def test_a_run_whose_terminal_is_closed_saves(whole_run: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    ours, theirs = pty.openpty()

    def in_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup

    process = subprocess.Popen(
        [sys.executable, "-m", "mopd_nemo", "train", "--config", str(QUICKSTART), f"run_dir={run.path}", *SMALL],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=in_the_terminal,
    )
    os.close(theirs)
    wait_for_step(process, run, 1)
    os.close(ours)
    assert process.wait(120) == 128 + signal.SIGHUP
    assert len(read_rows(run.metrics_file)) < 6 and run.report_file.exists()
    resume(run)
    assert_same_run(whole_run, run)


def test_another_model_or_no_model_is_a_message(run: RunDirectory, random_model: Path) -> None:
    with pytest.raises(UserError, match="step_000006: intact, but it does not fit this run's settings"):
        Trainer.resumed(run, [f"model.path={random_model}", "train.num_steps=8"], Console(file=io.StringIO())).fit()


def test_an_export_to_a_full_disk_leaves_nothing(run: RunDirectory, small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - (1 << 20)))
    with pytest.raises(WriteError, match=r"--output .*/out: not written: .*No space left on device.*; .*B were free"):
        export(run.path, small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["other"]
