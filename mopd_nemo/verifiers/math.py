"""Task `math`: a final answer, mathematically equal to the gold answer.

Some comparisons never end. So this verifier runs in a worker process, which is killed at the time limit.
"""

from __future__ import annotations

import importlib
from typing import Any

from mopd_nemo.chat import after_thinking
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers.answers import final_answer, gold_text, is_plain_number
from mopd_nemo.verifiers.base import AnswerError, Verifier, missing_answer, with_gold
from mopd_nemo.verifiers.equality import equals_itself, equivalent


class MathVerifier(Verifier):
    """The last boxed answer, or else one stated in words, must be equivalent to the gold answer."""

    votes = True
    compares = True

    def __init__(self, config: VerifierConfig) -> None:
        super().__init__(config)
        importlib.import_module("mopd_nemo.verifiers.algebra")  # a broken installation is found before the first answer

    @staticmethod
    def check_answer(answer: Any) -> None:
        gold_text(answer)

    @classmethod
    def is_sound(cls, answer: Any) -> bool:
        return is_plain_number(answer)

    def judge(self, response: str, answer: Any, finished: bool) -> Verdict:
        gold = gold_text(answer)
        found = final_answer(after_thinking(response))
        if found is None:
            return missing_answer("No final answer was found: write it inside \\boxed{...}.", finished)
        details = {"found": found}
        try:
            if equivalent(gold, found):
                return Verdict(1.0, Outcome.CORRECT, details=details)
        except Exception as error:  # SymPy may raise anything on model-written text
            self.check_gold(answer)
            details["undecided"] = f"{type(error).__name__}: {error}"
        feedback = with_gold("The final answer is wrong.", f"The right answer is {gold}.", self._config.feedback)
        return Verdict(0.0, Outcome.WRONG, feedback, details, informative=self._config.feedback.reveal_gold)

    def check_gold(self, answer: Any) -> None:
        """A gold answer must equal itself, compared as a response is."""
        gold = gold_text(answer)
        try:
            sound = equals_itself(gold)
        except Exception as error:  # SymPy may raise anything on the text of a row
            raise AnswerError(f"answer={gold!r}: cannot be compared: {type(error).__name__}: {error}") from error
        if not sound:
            raise AnswerError(f"answer={gold!r}: cannot be compared: it does not equal itself")

    def same(self, first: str, second: str) -> bool:
        """Whether two answers are mathematically equal."""
        return equivalent(first, second)
