"""The base class of verifiers: each judges one response, and is made from the config."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from mopd_nemo.config.verifiers import FeedbackConfig, VerifierConfig
from mopd_nemo.types import Outcome, Verdict

MAX_FEEDBACK = 2000
"""Characters. Longer feedback loses its middle."""


class Verifier(ABC):
    """Judges responses of one task."""

    needs_worker: ClassVar[bool] = True
    """Judge in a worker process, which can be killed: judging may take long, or run hostile input."""

    votes: ClassVar[bool] = False
    """Verdicts hold the answer as `details["found"]`, so that a majority can be taken."""

    compares: ClassVar[bool] = False
    """Judging is a comparison with the gold answer. A response that cannot be compared in time is wrong."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config

    @classmethod
    def of(cls, task: str, config: VerifierConfig) -> Verifier:
        """The verifier of a task, by the name that problems give it."""
        return cls(config)

    @abstractmethod
    def judge(self, response: str, answer: Any, finished: bool) -> Verdict:
        """Judge one response.

        Args:
            answer: the problem's, in the form that `check_answer` accepts.
            finished: False when the response was cut at the token limit.

        Raises:
            Exception: the verifier failed, not the response. The caller records a verifier error.
        """

    @staticmethod  # noqa: B027
    def check_answer(answer: Any) -> None:
        """Check the form of a gold answer, when problems are read.

        Raises:
            AnswerError: the form is wrong.
        """

    def check_gold(self, answer: Any) -> None:  # noqa: B027
        """Check that responses can be compared with a gold answer. Slower than `check_answer`, which looks at its form.

        Raises:
            AnswerError: they cannot.
        """

    @classmethod
    def is_sound(cls, answer: Any) -> bool:
        """Whether a gold answer of the right form needs no `check_gold`."""
        return cls.check_gold is Verifier.check_gold

    @staticmethod
    def seconds_to_judge(answer: Any, config: VerifierConfig) -> float:
        """Seconds after which a worker that has not judged a response is killed."""
        return config.math.seconds_per_answer

    def same(self, first: str, second: str) -> bool:
        """Whether two answers found in responses (`details["found"]`) are equal, for a majority vote."""
        return first == second

    def close(self) -> None:  # noqa: B027
        """End the processes that the verifier started. By default there are none."""


def of_function(function: Callable[[str, Any, bool], Any]) -> type[Verifier]:
    """A verifier whose `judge` is a function of response, answer and whether the response is finished."""

    class FunctionVerifier(Verifier):
        def judge(self, response: str, answer: Any, finished: bool) -> Verdict:
            return as_verdict(function(response, answer, finished), self._config.success_threshold)

    return FunctionVerifier


def as_verdict(given: Any, threshold: float) -> Verdict:
    """What a judge returned, as a verdict: a number or a truth value is a reward.

    Raises:
        TypeError: it is something else.
        ValueError: the reward is no finite number. It would count as a failure of the model.
    """
    verdict = given
    if not isinstance(given, Verdict):
        if not hasattr(given, "__float__"):
            raise TypeError(f"the judge returned {given!r}: return a Verdict, a number, or true or false")
        reward = float(given)
        verdict = Verdict(reward, Outcome.CORRECT if reward >= threshold else Outcome.WRONG, informative=False)
    reward = float(verdict.reward)
    if not math.isfinite(reward):
        raise ValueError(f"the judge gave the reward {reward}, which is no finite number")
    return replace(verdict, reward=reward)


class AnswerError(ValueError):
    """The verifier cannot compare responses with this gold answer."""


def decide(verdict: Verdict, threshold: float) -> Verdict:
    """The verdict with its success, decided here and nowhere else (eq. 3).

    Args:
        threshold: τ, the least reward of a success.
    """
    success = None if verdict.outcome is Outcome.VERIFIER_ERROR else verdict.reward >= threshold
    return replace(verdict, success=success)


def missing_answer(what: str, finished: bool) -> Verdict:
    """The verdict on a response without an answer: a format error, or truncated at the length limit."""
    if finished:
        return Verdict(0.0, Outcome.BAD_FORMAT, feedback=what)
    return Verdict(0.0, Outcome.TRUNCATED, feedback="The response was cut at the length limit before an answer.")


def with_gold(feedback: str, gold: str, config: FeedbackConfig) -> str:
    """Feedback of at most MAX_FEEDBACK characters, with the right answer where the config reveals it."""
    if config.reveal_gold:
        feedback = f"{feedback}\n{gold}"
    return shorten(feedback, MAX_FEEDBACK)


def shorten(text: str, limit: int) -> str:
    """`text`, without its middle if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    cut = "\n[...]\n"
    head = max((limit - len(cut)) // 2, 0)
    return text[:head] + cut + text[len(text) - head :]
