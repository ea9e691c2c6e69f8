"""Metrics of groups whose values are counted by hand."""

from __future__ import annotations

from mopd_nemo.peers.metrics import group_metrics
from mopd_nemo.types import Outcome, Problem, Rollout, RolloutGroup, Verdict

PROBLEM = Problem("p", ({"role": "user", "content": "?"},), "4", "math", (1, 2))


def group(*members: tuple[str, Verdict]) -> RolloutGroup:
    rollouts = tuple(Rollout((3, 4), text, True, ()) for text, _ in members)
    return RolloutGroup(PROBLEM, rollouts, tuple(verdict for _, verdict in members))


def test_undecided_answers_are_a_fraction_of_all_rollouts_and_wrong() -> None:
    undecided = Verdict(0.0, Outcome.WRONG, details={"undecided": "time"}, success=False)
    wrong = Verdict(0.0, Outcome.WRONG, details={"found": "5"}, success=False)
    right = Verdict(1.0, Outcome.CORRECT, success=True)
    metrics = group_metrics([group(("a", undecided), ("b", wrong)), group(("c", right), ("d", right))])
    assert metrics["outcome/undecided"] == 0.25
    assert metrics["outcome/wrong"] == 0.5 and metrics["success_rate"] == 0.5


def test_successes_that_only_think_are_a_fraction_of_the_successes() -> None:
    right, wrong = Verdict(1.0, Outcome.CORRECT, success=True), Verdict(0.0, Outcome.WRONG, success=False)
    silent = "<think>2 + 2 is 4</think>\n"
    groups = [
        group((silent, right), ("<think>so</think> 4", right), ("4", right), (silent, wrong)),
        group(("4", right)),
    ]
    assert group_metrics(groups)["success_without_text"] == 0.25
