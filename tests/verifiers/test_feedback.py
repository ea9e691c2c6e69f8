"""What feedback says, and whether a verdict calls it informative: more than that the response failed."""

from __future__ import annotations

import pytest

from mopd_nemo.config.verifiers import FeedbackConfig, VerifierConfig
from mopd_nemo.types import Outcome
from mopd_nemo.verifiers import verifier_class

GOLD_CALLS = [{"Action": "find", "Action_Input": '{"name": "x"}'}]


@pytest.mark.parametrize(
    ("task", "answer", "response", "informative"),
    [
        ("choice", "A", "<answer>B</answer>", False),
        ("choice", "A", "B it is", True),  # how to write it
        ("math", "2", r"\boxed{3}", False),
        ("math", "2", "three", True),
        ("arithmetic", "2", r"\boxed{3}", False),
        ("arithmetic", "2", "three", True),
        ("tool", GOLD_CALLS, 'Action: find\nAction Input: {"name": "y"}', True),
    ],
)
def test_feedback_is_informative_where_it_says_more_than_wrong(
    task: str, answer: object, response: str, informative: bool
) -> None:
    verdict = verifier_class(task, VerifierConfig())(VerifierConfig()).judge(response, answer, True)
    assert verdict.outcome is not Outcome.CORRECT and verdict.feedback
    assert verdict.informative == informative


@pytest.mark.parametrize("task", ["choice", "math", "arithmetic"])
def test_a_revealed_answer_informs(task: str) -> None:
    config = VerifierConfig(feedback=FeedbackConfig(reveal_gold=True))
    verifier = verifier_class(task, config)(config)
    answer, response = ("A", "<answer>B</answer>") if task == "choice" else ("2", r"\boxed{3}")
    assert verifier.judge(response, answer, True).informative
