"""Settings of the verifiers: the `verifier` block of the config."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from mopd_nemo.config.base import ConfigBlock


class MathConfig(ConfigBlock):
    """Task `math`: the last boxed or stated final answer, compared symbolically."""

    seconds_per_answer: PositiveFloat = 5.0
    """An answer that is not decided by then is wrong: its worker is killed and replaced."""


class ChoiceConfig(ConfigBlock):
    """Task `choice`: one letter."""

    format: Literal["strict", "lenient"] = "strict"
    """`strict`: exactly one capital letter inside the last `<answer>` tags; `lenient`: also `(b)`, `B. text`,
    `\\boxed{B}`, `The answer is B` or the letter alone."""


class CodeConfig(ConfigBlock):
    """Task `code`: programs run on hidden tests, in a sandbox."""

    mode: Literal["official", "paper"] = "official"
    """`official`: LiveCodeBench's rules and all of Python; `paper`: the stricter rules of the paper's code, for
    comparison with its numbers."""
    all_tests: bool = False
    """Run the tests after a failed one too, so that `details.passed` is exact. The verdict stays the same. A program
    that is too slow then takes `seconds_per_test` for each test. `mode: paper` always does it."""
    seconds_per_test: PositiveFloat = 6.0
    """Wall-clock limit of one test. LiveCodeBench's is 6."""
    memory_mb: PositiveInt = 1024
    """Limit of one test, in MiB, all its processes together."""
    output_mb: PositiveInt = 16
    """Limit of what one test prints, and of any file it writes, in MiB."""
    scratch_mb: PositiveInt = 64
    """Size of a program's scratch directory, in MiB of memory."""
    processes: PositiveInt = 32
    """Limit of processes and threads of one test."""
    sandbox: Literal["auto", "bubblewrap", "namespaces", "rlimits"] = "auto"
    """Isolation of programs from the machine. `auto`: bubblewrap, else namespaces, else an error. `rlimits` protects
    neither files nor network and is never chosen by `auto`."""


class FeedbackConfig(ConfigBlock):
    """Feedback on failures. `peers.when_no_success` and `peers.failure_form` say whether teachers read it."""

    reveal_gold: bool = False
    """Include the right answer, or the expected output of the failed test. It then reaches the teacher's prompt."""


class VerifierConfig(ConfigBlock):
    """The verifiers."""

    success_threshold: float = 0.5
    """τ of eq. 3: a rollout is a success when its reward is at least this."""
    workers: PositiveInt | None = None
    """Worker processes for the tasks `math` and `code`. `null`: one per core. The other tasks need none."""
    math: MathConfig = MathConfig()
    choice: ChoiceConfig = ChoiceConfig()
    code: CodeConfig = CodeConfig()
    feedback: FeedbackConfig = FeedbackConfig()
