"""maj@n: equal answers are one vote, by the verifier's own equality."""

from collections.abc import Iterator
from typing import Any

import pytest

from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.evaluation import evaluation_metrics, votes_of
from mopd_nemo.types import Message, Problem, Rollout, RolloutGroup
from mopd_nemo.verifiers.pool import VerifierPool


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(VerifierConfig(workers=1), ["math", "choice", "tool", "arithmetic"]) as pool:
        yield pool


def group(pool: VerifierPool, task: str, gold: Any, texts: list[str]) -> RolloutGroup:
    problem = Problem("p", (Message(role="user", content="?"),), gold, task)
    verdicts = tuple(pool.submit(task, text, gold).result() for text in texts)
    return RolloutGroup(problem, tuple(Rollout((1,), text, True, (0.0,)) for text in texts), verdicts)


def boxed(*answers: str) -> list[str]:
    return [rf"\boxed{{{answer}}}" for answer in answers]


@pytest.mark.parametrize(
    ("gold", "answers", "wins"),
    [
        ("0.5", ["1/2", "0.5", r"\frac12", "3", "3"], True),
        ("0.5", ["3", "3.0", r"\frac{6}{2}", "0.5", "1/2"], False),
        (r"\sqrt{8}", ["3", r"2\sqrt2", "4", r"\sqrt8", "5"], True),
        (r"\{1,2\}", ["2,1", "1,2", "7", "7.0"], True),
        ("7", ["x+1", "1+x", "7", "8"], False),
    ],
)
def test_equal_answers_vote_together(pool: VerifierPool, gold: str, answers: list[str], wins: bool) -> None:
    metrics = evaluation_metrics([group(pool, "math", gold, boxed(*answers))], len(answers), pool)
    assert metrics[f"maj@{len(answers)}"] == float(wins)


def test_the_order_of_calls_does_not_divide_votes(pool: VerifierPool) -> None:
    calls = ["Action: f\nAction Input: {}\n", 'Action: g\nAction Input: {"a": 1}\n']
    gold = '[{"Action": "h", "Action_Input": "{}"}]'
    right = "Action: h\nAction Input: {}\n"
    votes = votes_of(group(pool, "tool", gold, [calls[0] + calls[1], right, calls[1] + calls[0], "none"]), pool)
    assert votes == [0, 1, 0, None]


def test_a_task_without_answers_has_no_majority(pool: VerifierPool) -> None:
    verdicts = group(pool, "choice", "A", ["<answer>A</answer>", "<answer>B</answer>"])
    assert evaluation_metrics([verdicts], 2, pool)["maj@2"] == 1.0
    code = RolloutGroup(
        Problem("c", verdicts.problem.messages, {"inputs": [""], "outputs": [""]}, "code"),
        verdicts.rollouts,
        verdicts.verdicts,
    )
    assert "maj@2" not in evaluation_metrics([code], 2, pool)
    assert evaluation_metrics([code, verdicts], 2, pool)["maj@2"] == 1.0
