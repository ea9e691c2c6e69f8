"""Judging in parallel: warm worker processes, hard deadlines, verdicts as futures.

Tasks whose judging is a few string operations are judged at once, in this process. The others go to workers: threads
here each drive one worker process, which is killed and replaced when it does not answer in time. Workers
return only JSON.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, Self, TypeVar

from mopd_nemo.chat import OPEN, Chat, opens_thinking
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.types import Outcome, Problem, Rollout, Verdict
from mopd_nemo.verifiers import verifier_class
from mopd_nemo.verifiers.base import AnswerError, Verifier, as_verdict, decide
from mopd_nemo.verifiers.sandbox.layers import Choice, choose
from mopd_nemo.verifiers.worker import UndecidedError, Worker, WorkerEndedError

logger = logging.getLogger(__name__)
T = TypeVar("T")
_KEPT_ANSWERS = 64


class VerifierPool:
    """Judges responses of the given tasks. Use as a context manager, or `close` it.

    Raises:
        UserError: task `code` is wanted and programs cannot be isolated here, or a verifier cannot start.
    """

    def __init__(self, config: VerifierConfig, tasks: Collection[str]) -> None:
        self.sandbox: Choice | None = None
        """The sandbox of programs, if task `code` is judged."""
        if "code" in tasks:
            self.sandbox = choose(config.code)
            logger.info("programs run in the sandbox %s", self.sandbox)
            code = config.code.model_copy(update={"sandbox": self.sandbox.layer})
            config = config.model_copy(update={"code": code})
        self._config = config
        self._classes = {task: verifier_class(task, config) for task in tasks}
        remote = sorted(task for task, found in self._classes.items() if found.needs_worker or task in config.custom)
        self._inline = {task: found.of(task, config) for task, found in self._classes.items() if task not in remote}
        self._asking = {
            task: ThreadPoolExecutor(config.http[task].in_flight, thread_name_prefix=f"verifier-{task}")
            for task in self._inline
            if task in config.http
        }
        """Threads that wait for served judges."""
        self._workers: list[Worker] = []
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._encoded = _EncodedAnswers(config)
        self._gold_faults: dict[tuple[str, bytes], str] = {}
        if remote:
            self._workers = [Worker(config, remote) for _ in range(config.workers or os.cpu_count() or 1)]
            self._threads = ThreadPoolExecutor(len(self._workers), thread_name_prefix="verifier")
            for worker in self._workers:
                self._idle.put(worker)
                worker.begin()  # they warm up while the caller goes on
            self._check_start()

    def _check_start(self) -> None:
        """Wait until one worker is ready, so that a broken installation is reported before anything is sampled."""
        try:
            self._workers[0].get_ready()
        except BaseException:
            self.close()
            raise

    def submit(self, task: str, response: str, answer: Any, finished: bool = True) -> Future[Verdict]:
        """Start judging a response. The future never raises: a verifier error is a verdict, too."""
        if self._threads is not None and task not in self._inline:
            header = {"ask": "verdict", "task": task, "response": response, "finished": finished}
            return self._threads.submit(self._with_worker, lambda worker: self._verdict(worker, header, answer))
        if task in self._asking:
            return self._asking[task].submit(self._judge_here, task, response, answer, finished)
        return _done(self._judge_here(task, response, answer, finished))

    def gold_fault(self, task: str, answer: Any) -> Future[str]:
        """Why nothing can be compared with a gold answer of the right form. Empty: it can. Computed once each."""
        if self.class_of(task).is_sound(answer):
            return _done("")
        if self._threads is not None and task not in self._inline:
            return self._threads.submit(self._with_worker, lambda worker: self._gold_fault(worker, task, answer))
        try:
            self._inline[task].check_gold(answer)
        except AnswerError as error:
            return _done(str(error))
        return _done("")

    def same(self, task: str, first: str, second: str) -> Future[bool]:
        """Whether two answers found in responses are equal. Undecided counts as different."""
        if self._threads is None or task in self._inline:
            return _done(self._inline[task].same(first, second))
        header = {"ask": "same", "task": task}
        seconds = self._config.math.seconds_per_answer

        def ask(worker: Worker) -> bool:
            try:
                return worker.ask(header, json.dumps([first, second]).encode(), seconds)["same"]
            except (UndecidedError, WorkerEndedError, KeyError):
                return False

        return self._threads.submit(self._with_worker, ask)

    def class_of(self, task: str) -> type[Verifier]:
        """The verifier of a task."""
        return self._classes.get(task) or verifier_class(task, self._config)

    def close(self) -> None:
        """Kill the workers. Verdicts in progress are lost."""
        for worker in self._workers:
            worker.close()
        for verifier in self._inline.values():
            verifier.close()
        for threads in self._asking.values():
            threads.shutdown(wait=True, cancel_futures=True)
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
            verdict = as_verdict(verdict, self._config.success_threshold)
        except Exception as error:  # the verifier failed, not the model
            verdict = verifier_error(f"{type(error).__name__}: {error}")
        return decide(replace(verdict, seconds=time.monotonic() - started), self._config.success_threshold)

    def _with_worker(self, use: Callable[[Worker], T]) -> T:
        worker = self._idle.get()
        try:
            return use(worker)
        finally:
            self._idle.put(worker)

    def _verdict(self, worker: Worker, header: dict[str, Any], answer: Any) -> Verdict:
        try:
            encoded, seconds = self._encoded.get(header["task"], answer)
            started = time.monotonic()
            try:
                reply = worker.ask(header, encoded, seconds)
            except (UndecidedError, WorkerEndedError) as error:
                verdict = self._undecided(worker, header["task"], answer, error)
            else:
                verdict = verifier_error(reply["error"]) if "error" in reply else _verdict_of(reply)
        except Exception as error:
            return verifier_error(f"{type(error).__name__}: {error}")
        verdict = replace(verdict, seconds=time.monotonic() - started)
        return decide(verdict, self._config.success_threshold)

    def _undecided(self, worker: Worker, task: str, answer: Any, error: Exception) -> Verdict:
        """The verdict on a response that was not decided in time: wrong if the gold answer is sound, else an error."""
        fault = str(error)
        if self.class_of(task).compares:
            fault = self._gold_fault(worker, task, answer)
            if not fault:
                details = {"undecided": str(error)}
                return Verdict(0.0, Outcome.WRONG, "The final answer is wrong.", details, informative=False)
        return verifier_error(fault)

    def _gold_fault(self, worker: Worker, task: str, answer: Any) -> str:
        header, encoded = {"ask": "gold", "task": task}, json.dumps(answer).encode()
        if (task, encoded) not in self._gold_faults:
            try:
                fault = worker.ask(header, encoded, self._config.math.seconds_per_answer).get("error", "")
            except WorkerEndedError as error:
                return str(error)  # says nothing about the answer
            except UndecidedError as error:
                fault = f"answer={answer!r}: cannot be compared: {error}"
            self._gold_faults[task, encoded] = fault
        return self._gold_faults[task, encoded]


def _done(result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future


def _verdict_of(reply: dict[str, Any]) -> Verdict:
    names = ("reward", "feedback", "details", "informative")
    return Verdict(outcome=Outcome(reply["outcome"]), **{name: reply[name] for name in names})


class _EncodedAnswers:
    """JSON and deadlines of recent gold answers. Tests of a program can be megabytes, and its rollouts share them."""

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
            # Keyed by identity. The entry keeps the answer alive, so its id is not used again.
            key = (task, id(answer))
            if key not in self._entries:
                encoded = json.dumps(answer).encode()
                self._entries[key] = answer, encoded, self._seconds(task, answer)
                if len(self._entries) > _KEPT_ANSWERS:
                    self._entries.popitem(last=False)
            _, encoded, seconds = self._entries[key]
            return encoded, seconds

    def _seconds(self, task: str, answer: Any) -> float:
        if task in self._config.custom:
            return self._config.custom[task].seconds
        return verifier_class(task, self._config).seconds_to_judge(answer, self._config)


def verifier_error(reason: str) -> Verdict:
    """The verdict on a response that could not be judged: neither a success nor a failure of the model."""
    return Verdict(0.0, Outcome.VERIFIER_ERROR, details={"error": reason})


class PendingVerdicts:
    """Verdicts on the rollouts of some problems, whose ids must differ.

    `add` starts judging a rollout as soon as it is finished. `collect` adds the rest, and waits for all verdicts.

    Args:
        chat: tells whether a prompt ends inside a thinking block, as with templates of thinking-only models. Its
            responses then begin inside one. None: no prompt does.
    """

    def __init__(self, pool: VerifierPool, chat: Chat | None) -> None:
        self._pool = pool
        self._chat = chat
        self._in_thinking: dict[str, bool] = {}
        self._futures: dict[tuple[str, int], Future[Verdict]] = {}

    def add(self, problem: Problem, sample: int, rollout: Rollout) -> None:
        """Start judging a problem's rollout number `sample`."""
        text = OPEN + rollout.text if self._begins_in_thinking(problem) else rollout.text
        future = self._pool.submit(problem.task, text, problem.answer, rollout.finished)
        self._futures[problem.id, sample] = future

    def _begins_in_thinking(self, problem: Problem) -> bool:
        if self._chat is None:
            return False
        if problem.id not in self._in_thinking:
            prompt = self._chat.decode(problem.prompt_ids, skip_special_tokens=False)
            self._in_thinking[problem.id] = opens_thinking(prompt)
        return self._in_thinking[problem.id]

    def collect(self, problems: Sequence[Problem], samples: Sequence[Sequence[Rollout]]) -> list[tuple[Verdict, ...]]:
        """Verdicts of all samples of all problems, in their order."""
        for problem, rollouts in zip(problems, samples, strict=True):
            for number, rollout in enumerate(rollouts):
                if (problem.id, number) not in self._futures:
                    self.add(problem, number, rollout)
        verdicts = [
            tuple(self._futures[problem.id, number].result() for number in range(len(rollouts)))
            for problem, rollouts in zip(problems, samples, strict=True)
        ]
        errors = [v.details["error"] for group in verdicts for v in group if v.outcome is Outcome.VERIFIER_ERROR]
        if errors:
            total = sum(map(len, verdicts))
            logger.warning("%d of %d responses could not be judged; the first: %s", len(errors), total, errors[0])
        return verdicts
