"""Task `tool`: calls written as `Action: NAME` and `Action Input: {JSON}`, compared one by one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from mopd_nemo.chat import after_thinking
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers.base import AnswerError, Verifier, missing_answer, with_gold

_START = r"^[ \t*#>-]*(?:\d+[.)]\s*)?[*]*"
_ACTION = re.compile(rf"{_START}Action(?: \d+)?\**:[* \t]*(.*)$", re.MULTILINE)
_INPUT = re.compile(rf"{_START}Action[ _]Input(?: \d+)?\**:\**\s*(?:```(?:json)?\s*|`\s*)?", re.MULTILINE)
_OPTIONAL = "[Optional]"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys. Python would keep the last value, and accept an argument given twice."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call."""

    name: str
    arguments: Any
    optional: bool = False
    """The gold call may be left out."""


class FormatError(ValueError):
    """The response does not follow the format."""


class ToolVerifier(Verifier):
    """Every gold call must be made once, with equal arguments, and no other call. Their order does not matter."""

    needs_worker = False
    votes = True

    @staticmethod
    def check_answer(answer: Any) -> None:
        gold_calls(answer)

    def judge(self, response: str, answer: Any, finished: bool) -> Verdict:
        gold = gold_calls(answer)
        try:
            calls = read_calls(after_thinking(response))
        except FormatError as error:
            return missing_answer(str(error), finished)
        details = {"found": json.dumps([[call.name, call.arguments] for call in calls], sort_keys=True)}
        problem = difference(calls, gold)
        if problem is None:
            return Verdict(1.0, Outcome.CORRECT, details=details)
        expected = json.dumps([{"Action": call.name, "Action_Input": call.arguments} for call in gold])
        return Verdict(0.0, Outcome.WRONG, with_gold(problem, f"Expected: {expected}", self._config.feedback), details)

    def same(self, first: str, second: str) -> bool:
        """Whether two responses make the same calls, in any order."""
        return difference(_calls_of(first), _calls_of(second)) is None


def _calls_of(found: str) -> list[Call]:
    return [Call(name, arguments) for name, arguments in json.loads(found)]


def read_calls(text: str) -> list[Call]:
    """The calls of a response, in order; at least one.

    Raises:
        FormatError: there is none, or one has no name or no JSON object as its input.
    """
    actions = list(_ACTION.finditer(text))
    if not actions:
        raise FormatError("No tool call was found: write `Action: NAME` and then `Action Input: {JSON}`.")
    calls = []
    for number, action in enumerate(actions, start=1):
        end = actions[number].start() if number < len(actions) else len(text)
        name = action[1].strip().strip("`*\"'").strip().removesuffix("()")
        if not name:
            raise FormatError(f"Call {number} has no tool name after `Action:`.")
        calls.append(Call(name, _read_input(text, action.end(), end, number)))
    return calls


def _read_input(text: str, start: int, end: int, number: int) -> dict[str, Any]:
    opening = _INPUT.search(text, start, end)
    if opening is None:
        raise FormatError(f"Call {number} has no `Action Input:`.")
    try:
        arguments, _ = _DECODER.raw_decode(text[opening.end() : end])
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
        raise FormatError(f"The input of call {number} is not valid JSON: {reason}.") from error
    if not isinstance(arguments, dict):
        raise FormatError(f"The input of call {number} is not a JSON object.")
    return arguments


def gold_calls(answer: Any) -> list[Call]:
    """The gold calls of a row: a list of `{Action, Action_Input}`, itself or as JSON text.

    Raises:
        AnswerError: it has another form, or its input is not a JSON object.
    """
    rows = _parsed(answer)
    if not isinstance(rows, list) or not rows:
        raise AnswerError(f"answer={answer!r}: the answer of a tool task is a list of calls")
    calls = []
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("Action"), str):
            raise AnswerError(f"answer={row!r}: a call has the fields Action and Action_Input")
        arguments = _parsed(row.get("Action_Input"))
        if not isinstance(arguments, dict):
            raise AnswerError(f"Action_Input={row.get('Action_Input')!r}: must be a JSON object")
        name = row["Action"].strip()
        calls.append(Call(name.removeprefix(_OPTIONAL).strip(), arguments, name.startswith(_OPTIONAL)))
    return calls


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise AnswerError(f"{value!r}: not valid JSON: {error}") from error


def difference(calls: list[Call], gold: list[Call]) -> str | None:
    """The difference from the gold calls, in words that reveal nothing of them. None: there is none."""
    left = list(gold)
    unmatched: list[tuple[int, Call]] = []
    for number, call in enumerate(calls, start=1):
        match = next((g for g in left if g.name == call.name and equal(g.arguments, call.arguments)), None)
        if match is None:
            unmatched.append((number, call))
        else:
            left.remove(match)
    names = [g.name for g in left]
    problems = []
    for number, call in unmatched:
        if call.name in names:
            problems.append(f"Call {number} ({call.name}): the input is not what the request asks for.")
        else:
            problems.append(f"Call {number} ({call.name}): the request does not ask for this call.")
    if sum(not g.optional for g in left) > len(unmatched):
        problems.append("A call that the request asks for is missing.")
    return "\n".join(problems) or None


def equal(a: Any, b: Any) -> bool:
    """JSON equality: 1 equals 1.0, but true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b
