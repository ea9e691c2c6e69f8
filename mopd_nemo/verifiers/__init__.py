"""Verifiers by task name. Each judges a response against a problem's answer.

`VerifierPool` (`pool.py`) is how the rest of the package judges: in parallel, with deadlines, and with errors of a
verifier kept apart from failures of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mopd_nemo.config.plugins import load_class
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.verifiers.answers import ArithmeticVerifier, gold_text, is_plain_number
from mopd_nemo.verifiers.base import Verifier
from mopd_nemo.verifiers.choice import ChoiceVerifier, gold_letter
from mopd_nemo.verifiers.code import CodeVerifier, HiddenTests
from mopd_nemo.verifiers.tool import ToolVerifier, gold_calls


@dataclass(frozen=True, slots=True)
class Task:
    """How responses of a task are judged."""

    verifier: Callable[[VerifierConfig], Verifier]
    check_answer: Callable[[Any], Any]
    """Raises `AnswerError` on a gold answer that the verifier could not use."""
    needs_worker: bool
    """Judging may take long or run hostile input: it happens in a worker process that can be killed."""
    compares: bool = False
    """Judging is comparing with the gold answer: a response that cannot be compared in time is wrong."""
    votes: bool = True
    """Responses hold an answer to take a majority of (`details["found"]`)."""
    is_plain: Callable[[Any], bool] = lambda _: True
    """Whether a gold answer of the right form is surely sound; others are compared with themselves first."""


def _math(config: VerifierConfig) -> Verifier:
    from mopd_nemo.verifiers.math import MathVerifier  # SymPy takes a second, which only the workers should pay

    return MathVerifier(config)


TASKS: dict[str, Task] = {
    "arithmetic": Task(ArithmeticVerifier, gold_text, needs_worker=False),
    "choice": Task(ChoiceVerifier, gold_letter, needs_worker=False),
    "tool": Task(ToolVerifier, gold_calls, needs_worker=False),
    "math": Task(_math, gold_text, needs_worker=True, compares=True, is_plain=is_plain_number),
    "code": Task(CodeVerifier, HiddenTests.read, needs_worker=True, votes=False),
}


def task_of(name: str, key: str = "task") -> Task:
    """A built-in task, or a verifier of your own, which a problem names as `module:Name`.

    Raises:
        UserError: there is neither.
    """
    if name in TASKS:
        return TASKS[name]
    verifier = load_class(name, dict.fromkeys(TASKS, ""), key)
    return Task(
        verifier,
        verifier.check_answer,
        verifier.needs_worker,
        votes=verifier.votes,
        is_plain=lambda _: verifier.check_gold is Verifier.check_gold,
    )


def make_verifier(task: str, config: VerifierConfig) -> Verifier:
    """The verifier of a task, to be used in this process."""
    return task_of(task).verifier(config)


def deadline(task: str, answer: Any, config: VerifierConfig) -> float:
    """Seconds after which a worker that has not judged a response is killed."""
    if task != "code":
        return config.math.seconds_per_answer
    # Twice: a sandbox that breaks is replaced, and the program tried again.
    return 2 * (30.0 + (config.code.seconds_per_test + 6.0) * len(HiddenTests.read(answer).inputs))
