"""Judging in parallel: warm worker processes, hard deadlines, verdicts as futures.

Tasks whose judging is a few string operations are judged at once, in this process. The others go to workers: threads
here each drive one worker process, which is killed and replaced when it does not answer in time. Nothing but JSON comes
back from a worker.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Self, TypeVar

from mopd_nemo.config import UserError
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers import deadline, make_verifier, task_of
from mopd_nemo.verifiers.base import AnswerError, decide
from mopd_nemo.verifiers.sandbox.choose import Choice, choose

logger = logging.getLogger(__name__)
T = TypeVar("T")
_START_SECONDS = 120.0
_KEPT_ANSWERS = 64


class VerifierPool:
    """Judges responses of the given tasks. Use as a context manager, or `close` it.

    Raises:
        UserError: task `code` is wanted and programs cannot be isolated here, or a verifier cannot start.
    """

    def __init__(self, config: VerifierConfig, tasks: Collection[str]) -> None:
        self.sandbox: Choice | None = None
        """Where programs run, when there are any."""
        if "code" in tasks:
            self.sandbox = choose(config.code)
            logger.info("programs run in the sandbox %s", self.sandbox)
            code = config.code.model_copy(update={"sandbox": self.sandbox.layer})
            config = config.model_copy(update={"code": code})
        self._config = config
        self._inline = {task: make_verifier(task, config) for task in tasks if not task_of(task).needs_worker}
        remote = sorted(task for task in tasks if task_of(task).needs_worker)
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._encoded = _EncodedAnswers(config)
        self._gold_faults: dict[tuple[str, bytes], str] = {}
        if remote:
            self._workers = [_Worker(config, remote) for _ in range(config.workers or os.cpu_count() or 1)]
            self._threads = ThreadPoolExecutor(len(self._workers), thread_name_prefix="verifier")
            for worker in self._workers:
                self._idle.put(worker)
                worker.begin()  # they warm up while the caller goes on
            self._check_start()

    def _check_start(self) -> None:
        """Wait until one worker is ready: what keeps it from starting should be said before anything is sampled."""
        try:
            self._workers[0].get_ready()
        except BaseException:
            self.close()
            raise

    def submit(self, task: str, response: str, answer: Any, finished: bool = True) -> Future[Verdict]:
        """Judge a response some time soon; the future never fails, a verifier error is a verdict."""
        if self._threads is not None and task not in self._inline:
            header = {"ask": "verdict", "task": task, "response": response, "finished": finished}
            return self._threads.submit(self._ask_worker, header, answer)
        return _done(self._judge_here(task, response, answer, finished))

    def gold_fault(self, task: str, answer: Any) -> Future[str]:
        """Why a gold answer, whose form is right, cannot be judged by; empty when it can. Each is looked at once."""
        if task_of(task).is_plain(answer):
            return _done("")
        if self._threads is not None and task not in self._inline:
            return self._threads.submit(self._with_worker, lambda worker: self._gold_fault(worker, task, answer))
        try:
            self._inline[task].check_gold(answer)
        except AnswerError as error:
            return _done(str(error))
        return _done("")

    def same(self, task: str, first: str, second: str) -> Future[bool]:
        """Whether two answers found in responses are one; what cannot be decided is not."""
        if self._threads is None or task in self._inline:
            return _done(self._inline[task].same(first, second))
        header = {"ask": "same", "task": task}
        seconds = self._config.math.seconds_per_answer

        def ask(worker: _Worker) -> bool:
            try:
                return worker.ask((json.dumps(header).encode(), json.dumps([first, second]).encode()), seconds)["same"]
            except (UndecidedError, WorkerEndedError, KeyError):
                return False

        return self._threads.submit(self._with_worker, ask)

    def close(self) -> None:
        """Kill the workers; what they are judging is lost."""
        for worker in self._workers:
            worker.close()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _judge_here(self, task: str, response: str, answer: Any, finished: bool) -> Verdict:
        started = time.monotonic()
        try:
            verdict = self._inline[task].judge(response, answer, finished)
        except Exception as error:  # a fault of the verifier must not be taken for a failure of the model
            verdict = verifier_error(f"{type(error).__name__}: {error}")
        return decide(replace(verdict, seconds=time.monotonic() - started), self._config.success_threshold)

    def _ask_worker(self, header: dict[str, Any], answer: Any) -> Verdict:
        return self._with_worker(lambda worker: self._verdict(worker, header, answer))

    def _with_worker(self, use: Callable[[_Worker], T]) -> T:
        worker = self._idle.get()
        try:
            return use(worker)
        finally:
            self._idle.put(worker)

    def _verdict(self, worker: _Worker, header: dict[str, Any], answer: Any) -> Verdict:
        try:
            encoded, seconds = self._encoded.get(header["task"], answer)
            started = time.monotonic()
            try:
                reply = worker.ask((json.dumps(header).encode(), encoded), seconds)
            except (UndecidedError, WorkerEndedError) as error:
                verdict = self._undecided(worker, header["task"], answer, error)
            else:
                verdict = _verdict_of(reply)
        except Exception as error:
            return verifier_error(f"{type(error).__name__}: {error}")
        verdict = replace(verdict, seconds=time.monotonic() - started)
        return decide(verdict, self._config.success_threshold)

    def _undecided(self, worker: _Worker, task: str, answer: Any, error: Exception) -> Verdict:
        """A response that is too hard to compare with a sound gold answer is not that answer."""
        fault = str(error)
        if task_of(task).compares:
            fault = self._gold_fault(worker, task, answer)
            if not fault:
                return Verdict(0.0, Outcome.WRONG, "The final answer is wrong.", {"undecided": str(error)})
        return verifier_error(fault)

    def _gold_fault(self, worker: _Worker, task: str, answer: Any) -> str:
        header, encoded = {"ask": "gold", "task": task}, json.dumps(answer).encode()
        if (task, encoded) not in self._gold_faults:
            try:
                request = (json.dumps(header).encode(), encoded)
                fault = worker.ask(request, self._config.math.seconds_per_answer).get("error", "")
            except WorkerEndedError as error:
                return str(error)  # not a finding about the answer
            except UndecidedError as error:
                fault = f"answer={answer!r}: cannot be compared: {error}"
            self._gold_faults[task, encoded] = fault
        return self._gold_faults[task, encoded]


def _done(result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future


def _verdict_of(reply: dict[str, Any]) -> Verdict:
    if "error" in reply:
        return verifier_error(reply["error"])
    return Verdict(reply["reward"], Outcome(reply["outcome"]), reply["feedback"], reply["details"])


class _EncodedAnswers:
    """JSON and deadlines of the gold answers last used: tests of a program can be megabytes, shared by its rollouts."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str, int], tuple[Any, bytes, float]] = OrderedDict()

    def get(self, task: str, answer: Any) -> tuple[bytes, float]:
        """The answer as JSON, and the seconds that judging a response may take.

        Raises:
            AnswerError: the answer of a code task is malformed.
        """
        with self._lock:
            # By identity; the entry keeps the answer alive, so that its id stays its own.
            key = (task, id(answer))
            if key not in self._entries:
                encoded = json.dumps(answer).encode()
                self._entries[key] = answer, encoded, deadline(task, answer, self._config)
                if len(self._entries) > _KEPT_ANSWERS:
                    self._entries.popitem(last=False)
            _, encoded, seconds = self._entries[key]
            return encoded, seconds


def verifier_error(reason: str) -> Verdict:
    """The verdict where there is none. It is neither a success nor a failure of the model."""
    return Verdict(0.0, Outcome.VERIFIER_ERROR, details={"error": reason})


class UndecidedError(Exception):
    """A worker did not answer in time."""


class WorkerEndedError(Exception):
    """The process is gone."""


class _Worker:
    """One worker process and the socket to it. Used by one thread at a time; `close` may come from another."""

    def __init__(self, config: VerifierConfig, tasks: Sequence[str]) -> None:
        self._config = config
        self._tasks = tasks
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._lifeline = -1
        self._ready = False
        self._closed = False
        self._lock = threading.Lock()

    def ask(self, request: tuple[bytes, bytes], seconds: float) -> dict[str, Any]:
        """The worker's answer, of a new process if this one ends while it works.

        Raises:
            UndecidedError: it did not answer within `seconds`.
            WorkerEndedError: both processes ended.
        """
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
        """Start the process; it is ready some time later."""
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
                start_new_session=True,  # Ctrl-C is the parent's to handle
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
            theirs.close()
            os.close(watched)
            self._connection = Connection(ours.detach())
            self._ready = False

    def close(self) -> None:
        """Kill the process, for good."""
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
        answer = self._receive(seconds)
        if answer is None:
            self._kill()
            raise UndecidedError(f"not decided within {seconds:g} s")
        return answer

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
            if not self._closed:  # else another thread may still be reading from it
                self._connection.close()
            self._process = None
