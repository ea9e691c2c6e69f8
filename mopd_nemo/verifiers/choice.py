"""Task `choice`: the letter of one option."""

from __future__ import annotations

import re
from typing import Any

from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.thinking import after_thinking
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers.answers import last_boxed
from mopd_nemo.verifiers.base import AnswerError, Verifier, missing_answer, with_gold

_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_LETTER = re.compile(r"\W*([A-Za-z])(?:\W*|[.):]\s.*)", re.DOTALL)
"""`A`, `(a)`, `**B**`, `C. text`, `D: text`."""
_STATED = re.compile(
    r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*(?i:option\s+)?[(*\[]*([A-Z])\b(?![’'])", re.MULTILINE
)


class ChoiceVerifier(Verifier):
    """The letter inside the last `<answer>` tags; `lenient` also finds it elsewhere."""

    def __init__(self, config: VerifierConfig) -> None:
        super().__init__(config)
        self._lenient = config.choice.format == "lenient"

    def judge(self, response: str, answer: Any, finished: bool) -> Verdict:
        gold = gold_letter(answer)
        text = after_thinking(response)
        found = lenient_letter(text) if self._lenient else strict_letter(text)
        if found is None:
            return missing_answer("The answer must be one capital letter in <answer> and </answer>.", finished)
        details = {"found": found}
        if found == gold:
            return Verdict(1.0, Outcome.CORRECT, details=details)
        feedback = with_gold(f"The answer {found} is wrong.", f"The right answer is {gold}.", self._config.feedback)
        return Verdict(0.0, Outcome.WRONG, feedback, details)


def gold_letter(answer: Any) -> str:
    """The gold answer of a row.

    Raises:
        AnswerError: it is not one letter.
    """
    if not isinstance(answer, str) or not re.fullmatch(r"[A-Za-z]", answer.strip()):
        raise AnswerError(f"answer={answer!r}: the answer of a choice is one letter")
    return answer.strip().upper()


def strict_letter(text: str) -> str | None:
    """The capital letter that is all there is inside the last pair of tags."""
    tagged = _TAGS.findall(text)
    content = tagged[-1].strip() if tagged else ""
    return content if re.fullmatch(r"[A-Z]", content) else None


def lenient_letter(text: str) -> str | None:
    """The letter inside the last tags, else boxed, else stated in words, else all that the response says."""
    tagged = _TAGS.findall(text)
    boxed = last_boxed(text)
    for content in (tagged[-1] if tagged else None, boxed):
        if content is not None:
            content = re.sub(r"\\text(?:bf)?\{(.*)\}", r"\1", content)
            match = _LETTER.fullmatch(content)
            return match[1].upper() if match else None
    stated = _STATED.findall(text)
    if stated:
        return stated[-1]
    match = _LETTER.fullmatch(text)
    return match[1].upper() if match else None
