"""The sandbox from outside: start it, send programs and inputs, read results, kill it when it does not answer."""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from mopd_nemo.config.verifiers import CodeConfig

_START_SECONDS = 30.0
_GRACE_SECONDS = 5.0
"""The whole sandbox is killed when an answer is this much later than the test's own limit."""


class SandboxError(Exception):
    """The sandbox did not start, or broke. It says nothing about the program."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a fork server."""

    command: tuple[str, ...]
    environment: dict[str, str]
    isolated: bool = True
    """Programs get namespaces and a scratch directory of their own inside."""
    filters: bool = True
    """Programs have a filter of system calls; False once it is known that the kernel has none."""


@dataclass(frozen=True, slots=True)
class Run:
    """The result of one program on one input."""

    ending: str
    """`normal`, `error` (an uncaught exception or an exit status), `time`, `memory`, `processes`, `output`, `encoding`
    (what it wrote is not UTF-8), or `signal N`."""
    stdout: str
    stderr: str
    value: str
    """JSON of the called function's value. Empty: no function was called."""
    seconds: float
    fresh: bool
    """It was the first test in its process. Otherwise earlier tests may have left traces."""


class Sandbox:
    """One fork server and the programs it runs, one at a time. Started when first used and again after it broke."""

    def __init__(self, launch: Launch, config: CodeConfig) -> None:
        self._launch = launch
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._ids = count(1)
        self.filters = False
        """Programs have a filter of system calls. Known once it has started."""

    @contextmanager
    def program(self, source: str, function: str | None, rules: Literal["official", "paper"]) -> Iterator[Program]:
        """Load a program; `Program.run` gives it inputs.

        Raises:
            SandboxError: the sandbox broke, and has been killed.
        """
        self.start()
        program = Program(self, next(self._ids), self._config.seconds_per_test + _GRACE_SECONDS)
        with self._scratch_directory() as scratch:
            try:
                program.start(source=source, function=function, rules=rules, scratch=scratch)
                yield program
                program.end()
            except BaseException:
                self.close()  # nothing of this program may reach the next one
                raise

    @contextmanager
    def _scratch_directory(self) -> Iterator[str | None]:
        """A directory on disk, for layers that give programs none in memory."""
        if self._launch.isolated:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="mopd-program-") as path:
            Path(path).chmod(0o777)
            yield path

    def start(self) -> None:
        """Start the fork server, unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        with tempfile.TemporaryFile() as errors:
            try:
                self._process = subprocess.Popen(
                    self._launch.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=self._launch.environment,
                    cwd="/",
                    start_new_session=True,
                )
                self.filters = self.receive(_START_SECONDS).get("filter") is True
            except (OSError, SandboxError) as error:
                self.close()
                errors.seek(0)
                said = errors.read(4000).decode(errors="replace").strip().splitlines()
                raise SandboxError(said[-1] if said else str(error)) from error

    def close(self) -> None:
        """Kill the fork server and everything it started."""
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process = None

    def send(self, message: dict[str, Any]) -> None:
        body = json.dumps(message).encode()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(struct.pack(">I", len(body)) + body)
            self._process.stdin.flush()
        except OSError as error:
            raise SandboxError(f"the sandbox ended: {error}") from error

    def receive(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        (length,) = struct.unpack(">I", self._read(4, deadline))
        # Three streams of `output_mb` each, where JSON escapes may turn a byte into six.
        if length > 6 * 3 * (self._config.output_mb << 20) + 65536:
            raise SandboxError("the sandbox sent too much")
        try:
            message = json.loads(self._read(length, deadline))
        except (ValueError, RecursionError) as error:
            raise SandboxError("the sandbox sent no JSON") from error
        if not isinstance(message, dict):
            raise SandboxError("the sandbox sent no message")
        return message

    def _read(self, count: int, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        fd = self._process.stdout.fileno()
        chunks = []
        while count:
            ready, _, _ = select.select([fd], [], [], max(deadline - time.monotonic(), 0.0))
            if not ready:
                raise SandboxError("the sandbox did not answer in time")
            chunk = os.read(fd, min(count, 1 << 20))
            if not chunk:
                raise SandboxError("the sandbox ended")
            chunks.append(chunk)
            count -= len(chunk)
        return b"".join(chunks)


class Program:
    """A program in the sandbox."""

    def __init__(self, sandbox: Sandbox, number: int, seconds: float) -> None:
        self._sandbox = sandbox
        self._number = number
        self._seconds = seconds

    def start(self, **parts: str | None) -> None:
        self._sandbox.send({"kind": "program", "id": self._number, **parts})

    def run(self, text: str, *, fresh: bool = False) -> Run:
        """Run on one input: the whole of stdin, or the arguments of the function.

        Args:
            fresh: in a new process, not in one that has run other inputs.
        """
        self._sandbox.send({"kind": "test", "input": text, "fresh": fresh})
        answer = self._receive("result")
        return Run(**{name: answer[name] for name in Run.__slots__})

    def end(self) -> None:
        self._sandbox.send({"kind": "end"})
        self._receive("done")

    def _receive(self, kind: str) -> dict[str, Any]:
        answer = self._sandbox.receive(self._seconds)
        if answer.get("kind") != kind or answer.get("id") != self._number:
            raise SandboxError(f"the sandbox sent {answer.get('kind')!r} instead of {kind!r}")
        return answer
