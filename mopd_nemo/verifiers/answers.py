"""Final answers: finding them, and comparing them without algebra. Task `arithmetic` needs nothing else."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from mopd_nemo.chat import after_thinking
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers.base import AnswerError, Verifier, missing_answer, with_gold
from mopd_nemo.verifiers.notation import plain, tidy
from mopd_nemo.verifiers.numbers import read_number
from mopd_nemo.verifiers.units import split_unit

_BOX = re.compile(r"\\+(?:boxed|fbox)\s*\{")
_STATED = re.compile(
    r"(?im)^\s*####\s*(?!\s*\**(?:the\s+)?(?:final\s+)?answer)(?P<hashes>.+?)\s*$"
    r"|^[^\w\n\\$({\[-]*(?:the\s+)?(?:final\s+|correct\s+)?answer[*_`\s]*(?:is\s*)?:[*_`\s]*(?P<line>\S.*?)\s*$"
    r"|^[^\w\n\\$]*final\s+answer[*_:\s]*\n+\s*(?P<below>\S.*?)\s*$"
    r"|(?:the\s+)?final\s+answer\s+is\s*:?\s*(?P<sentence>.+?)(?:[.]?\s*$|\.\s)"
)
"""`#### x`, a line `Answer: x`, a heading `Final answer` with x below it, and `the final answer is x`."""
_BETWEEN = re.compile(r"\\(?:quad|qquad|text|mbox|textbf|[()\[\],;:! ])|[\s$&{}.,;]")
_JOINS = re.compile(r"(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])|[,;]")
_REPLACES = re.compile(
    r"(?i)(?<![a-z])(?:wait|no|not|wrong|actually|but|instead|correct\w*|hmm|mistake|should|rather|sorry|equiv\w*|same|"
    r"approx\w*|about|simpl\w*|hence|therefore|so|thus|then|now|is|if|i\.e)(?![a-z])|[.?!:]\s|≈"
)


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}`, joined with the boxes before it that belong to the same answer.

    `\boxed{4}` and `\boxed{-7}` are the answer `4,-7`. A box that a later one corrects is left out. None: no box.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    contents = [text[boxes[-1][1] : boxes[-1][2]]]
    for (_, _, end), (start, *_) in zip(reversed(boxes[:-1]), reversed(boxes[1:]), strict=True):
        if not _continue_answer(text[end + 1 : start]):
            break
        contents.append(text[boxes[len(boxes) - len(contents) - 1][1] : end])
    return ",".join(dict.fromkeys(content.strip() for content in reversed(contents)))


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Start of the box, and start and end of its content, for every complete box that is not inside another."""
    boxes: list[tuple[int, int, int]] = []
    position = 0
    while match := _BOX.search(text, position):
        end = _closing_brace(text, match.end())
        position = match.end() if end is None else end + 1
        if end is not None:
            boxes.append((match.start(), match.end(), end))
    return boxes


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the group whose content starts at `start`. Escaped braces do not count."""
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position
        position += 1
    return None


def _continue_answer(between: str) -> bool:
    """Whether the text between two boxes joins them into one answer."""
    if not _BETWEEN.sub("", between).strip():
        return True  # only spaces, commas and math delimiters
    words = _BETWEEN.sub(" ", between)
    return len(between) < 70 and bool(_JOINS.search(between)) and not _REPLACES.search(words + " ")


def final_answer(text: str) -> str | None:
    """The last boxed answer, else the last one stated in words."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    stated = list(_STATED.finditer(text))
    if not stated:
        return None
    answer = next(group for group in stated[-1].groups() if group is not None)
    answer = re.sub(r"(?i)^.*?\banswer\s+is\s*:?\s*", "", answer)
    answer = re.sub(r"(?i)[.]\s+I hope .*$", "", answer)
    return answer.strip(" .*_`") or None


def is_plain_number(answer: Any) -> bool:
    """Whether a gold answer is a number that needs no algebra."""
    return read_number(tidy(gold_text(answer))) is not None


def number_or_text(answer: str) -> Fraction | str:
    """For tasks that ask for a number: the value of an answer, or its normalised text if it is not a number."""
    text = tidy(answer)
    quantity = split_unit(text)
    number = read_number(quantity.value)
    return number.value * quantity.scale if number is not None else plain(text)


def gold_text(answer: Any) -> str:
    """The gold answer of a row: a number, LaTeX, a boxed expression, or a solution that ends in `#### x` (GSM8K).

    Raises:
        AnswerError: it is empty or of another type.
    """
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise AnswerError(f"answer={answer!r}: a math answer is text or a number")
    text = str(answer)
    if "####" in text:
        text = text.rpartition("####")[2]
    text = (last_boxed(text) or _BOX.sub("", text)).strip()
    if not text:
        raise AnswerError(f"answer={answer!r}: a math answer cannot be empty")
    return text


class ArithmeticVerifier(Verifier):
    """The last `\\boxed{...}` must equal the answer as a number."""

    needs_worker = False
    votes = True

    @staticmethod
    def check_answer(answer: Any) -> None:
        gold_text(answer)

    def judge(self, response: str, answer: Any, finished: bool) -> Verdict:
        found = last_boxed(after_thinking(response))
        if found is None:
            return missing_answer("No final answer in \\boxed{...} was found.", finished)
        details = {"found": found}
        if number_or_text(found) == number_or_text(str(answer)):
            return Verdict(1.0, Outcome.CORRECT, details=details)
        feedback = with_gold("The final answer is wrong.", f"The right answer is {answer}.", self._config.feedback)
        return Verdict(0.0, Outcome.WRONG, feedback, details, informative=self._config.feedback.reveal_gold)
