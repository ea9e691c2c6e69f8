"""The files of a run, and the lock that keeps a second process out of them.

run.lock              host and process that train here
config.yaml           every setting, defaults included
metrics.jsonl         one row a step
eval.jsonl            one row an evaluation
launches.jsonl        one row a process that trained here: `launches`
choices.jsonl         one row a choice of peers, with `peers.choose: measured`
rollouts/             step_*.jsonl: samples, verdicts and teacher prompts; eval_*.jsonl: held-out samples
checkpoints/step_*/   Hugging Face model, teacher, optimiser, trainer state: `checkpoints`
report.html
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from mopd_nemo.config import Config, UserError
from mopd_nemo.config.load import dump_config, load_config, read_config
from mopd_nemo.files import DamagedError, WriteError, cannot_write, read_rows, write_rows, write_text

_LEASE_SECONDS = 120.0
"""Until a network file system gives up the locks of a host that has died."""


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        self.eval_file = path / "eval.jsonl"
        self.launches_file = path / "launches.jsonl"
        self.choices_file = path / "choices.jsonl"
        self.config_file = path / "config.yaml"
        self.problems_file = path / "problems.json"
        self.report_file = path / "report.html"
        self.rollouts = path / "rollouts"
        self.checkpoints = path / "checkpoints"
        self._lock = _RunLock(path / "run.lock")
        self._made: list[Path] = []

    @classmethod
    def at(cls, config: Config) -> RunDirectory:
        """The directory of a new run. Writes nothing.

        Raises:
            UserError: the directory already holds a run.
        """
        run = cls(Path(config.run_dir or f"runs/{config.name}-{datetime.now():%Y%m%d-%H%M%S}"))
        run.check_unused()
        return run

    def check_unused(self) -> None:
        """Find out whether no run is here.

        Raises:
            UserError: there is one.
        """
        if self.config_file.exists():
            raise UserError(
                f"run_dir={self.path}: holds a run already; continue it with "
                f"`mopd train --resume {shlex.quote(str(self.path))}`, or choose another run_dir"
            )

    def claim(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Make the directory, if it is not there, and keep other processes from training in it until this one ends.

        Args:
            say: is told while this waits for a host that may have died.

        Raises:
            UserError: another process trains here, or the directory cannot be written.
        """
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.take(say)
        except OSError as error:
            self.abandon()
            raise UserError(
                f"run_dir={self.path}: cannot write there: {error.strerror}; choose another run_dir"
            ) from error

    def release(self) -> None:
        """Let other processes train here."""
        self._lock.release()

    def abandon(self) -> None:
        """Release it and leave nothing behind, where no run has begun."""
        self._lock.release()
        if not self.config_file.exists():
            with suppress(OSError):
                self._lock.file.unlink()
            with suppress(OSError):  # no longer empty
                for path in self._made:
                    path.rmdir()

    def create(self, config: Config) -> None:
        """Record the resolved settings of a new run and make its directories.

        Raises:
            WriteError: there is no room.
        """
        for directory in (self.rollouts, self.checkpoints):
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise WriteError(cannot_write(directory, error)) from error
        self.write_config(config)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run.

        Raises:
            UserError: there is none at `path`.
        """
        run = cls(path)
        if not run.config_file.is_file():
            raise UserError(f"{path}: not a run directory (no config.yaml in it)")
        return run

    def read_config(self) -> Config:
        """The run's settings, for reading what it did."""
        return read_config(self.config_file, [f"run_dir={self.path}"])

    def load_config(self, overrides: Iterable[str] = ()) -> Config:
        """The run's settings with dotted overrides, checked as those of a new run: for going on."""
        return load_config(self.config_file, [*overrides, f"run_dir={self.path}"])

    def write_config(self, config: Config) -> None:
        """Record the resolved settings."""
        write_text(self.config_file, dump_config(config))

    def rollouts_file(self, step: int, kind: Literal["step", "eval"] = "step") -> Path:
        """File of the rollouts of a training step, or of the evaluation after it."""
        return self.rollouts / f"{kind}_{step:06d}.jsonl"

    def signal_file(self, step: int) -> Path:
        """File of what student and teacher said of each token of a training step's rollouts."""
        return self.rollouts / f"signal_{step:06d}.npz"

    def rollout_files(self, kind: Literal["step", "eval"] = "step") -> dict[int, Path]:
        """Recorded rollouts by step, oldest first. Files of other names are not the run's."""
        return self._by_step(kind, "jsonl")

    def signal_files(self) -> dict[int, Path]:
        """Recorded signals of tokens by step, oldest first."""
        return self._by_step("signal", "npz")

    def _by_step(self, kind: str, suffix: str) -> dict[int, Path]:
        named = (
            (re.fullmatch(rf"{kind}_(\d{{6,}})\.{suffix}", file.name), file)
            for file in self.rollouts.glob(f"*.{suffix}")
        )
        return dict(sorted((int(match[1]), file) for match, file in named if match))

    def rows(self, file: Path) -> list[dict[str, Any]]:
        """Rows of one of the run's own files, each with its step; none where there is no file.

        Raises:
            DamagedError: a row has no step.
        """
        rows = read_rows(file) if file.exists() else []
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get("step"), int):
                raise DamagedError(
                    f"{file}, line {number}: a row without a step; restore the file, or remove this line"
                )
        return rows

    def forget_after(self, step: int) -> None:
        """Drop rows and files of steps after `step`: a resumed run writes them again."""
        for file in (self.metrics_file, self.eval_file, self.choices_file):
            if file.exists():
                write_rows(file, [row for row in self.rows(file) if row["step"] <= step])
        for files in (self.rollout_files("step"), self.rollout_files("eval"), self.signal_files()):
            for recorded, file in files.items():
                if recorded > step:
                    file.unlink()


class _RunLock:
    """Held by the process that trains in a run. The kernel releases it when the process ends, however it ends.

    On a network file system the server does, for a host that has died after its lease: so a lock of another host is
    waited for that long. File systems without locks (Lustre mounted without `flock`) keep nobody out.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor: int | None = None

    def take(self, say: Callable[[str], None]) -> None:
        deadline = time.monotonic() + _LEASE_SECONDS
        told = False
        while self._descriptor is None and not self._try(say):
            host, pid, since = self._holder()
            if host == socket.gethostname() or time.monotonic() > deadline:
                raise UserError(
                    f"{self.file.parent}: process {pid} on host {host} trains here since {since}; wait until it ends, "
                    "or stop it there"
                )
            if not told:
                say(f"waiting up to {_LEASE_SECONDS:g} s for process {pid} on host {host}, which holds {self.file}")
                told = True
            time.sleep(0.2)

    def release(self) -> None:
        if self._descriptor is not None:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _try(self, say: Callable[[str], None]) -> bool:
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
        self._descriptor = descriptor
        _held.add(descriptor)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError as error:
                say(f"{self.file}: no locks on this file system ({error.strerror}): start one process a run yourself")
            if not os.path.samestat(os.fstat(descriptor), self.file.stat()):
                raise BlockingIOError  # its last holder has removed it meanwhile
            now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}).encode())
        except (BlockingIOError, FileNotFoundError):
            self.release()
            return False
        except BaseException:
            self.release()
            raise
        return True

    def _holder(self) -> tuple[str, str, str]:
        try:
            holder = json.loads(self.file.read_text())
            return holder["host"], str(holder["pid"]), holder["since"]
        except (OSError, ValueError, TypeError, KeyError):  # it is writing this just now
            return "unknown", "unknown", "a moment ago"


_held: set[int] = set()


def _leave_to_the_parent() -> None:
    """A forked child shares the locks of its parent, and would hold them when the parent has died."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)
