"""Metrics of groups whose values are counted by hand."""

from __future__ import annotations

import pytest

from mopd_nemo.config import PeersConfig
from mopd_nemo.peers.metrics import context_metrics, dedupe_metrics, group_metrics
from mopd_nemo.peers.render import PeerContext
from mopd_nemo.peers.select import Candidates, Peer, Selection
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


def candidates(successes: str, failures: str) -> Candidates:
    """One letter a text, successes first."""
    texts, split = tuple(successes + failures), len(successes)
    indices = tuple(range(len(texts)))
    return Candidates(0, texts, (1,) * len(texts), indices[:split], indices[split:], ("",) * len(texts))


@pytest.mark.parametrize("order", ["canonical", "random"])
def test_how_many_targets_a_choice_about_equal_texts_moves(order: str) -> None:
    """Two equal successes and a third; two equal failures and a third; and a group without equals."""
    groups = [candidates("aab", "xxy"), candidates("ab", "xy")]
    peers = PeersConfig.model_validate({"failures": 1, "dedupe": "peers", "order": order})
    metrics = dedupe_metrics(groups, peers)
    # `all` hides from 0 and 1 each other, likewise from 3 and 4. `none` shows a twice to 2, 4 and 5; 3 steps aside.
    assert metrics == {"dedupe/all": 4 / 10, "dedupe/none": 3 / 10, "dedupe/only_twins": 0.0}


def test_targets_whose_other_successes_all_read_like_them() -> None:
    metrics = dedupe_metrics([candidates("aaa", "x"), candidates("ab", "xy")], PeersConfig(failures=1))
    assert metrics["dedupe/only_twins"] == 3 / 8
    assert metrics["dedupe/peers"] == 3 / 8, "nothing becomes one success"
    assert metrics["dedupe/none"] == 4 / 8, "the failure, too, would read two successes"


def test_complete_contexts_are_a_fraction_of_all_rollouts() -> None:
    shown = Selection((Peer("success", 0, 1),))
    contexts = [
        PeerContext((1, 2), shown, complete=True),
        PeerContext((1,), shown),
        PeerContext(None),
        PeerContext(None),
    ]
    assert context_metrics([contexts])["context/complete"] == 0.25
    assert context_metrics([[PeerContext(None)]])["context/complete"] == 0.0
