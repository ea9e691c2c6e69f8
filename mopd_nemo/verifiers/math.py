"""Task `math`: a final answer, equal to the gold answer as mathematics.

math-verify's own time limits use an alarm signal, which works in the main thread only and is off here: this verifier
runs in a worker process that is killed when it takes too long.
"""

from __future__ import annotations

import logging
from typing import Any

from math_verify import parse, verify

from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers.answers import canonical, final_answer, gold_text
from mopd_nemo.verifiers.base import AnswerError, Verifier, missing_answer, with_gold

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns about the time limits that are off


class MathVerifier(Verifier):
    """The last boxed answer, or else one stated in words, must be equivalent to the gold answer."""

    def judge(self, response: str, answer: Any, finished: bool) -> Verdict:
        gold = gold_text(answer)
        found = final_answer(response)
        if found is None:
            return missing_answer("No final answer was found: write it inside \\boxed{...}.", finished)
        details = {"found": found}
        if equivalent(gold, found):
            return Verdict(1.0, Outcome.CORRECT, details=details)
        feedback = with_gold("The final answer is wrong.", f"The right answer is {gold}.", self._config.feedback)
        return Verdict(0.0, Outcome.WRONG, feedback, details)


def equivalent(gold: str, found: str) -> bool:
    """Whether two answers are the same: as plain numbers or text, else as mathematics."""
    if canonical(gold) == canonical(found):
        return True
    gold_parsed, found_parsed = (
        parse(f"\\boxed{{{text}}}", parsing_timeout=0, raise_on_error=True) for text in (gold, found)
    )
    if not gold_parsed:
        raise AnswerError(f"answer={gold!r}: math-verify cannot read it")
    return verify(gold_parsed, found_parsed, timeout_seconds=None, raise_on_error=True)
