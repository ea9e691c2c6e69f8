"""Task `arithmetic`, the built-in one: a boxed number."""

from __future__ import annotations

from typing import Any

from mopd_nemo.thinking import after_thinking
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers.answers import last_boxed, number_or_text
from mopd_nemo.verifiers.base import Verifier, missing_answer, with_gold


class ArithmeticVerifier(Verifier):
    """The last `\\boxed{...}` must equal the answer as a number."""

    def judge(self, response: str, answer: Any, finished: bool) -> Verdict:
        found = last_boxed(after_thinking(response))
        if found is None:
            return missing_answer("No final answer in \\boxed{...} was found.", finished)
        details = {"found": found}
        if number_or_text(found) == number_or_text(str(answer)):
            return Verdict(1.0, Outcome.CORRECT, details=details)
        feedback = with_gold("The final answer is wrong.", f"The right answer is {answer}.", self._config.feedback)
        return Verdict(0.0, Outcome.WRONG, feedback, details)
