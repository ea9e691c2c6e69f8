"""Task `choice`: the letter of one option."""

from __future__ import annotations

import re
from typing import Any

from mopd_nemo.chat import after_thinking
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers.answers import last_boxed
from mopd_nemo.verifiers.base import AnswerError, Verifier, missing_answer, with_gold

_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_LETTER = re.compile(r"\W*([A-Za-z])(?:\W*|[.):]\s.*)", re.DOTALL)
"""`A`, `(a)`, `**B**`, `C. text`, `D: text`."""
_MARKUP = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|boxed|fbox)\s*(?=\{)|\\[()\[\]]|[{}$*_`]")
"""Markup around a word or a letter."""
_NO_DENIAL = r"(?:(?!(?i:\b(?:not|never)\b|cannot\b|n[’']t\b))[^.:\n])"
"""One character of a sentence, unless a denial begins there, as in `the answer cannot be B`."""
_STATED = re.compile(
    r"(?i:\b(?:answer|option|choice)\b)"
    rf"(?:\s*[:=]?\s*|{_NO_DENIAL}{{0,40}}?(?i:\b(?:is|be|was)\b)\s*:?\s*|[^.:\n]{{0,40}}?:\s*)"
    r"(?i:(?:option|choice|answer)\s+)?[(\[]?"
    r"(?![A-Z]\b\W{0,3}(?:and|or|/|&)\W{0,3}[A-Z]\b[)\]]?\s*(?:[.!\n]|$))"
    r"(?:(?P<letter>[B-HJ-Z])\b(?![’'])|(?P<word>[AI])\b(?![’'])(?!\s+(?!because|since|as|and|which|for|due)[a-z]))"
)
"""`answer: B`, `option B`, `the answer I chose is B`. A and I count where they are not words of the sentence.
Two letters, `B and D`, are no answer."""


class ChoiceVerifier(Verifier):
    """The letter inside the last `<answer>` tags; `lenient` also finds it elsewhere."""

    needs_worker = False
    votes = True

    @staticmethod
    def check_answer(answer: Any) -> None:
        gold_letter(answer)

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
        return Verdict(0.0, Outcome.WRONG, feedback, details, informative=self._config.feedback.reveal_gold)


def gold_letter(answer: Any) -> str:
    """The gold letter of a row.

    Raises:
        AnswerError: it is not one letter.
    """
    if not isinstance(answer, str) or not re.fullmatch(r"[A-Za-z]", answer.strip()):
        raise AnswerError(f"answer={answer!r}: the answer of a choice is one letter")
    return answer.strip().upper()


def strict_letter(text: str) -> str | None:
    """The capital letter inside the last pair of tags. None: they hold anything else."""
    tagged = _TAGS.findall(text)
    content = tagged[-1].strip() if tagged else ""
    return content if re.fullmatch(r"[A-Z]", content) else None


def lenient_letter(text: str) -> str | None:
    """The letter inside the last tags, else boxed, else stated in words, else the response if it is one letter."""
    tagged = _TAGS.findall(text)
    if tagged:
        return _letter(tagged[-1]) or _stated(tagged[-1])
    boxed = last_boxed(text)
    return (_letter(boxed) if boxed is not None else None) or _stated(text) or _letter(text)


def _letter(text: str) -> str | None:
    """The letter that is the whole text, or that precedes the text of an option."""
    match = _LETTER.fullmatch(_MARKUP.sub("", text))
    return match[1].upper() if match else None


def _stated(text: str) -> str | None:
    stated = list(_STATED.finditer(_MARKUP.sub("", text)))
    return (stated[-1]["letter"] or stated[-1]["word"]) if stated else None
