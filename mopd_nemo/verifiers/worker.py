"""A worker process that judges one response at a time: `Worker` drives it, `main` runs in it.

    python -m mopd_nemo.verifiers.worker CHANNEL LIFELINE CONFIG TASKS

CHANNEL is a socket for JSON messages. LIFELINE is a pipe that closes when the parent ends, for whatever reason.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from mopd_nemo.config import UserError
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.verifiers import verifier_class
from mopd_nemo.verifiers.base import Verifier, as_verdict

_START_SECONDS = 120.0
_MEMORY_MB = 8 << 10
"""Limit of a worker's memory: 9^(9^(9^9)) would fill the machine's before the deadline."""


class UndecidedError(Exception):
    """A worker did not answer in time."""


class WorkerEndedError(Exception):
    """The process is gone."""


class Worker:
    """One worker process and the socket to it. One thread at a time uses it; another may call `close`."""

    def __init__(self, config: VerifierConfig, tasks: Sequence[str]) -> None:
        self._config = config
        self._tasks = tasks
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._lifeline = -1
        self._ready = False
        self._closed = False
        self._lock = threading.Lock()

    def ask(self, header: dict[str, Any], answer: bytes, seconds: float) -> dict[str, Any]:
        """The worker's reply. If the process ends meanwhile, a new one is asked again.

        Args:
            header: what to do, as in `_judge`.
            answer: JSON of the gold answer, or of two answers to compare.

        Raises:
            UndecidedError: it did not answer within `seconds`.
            WorkerEndedError: both processes ended.
        """
        request = json.dumps(header).encode(), answer
        try:
            self.get_ready()
            return self._ask(request, seconds)
        except WorkerEndedError:
            self._kill()
            if self._closed:
                raise
            self.get_ready()
            return self._ask(request, seconds)

    def begin(self) -> None:
        """Start the process. `get_ready` waits until it can judge."""
        with self._lock:
            if self._closed:
                raise WorkerEndedError("the pool is closed")
            ours, theirs = socket.socketpair()
            watched, self._lifeline = os.pipe()
            arguments = [str(theirs.fileno()), str(watched), self._config.model_dump_json(), ",".join(self._tasks)]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mopd_nemo.verifiers.worker", *arguments],
                pass_fds=(theirs.fileno(), watched),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # the parent handles Ctrl-C
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
            theirs.close()
            os.close(watched)
            self._connection = Connection(ours.detach())
            self._ready = False

    def close(self) -> None:
        """Kill the process, and start no other."""
        self._closed = True
        self._kill()

    def get_ready(self) -> None:
        """Wait until the process has made its verifiers; start it if there is none.

        Raises:
            UserError: one cannot be made.
        """
        if self._process is None:
            self.begin()
        if not self._ready:
            answer = self._receive(_START_SECONDS)
            if answer is None or "error" in answer:
                raise UserError(f"a verifier cannot start: {(answer or {}).get('error', 'it takes too long')}")
            self._ready = True

    def _ask(self, request: tuple[bytes, bytes], seconds: float) -> dict[str, Any]:
        assert self._connection is not None
        try:
            for part in request:
                self._connection.send_bytes(part)
        except OSError as error:
            raise WorkerEndedError("the worker process ended") from error
        reply = self._receive(seconds)
        if reply is None:
            self._kill()
            raise UndecidedError(f"not decided within {seconds:g} s")
        return reply

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None when it does not come in time."""
        assert self._connection is not None
        try:
            return json.loads(self._connection.recv_bytes()) if self._connection.poll(seconds) else None
        except (OSError, EOFError) as error:
            raise WorkerEndedError("the worker process ended") from error

    def _kill(self) -> None:
        with self._lock:
            if self._process is None:
                return
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            os.close(self._lifeline)
            assert self._connection is not None
            if not self._closed:  # otherwise another thread may still read from it
                self._connection.close()
            self._process = None


def main() -> None:
    """Make the verifiers, say so, and judge."""
    channel, lifeline, config_json, tasks = sys.argv[1:]
    _end_with(int(lifeline))
    _limit_memory(_MEMORY_MB)
    connection = Connection(int(channel))
    config = VerifierConfig.model_validate_json(config_json)
    verifiers: dict[str, Verifier] = {}
    for task in tasks.split(","):
        try:
            verifiers[task] = verifier_class(task, config).of(task, config)
        except Exception as error:
            key = f"verifier.custom.{task}" if task in config.custom else f"task {task}"
            connection.send_bytes(json.dumps({"error": f"{key}: {_describe(error)}"}).encode())
            return
    connection.send_bytes(json.dumps({"ready": True}).encode())
    while True:
        try:
            request = json.loads(connection.recv_bytes()) | {"answer": json.loads(connection.recv_bytes())}
        except EOFError:
            break
        custom = config.custom.get(request["task"])
        _limit_memory(custom.memory_mb if custom else _MEMORY_MB)
        connection.send_bytes(_reply(verifiers, request, config.success_threshold))
        _limit_memory(_MEMORY_MB)
    for verifier in verifiers.values():
        verifier.close()


def _reply(verifiers: dict[str, Verifier], request: dict[str, Any], threshold: float) -> bytes:
    """JSON. An exception of the verifier is its failure, not the model's; so is a verdict that is no JSON."""
    try:
        return json.dumps(_judge(verifiers[request["task"]], request, threshold)).encode()
    except Exception as error:
        return json.dumps({"error": _describe(error)}).encode()


def _judge(verifier: Verifier, request: dict[str, Any], threshold: float) -> dict[str, Any]:
    """Answer a request: judge a response, check a gold answer, or compare two answers found in responses."""
    match request["ask"]:
        case "gold":
            verifier.check_gold(request["answer"])
            return {}
        case "same":
            return {"same": verifier.same(*request["answer"])}
    verdict = verifier.judge(request["response"], request["answer"], request["finished"])
    return asdict(as_verdict(verdict, threshold))


def _limit_memory(megabytes: int) -> None:
    """The soft limit, of this process and of those that it starts."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20 if hard < 0 else min(megabytes << 20, hard), hard))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _end_with(lifeline: int) -> None:
    """Let the kernel end this process when the pipe closes. A thread would get no turn during a long computation."""
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)  # SIGIO, which ends a process by default
    try:
        if os.read(lifeline, 1) == b"":
            sys.exit(1)  # it was closed already
    except BlockingIOError:
        pass


if __name__ == "__main__":
    main()
