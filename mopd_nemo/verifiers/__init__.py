"""Verifiers by task name. Each judges a response against a problem's answer.

`VerifierPool` (`pool.py`) is how the rest of the package judges: in parallel, with deadlines, and with errors of a
verifier kept apart from failures of the model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.verifiers.answers import gold_text
from mopd_nemo.verifiers.base import Verifier
from mopd_nemo.verifiers.choice import gold_letter
from mopd_nemo.verifiers.code import HiddenTests
from mopd_nemo.verifiers.tool import gold_calls


@dataclass(frozen=True, slots=True)
class Task:
    """How responses of a task are judged."""

    verifier: str
    """`module:class`, imported when first needed."""
    check_answer: Callable[[Any], Any]
    """Raises `AnswerError` on a gold answer that the verifier could not use."""
    needs_worker: bool
    """Judging may take long or run hostile input: it happens in a worker process that can be killed."""


TASKS: dict[str, Task] = {
    "arithmetic": Task("mopd_nemo.verifiers.arithmetic:ArithmeticVerifier", gold_text, needs_worker=False),
    "choice": Task("mopd_nemo.verifiers.choice:ChoiceVerifier", gold_letter, needs_worker=False),
    "tool": Task("mopd_nemo.verifiers.tool:ToolVerifier", gold_calls, needs_worker=False),
    "math": Task("mopd_nemo.verifiers.math:MathVerifier", gold_text, needs_worker=True),
    "code": Task("mopd_nemo.verifiers.code:CodeVerifier", HiddenTests.read, needs_worker=True),
}


def make_verifier(task: str, config: VerifierConfig) -> Verifier:
    """The verifier of a task, to be used in this process."""
    module, _, name = TASKS[task].verifier.partition(":")
    return getattr(importlib.import_module(module), name)(config)


def deadline(task: str, answer: Any, config: VerifierConfig) -> float:
    """Seconds after which a worker that has not judged a response is killed."""
    if task != "code":
        return config.math.seconds_per_answer
    # Twice: a sandbox that breaks is replaced, and the program tried again.
    return 2 * (30.0 + (config.code.seconds_per_test + 6.0) * len(HiddenTests.read(answer).inputs))
