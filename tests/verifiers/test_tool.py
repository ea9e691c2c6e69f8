import json
from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.config.verifiers import FeedbackConfig, VerifierConfig
from mopd_nemo.types import Outcome
from mopd_nemo.verifiers.base import AnswerError
from mopd_nemo.verifiers.tool import ToolVerifier, gold_calls

verifier = ToolVerifier(VerifierConfig())


def gold(*calls: tuple[str, Any]) -> str:
    return json.dumps([{"Action": name, "Action_Input": json.dumps(arguments)} for name, arguments in calls])


def said(*calls: tuple[str, Any]) -> str:
    parts = [f"Thought: so\nAction: {name}\nAction Input: {json.dumps(arguments)}" for name, arguments in calls]
    return "\n".join(parts)


NESTED = ("update-user", {"profile": {"name": "A", "tags": [{"k": "}"}]}, "note": 'Action: none {x} "q"'})
FACTS = ("getFacts", {"limit": 3})


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (said(FACTS), gold(FACTS)),
        (said(NESTED), gold(NESTED)),
        (said(NESTED, FACTS, FACTS), gold(FACTS, NESTED, FACTS)),
        (said(("getFacts", {"limit": 3.0})), gold(FACTS)),
        ("<think>Action: other\nAction Input: {}</think>" + said(FACTS), gold(FACTS)),
        ('Action: `getFacts`\nAction Input:\n```json\n{\n  "limit": 3\n}\n```', gold(FACTS)),
        ('Action: getFacts\nAction Input: `{"limit": 3}`', gold(FACTS)),
        ('Action: `getFacts()`\nAction Input: `{"limit": 3}` is the input.', gold(FACTS)),
        ('1. Action: getFacts\n   Action Input: {"limit": 3}', gold(FACTS)),
        ('**1. Action:** getFacts\n**Action Input:** ``` {"limit": 3} ```', gold(FACTS)),
        ('Action 1: getFacts\nAction Input 1: {"limit": 3}', gold(FACTS)),
        ('**Action:** getFacts\n**Action Input:** {"limit": 3}', gold(FACTS)),
        (said(FACTS), gold(FACTS, ("[Optional]update-user", {}))),
        (said(FACTS, ("update-user", {})), gold(FACTS, ("[Optional]update-user", {}))),
        (said(FACTS), [{"Action": "getFacts", "Action_Input": {"limit": 3}}]),
    ],
)
def test_right_calls(response: str, answer: Any) -> None:
    verdict = verifier.judge(response, answer, True)
    assert verdict.outcome is Outcome.CORRECT, verdict


@pytest.mark.parametrize(
    ("response", "answer", "feedback"),
    [
        (said(("getFacts", {"limit": 4})), gold(FACTS), "Call 1 (getFacts): the input is not"),
        (said(("getFacts", {"limit": "3"})), gold(FACTS), "the input is not"),
        (said(("getFacts", {})), gold(FACTS), "the input is not"),
        (said(("getFact", {"limit": 3})), gold(FACTS), "Call 1 (getFact): the request does not ask for this call"),
        (said(FACTS, FACTS), gold(FACTS), "Call 2 (getFacts): the request does not ask"),
        (said(FACTS), gold(FACTS, FACTS), "missing"),
        (said(FACTS), gold(FACTS, NESTED), "missing"),
        (said(("f", {"on": True})), gold(("f", {"on": 1})), "the input is not"),
        # Two calls that share a key: each must have its own value.
        (said(("f", {"k": 1}), ("f", {"k": 1})), gold(("f", {"k": 1}), ("f", {"k": 2})), "Call 2 (f): the input"),
    ],
)
def test_wrong_calls(response: str, answer: str, feedback: str) -> None:
    verdict = verifier.judge(response, answer, True)
    assert verdict.outcome is Outcome.WRONG and verdict.reward == 0.0
    assert feedback in verdict.feedback


@pytest.mark.parametrize(
    ("response", "feedback"),
    [
        ("I cannot help.", "No tool call was found"),
        ("Action: getFacts", "Call 1 has no `Action Input:`"),
        ("Action:\nAction Input: {}", "no tool name"),
        ("Action: getFacts\nAction Input: {'limit': 3}", "not valid JSON"),
        ("Action: getFacts\nAction Input: [3]", "not a JSON object"),
        ("Action: getFacts\nAction Input: " + '{"a":' * 100000, "not valid JSON"),
    ],
)
def test_bad_formats_say_what_is_missing(response: str, feedback: str) -> None:
    verdict = verifier.judge(response, gold(FACTS), True)
    assert verdict.outcome is Outcome.BAD_FORMAT and feedback in verdict.feedback
    assert verifier.judge(response, gold(FACTS), False).outcome is Outcome.TRUNCATED


@pytest.mark.parametrize("answer", ["", "[]", "{", [], [{"Action": "f"}], gold(("f", [1])), 5, None])
def test_bad_gold_answers_are_refused(answer: Any) -> None:
    with pytest.raises(AnswerError):
        gold_calls(answer)


def test_real_rows_their_gold_is_correct_and_feedback_keeps_it(shared_data: Path) -> None:
    lines = (shared_data / "toolalpaca" / "sdpo_tooluse_test.json").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    assert len(rows) == 68
    revealing = ToolVerifier(VerifierConfig(feedback=FeedbackConfig(reveal_gold=True)))
    for row in rows:
        calls = [(call["Action"], json.loads(call["Action_Input"])) for call in json.loads(row["answer"])]
        oracle = said(*[(name.removeprefix("[Optional]"), arguments) for name, arguments in calls])
        assert verifier.judge(oracle, row["answer"], True).outcome is Outcome.CORRECT
        assert verifier.judge(said(*reversed([(n.removeprefix("[Optional]"), a) for n, a in calls])), row["answer"],
                              True).outcome is Outcome.CORRECT  # fmt: skip
        broken = said((calls[0][0], {"something": "else"}), *calls[1:])
        verdict = verifier.judge(broken, row["answer"], True)
        assert verdict.outcome is Outcome.WRONG
        for _, arguments in calls:
            assert not any(str(value) in verdict.feedback for value in arguments.values() if len(str(value)) > 3)
        assert "Expected" in revealing.judge(broken, row["answer"], True).feedback


@pytest.mark.parametrize("arguments", ['{"city": "Oslo", "city": "Rome"}', '{"at": {"x": 1, "x": 2}}'])
def test_an_argument_given_twice_is_no_call(arguments: str) -> None:
    answer = gold(("look", json.loads(arguments)))
    verdict = verifier.judge(f"Action: look\nAction Input: {arguments}", answer, True)
    assert verdict.outcome is Outcome.BAD_FORMAT and verdict.reward == 0.0
