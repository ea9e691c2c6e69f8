"""The text that the embedded model is prepared on.

40 % of the answers to a plain question are correct. The others have one of four systematic bugs. If the prompt has
worked solutions of the same problem, the answer is correct. If it has only failed attempts, the answer avoids their
bugs. Feedback helps a little, and solutions of another problem do not help. So the model chooses between strategies,
reads peers, and can gain from them, as in real post-training.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.data.arithmetic import apply, evaluate, parse, random_expressions, to_problem
from mopd_nemo.peers.render import render_user_turn
from mopd_nemo.peers.sources import ContextSection
from mopd_nemo.types import Message
from mopd_nemo.verifiers.answers import ArithmeticVerifier

RIGHT_FRACTION = 0.4
"""How often a plain question is answered rightly."""
RIGHT_FRACTION_AFTER_FAILURES = 0.6
"""How often it is when only failed attempts or feedback are shown; the rest are bugs that were not shown."""
BUGS = ("drop", "sign", "slip", "marker")
KINDS = {"plain": 30, "success": 20, "mixed": 25, "failure": 10, "feedback": 5, "unrelated": 10}
"""Weights of the kinds of example; `unrelated` shows attempts at another problem."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A response to a problem and whether its boxed answer is right."""

    text: str
    bug: str | None
    right: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One training text: everything after `user` (the question) in it is learned."""

    expression: str
    user: str
    response: str


def attempt(expression: str, bug: str | None, rng: random.Random) -> Attempt:
    """Work a chain line by line, with one bug or none. The wording of each line is free."""
    value, operations = parse(expression)
    lines = [f"Start with {value}."] if rng.random() < 0.5 else []
    at = rng.randrange(len(operations))
    for number, (operator, digit) in enumerate(operations):
        if bug == "drop" and number == at:
            continue
        if bug == "sign" and operator == "-":
            operator = "+"
        result = apply(value, operator, digit)
        if bug == "slip" and number == at:
            result = (result + rng.choice((1, 9))) % 10
        lines.append(
            f"{value}{operator}{digit}={result}" if rng.random() < 0.5 else f"{operator}{digit} gives {result}"
        )
        value = result
    if bug == "marker":
        lines.append(f"The result is {value}.")
    else:
        lines.append(rng.choice((f"\\boxed{{{value}}}", f"The result is \\boxed{{{value}}}.")))
    return Attempt("\n".join(lines), bug, right=bug != "marker" and value == evaluate(expression))


def failed_attempt(expression: str, bug: str, rng: random.Random) -> Attempt | None:
    """An attempt with this bug whose answer is wrong; None: the bug does not change the answer."""
    for _ in range(8):
        tried = attempt(expression, bug, rng)
        if not tried.right:
            return tried
    return None


def free_attempt(expression: str, right_fraction: float, bugs: Sequence[str], rng: random.Random) -> Attempt:
    """Right with the given probability, else one of the bugs."""
    if rng.random() >= right_fraction and bugs:
        failed = failed_attempt(expression, rng.choice(bugs), rng)
        if failed is not None:
            return failed
    return attempt(expression, None, rng)


def examples(chat: Chat, seed: int) -> Iterator[Example]:
    """An endless seeded stream over the `prepare` split."""
    rng = random.Random(f"corpus/{seed}")
    expressions = random_expressions("prepare", seed)
    for expression in expressions:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        subject = next(expressions) if kind == "unrelated" else expression
        failures = _failures(subject, kind, rng)
        sections = _sections(subject, kind, failures, rng)
        answer = _answer(expression, kind, failures, rng)
        question = to_problem(expression).messages[-1]["content"]
        yield Example(
            expression, render_user_turn(question, sections, PeersConfig(), chat, room=1_000_000).text, answer.text
        )


def _failures(expression: str, kind: str, rng: random.Random) -> list[Attempt]:
    """The failed attempts for this kind of example."""
    count = 0
    if kind == "feedback":
        count = 1
    elif kind in ("mixed", "failure") or (kind == "unrelated" and rng.random() < 0.5):
        count = _number_of_peers(rng)
    attempts = [failed_attempt(expression, rng.choice(BUGS), rng) for _ in range(count)]
    return [failed for failed in attempts if failed is not None]


def _sections(expression: str, kind: str, failures: Sequence[Attempt], rng: random.Random) -> list[ContextSection]:
    """The sections of the prompt after the question."""
    if kind == "feedback":
        verifier = ArithmeticVerifier(VerifierConfig())
        verdicts = [verifier.judge(failed.text, evaluate(expression), finished=True) for failed in failures]
        return [ContextSection("feedback", verdict.feedback) for verdict in verdicts]
    successes = _number_of_peers(rng) if kind in ("success", "mixed", "unrelated") else 0
    sections = [ContextSection("success", attempt(expression, None, rng).text) for _ in range(successes)]
    return [*sections, *(ContextSection("failure", failed.text) for failed in failures)]


def _answer(expression: str, kind: str, failures: Sequence[Attempt], rng: random.Random) -> Attempt:
    """The answer that the model learns."""
    if kind in ("success", "mixed"):
        return attempt(expression, None, rng)
    if kind in ("failure", "feedback"):
        shown = {failed.bug for failed in failures}
        others = [bug for bug in BUGS if bug not in shown]
        return free_attempt(expression, RIGHT_FRACTION_AFTER_FAILURES, others, rng)
    return free_attempt(expression, RIGHT_FRACTION, BUGS, rng)


def to_ids(example: Example, chat: Chat) -> tuple[tuple[int, ...], int]:
    """Token ids with the end-of-turn token, and where the learned part starts: right after the question."""
    question = to_problem(example.expression).messages[-1]["content"]
    message: Message = {"role": "user", "content": example.user}
    prompt = chat.prompt_text([message])
    start = len(chat.encode(prompt[: prompt.index(question) + len(question)]))
    ids = (*chat.encode(prompt + example.response), chat.tokenizer.eos_token_id)
    return ids, start


def _number_of_peers(rng: random.Random) -> int:
    return rng.choices((1, 2, 3, 4), (50, 35, 10, 5))[0]
