import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mopd_nemo.config import Config, UserError
from mopd_nemo.files import DamagedError, append_row, read_rows, write_rows
from mopd_nemo.run import directory as module
from mopd_nemo.run.directory import RunDirectory

HOLD = """
import os, sys, time
from pathlib import Path
from mopd_nemo.run.directory import RunDirectory
RunDirectory(Path(sys.argv[1])).claim()
if len(sys.argv) > 2 and os.fork() == 0:
    os.setsid()
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece: two processes write here
    time.sleep(60)
os.write(1, b"held\\n")
time.sleep(60)
"""


@contextmanager
def holder(path: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed a run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), *more], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while process.stdout.readline() != "held\n":
            assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.communicate()


def test_forget_drops_later_steps_everywhere(tmp_path: Path) -> None:
    run = RunDirectory.at(Config(run_dir=str(tmp_path / "run")))
    run.create(Config())
    for file in (run.metrics_file, run.eval_file):
        write_rows(file, [{"step": step} for step in range(5)])
    for step in range(5):
        write_rows(run.rollouts_file(step), [])
        write_rows(run.rollouts_file(step, "eval"), [])
    run.forget_after(2)
    assert read_rows(run.metrics_file) == read_rows(run.eval_file) == [{"step": step} for step in range(3)]
    assert len(list(run.rollouts.iterdir())) == 6


def test_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir=.*cannot write there: .*; choose another run_dir"):
        RunDirectory(tmp_path / "file" / "run").claim()


def test_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory.open(tmp_path)


def test_a_second_process_is_refused_until_the_first_one_dies(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with holder(run.path) as other:
        with pytest.raises(
            UserError, match=rf"process {other.pid} on host {socket.gethostname()} trains here since 20"
        ):
            run.claim()
        other.send_signal(signal.SIGKILL)
        other.wait()
        run.claim()
    with pytest.raises(UserError, match=f"process {os.getpid()} on host"):
        RunDirectory(run.path).claim()
    run.release()
    RunDirectory(run.path).claim()


def test_a_forked_child_does_not_hold_the_run_after_its_parent(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "fork"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = {process.stdout.readline(), process.stdout.readline()}
    child = int((lines - {"held\n"}).pop())
    process.kill()
    process.wait()
    try:
        RunDirectory(tmp_path).claim()
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_another_host_is_waited_for_as_long_as_a_server_keeps_the_locks_of_a_dead_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node2")
    monkeypatch.setattr(module, "_LEASE_SECONDS", 1.0)
    said: list[str] = []
    with holder(tmp_path) as other:
        started = time.monotonic()
        with pytest.raises(UserError, match=f"process {other.pid} on host"):
            run.claim(said.append)
        assert time.monotonic() - started > 1.0 and len(said) == 1 and "waiting up to 1 s" in said[0]
    run.claim(said.append)
    assert json.loads((tmp_path / "run.lock").read_text())["host"] == "node2" and len(said) == 1


def test_a_claim_that_comes_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a" / "b")
    run.claim()
    assert (run.path / "run.lock").exists()
    run.abandon()
    assert list(tmp_path.iterdir()) == []
    run.claim()
    run.create(Config())
    run.abandon()
    assert run.config_file.exists()


def test_files_of_other_names_are_not_the_run_s(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.create(Config())
    for name in ("my_notes.jsonl", "step_notes.jsonl", "step_000001.jsonl", "step_000001 copy.jsonl", "step_1.jsonl"):
        (run.rollouts / name).touch()
    assert list(run.rollout_files()) == [1]
    run.forget_after(0)
    assert not (run.rollouts / "step_000001.jsonl").exists() and len(list(run.rollouts.iterdir())) == 4


def test_rows_after_a_power_loss(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.create(Config())
    for step in (1, 2):
        append_row(run.metrics_file, {"step": step})
    with run.metrics_file.open("ab") as file:
        file.write(bytes(4096) + b'\n{"step": 3, "lo')
    run.forget_after(9)
    assert run.metrics_file.read_text() == '{"step": 1}\n{"step": 2}\n'
    run.metrics_file.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(DamagedError, match=r"metrics.jsonl, line 2: damaged, with good rows after it; restore"):
        run.forget_after(9)
    write_rows(run.eval_file, [{"step": 0}, {"mean": 1}])
    with pytest.raises(DamagedError, match=r"eval.jsonl, line 2: a row without a step"):
        run.rows(run.eval_file)
