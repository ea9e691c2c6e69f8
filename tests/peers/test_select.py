import pytest

from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig
from mopd_nemo.peers.select import Candidates, Peer, Selection, candidates_of, select_peers
from tests.conftest import make_group


def pool(successes: dict[int, str], failures: dict[int, str], feedback: str = "") -> Candidates:
    texts = successes | failures
    return Candidates(
        group_index=0,
        texts=tuple(texts[i] for i in range(len(texts))),
        lengths=tuple(len(texts[i]) for i in range(len(texts))),
        successes=tuple(successes),
        failures=tuple(failures),
        feedback=tuple(feedback if i in failures else "" for i in range(len(texts))),
    )


def shown(selection: Selection | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rollouts shown as successes and as failures."""
    peers = selection.full_peers if selection is not None else ()
    successes = tuple(peer.rollout_index for peer in peers if peer.kind == "success")
    return successes, tuple(peer.rollout_index for peer in peers if peer.kind == "failure")


def success(index: int) -> Peer:
    return Peer("success", 0, index)


def failure(index: int) -> Peer:
    return Peer("failure", 0, index)


def select(candidates: Candidates, seed: str = "s", **settings: object) -> list[Selection | None]:
    return select_peers(candidates, PeersConfig.model_validate({"failures": 1} | settings), seed)


MIXED = pool({0: "a", 2: "b", 3: "c"}, {1: "x", 4: "y"})


def test_default_is_two_successes_and_one_failure_without_the_target() -> None:
    assert [shown(s) for s in select(MIXED)] == [
        ((3, 2), (4,)),  # 0 is a peer itself: the next in line come first
        ((3, 0), (4,)),  # so is 1
        ((3, 0), (4,)),  # and 2
        ((0, 2), (1,)),
        ((0, 2), (1,)),
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"successes": 1, "failures": 0}, ((0,), ())),
        ({"successes": 2, "failures": 0}, ((0, 2), ())),
        ({"successes": 0, "failures": 1}, ((), (1,))),
        ({"successes": 1, "failures": 1}, ((0,), (1,))),
        ({"successes": 2, "failures": 1}, ((0, 2), (1,))),
        ({"successes": "all", "failures": "all"}, ((0, 2, 3), (1,))),
    ],
)
def test_every_context_of_the_ablation_is_a_setting(
    settings: dict[str, object], expected: tuple[object, object]
) -> None:
    last = select(MIXED, **settings)[4]
    assert shown(last) == expected


@pytest.mark.parametrize("order", ["canonical", "shortest", "diverse"])
def test_a_group_has_few_distinct_contexts(order: str) -> None:
    big = pool({i: f"s{i}" * (i + 1) for i in range(10)}, {i: f"f{i}" * (20 - i) for i in range(10, 20)})
    assert len(set(select(big, order=order))) <= 4  # three peers, plus one for everybody else


@pytest.mark.parametrize(
    ("settings", "contexts"),
    [
        ({}, {((0, 1), (10,)), ((2, 3), (11,))}),
        ({"successes": 1, "failures": 0}, {((0,), ()), ((1,), ())}),
        ({"successes": 4, "failures": 2}, {((0, 1, 2, 3), (10, 11)), ((4, 5, 6, 7), (12, 13))}),
    ],
)
def test_in_canonical_order_two_contexts_do_for_a_large_group(settings: dict[str, object], contexts: object) -> None:
    big = pool({i: f"s{i}" for i in range(10)}, {i: f"f{i}" for i in range(10, 20)})
    assert {shown(s) for s in select(big, **settings)} == contexts


@pytest.mark.parametrize("successes", range(6))
@pytest.mark.parametrize("failures", range(4))
@pytest.mark.parametrize("wanted", [(1, 0), (0, 1), (2, 1), (3, 2)])
def test_stepping_aside_leaves_nobody_with_fewer_peers(successes: int, failures: int, wanted: tuple[int, int]) -> None:
    group = pool({i: f"s{i}" for i in range(successes)}, {successes + i: f"f{i}" for i in range(failures)})
    settings = {"successes": wanted[0], "failures": wanted[1]}
    settings |= {"when_no_success": "failure_only"} if wanted[1] else {}
    for target, selection in enumerate(select(group, **settings)):
        others = successes - (target < successes), failures - (target >= successes)
        assert target not in [index for indices in shown(selection) for index in indices]
        assert tuple(map(len, shown(selection))) == tuple(map(min, wanted, others))


def test_equal_texts_count_once_and_a_target_never_reads_its_own_text() -> None:
    twins = pool({0: "same", 1: "same", 2: "other"}, {3: "x"})
    selections = select(twins)
    assert shown(selections[0])[0] == shown(selections[1])[0] == (2,)
    assert shown(selections[3])[0] == (0, 2)


def test_group_of_identical_successes_has_no_success_peer() -> None:
    assert select(pool({0: "same", 1: "same"}, {})) == [None, None]


def test_rollouts_with_nothing_to_show_are_no_peers() -> None:
    assert select(pool({0: "", 1: "a"}, {2: ""}))[2] == Selection((success(1),))


def test_shortest_prefers_few_tokens() -> None:
    lengths = pool({0: "long text", 1: "mid te", 2: "s"}, {3: "x"})
    assert shown(select(lengths, order="shortest")[3])[0] == (2, 1)


def test_diverse_prefers_unlike_texts() -> None:
    likes = pool({0: "a b c d", 1: "a b c e", 2: "x y z"}, {3: "f"})
    assert shown(select(likes, order="diverse")[3])[0] == (0, 2)


def test_random_is_seeded_and_differs_between_targets() -> None:
    big = pool({i: f"s{i}" for i in range(12)}, {i: f"f{i}" for i in range(12, 24)})
    first = select(big, seed="1/step 3", order="random")
    assert first == select(big, seed="1/step 3", order="random")
    assert first != select(big, seed="1/step 4", order="random")
    assert len({shown(s)[0] for s in first}) > 6


ALL_FAILED = pool({}, {0: "x", 1: "y"}, feedback="wrong")
LONE_SUCCESS = pool({0: "a"}, {1: "x"})


@pytest.mark.parametrize(
    ("policy", "all_failed", "lone_success"),
    [
        ("skip", None, None),
        ("failure_only", Selection((failure(1),)), Selection((failure(1),))),
        ("plain", Selection(), Selection()),
    ],
)
def test_what_happens_without_a_success_is_a_setting(
    policy: str, all_failed: Selection | None, lone_success: Selection | None
) -> None:
    assert select(ALL_FAILED, when_no_success=policy)[0] == all_failed
    assert select(LONE_SUCCESS, when_no_success=policy)[0] == lone_success


TWINS = pool({0: "same", 1: "same", 2: "other"}, {3: "x", 4: "x"})
CLONES = pool({0: "same", 1: "same"}, {2: "x"})


def test_peers_that_are_equal_count_once_and_may_read_like_the_target() -> None:
    found = [shown(s) for s in select(TWINS, dedupe="peers")]
    assert found == [((1, 2), (3,)), ((0, 2), (3,)), ((0,), (3,)), ((0, 2), (4,)), ((0, 2), (3,))]


def test_without_dedupe_every_rollout_counts() -> None:
    """As in the authors' code, where two successes may be the same text."""
    found = [shown(s) for s in select(TWINS, dedupe="none", order="shortest")]
    assert found == [((1, 2), (3,)), ((0, 2), (3,)), ((0, 1), (3,)), ((0, 1), (4,)), ((0, 1), (3,))]


@pytest.mark.parametrize(
    ("dedupe", "texts"), [("all", None), ("peers", ["same"]), ("none", ["same", "same"])], ids=["all", "peers", "none"]
)
def test_six_equal_successes_show_each_other_none_one_or_two(dedupe: str, texts: list[str] | None) -> None:
    group = pool(dict.fromkeys(range(6), "same"), {6: "x", 7: "y"})
    selections = select(group, dedupe=dedupe, failures=0)
    assert [None if s is None else [group.texts[p.rollout_index] for p in s.peers] for s in selections[:6]] == [
        texts
    ] * 6


@pytest.mark.parametrize("policy", ["skip", "failure_only"])
def test_successes_that_read_like_the_target_are_no_reason_to_show_failures_alone(policy: str) -> None:
    assert select(CLONES, when_no_success=policy)[:2] == [None, None]
    for dedupe in ("peers", "none"):
        chosen = select(CLONES, when_no_success=policy, dedupe=dedupe)
        assert [shown(s) for s in chosen[:2]] == [((1,), (2,)), ((0,), (2,))]


def test_a_failure_that_reads_like_a_success_is_no_failure_only_target_either() -> None:
    told_apart_by_their_thinking = pool({0: "same"}, {1: "same", 2: "x"})
    assert select(told_apart_by_their_thinking, when_no_success="failure_only")[1] is None


def test_a_target_without_text_has_no_twins() -> None:
    assert select(pool({0: "", 1: ""}, {2: "x"}), when_no_success="failure_only")[0] == Selection((failure(2),))


def test_what_is_required_counts_in_the_group_whatever_is_shown() -> None:
    """Arms that show different peers learn from the same targets."""
    group = pool({0: "a", 1: "b", 2: "c"}, {3: "x", 4: "y"})
    require = {"successes": 2, "failures": 2}
    for successes, failures in ((1, 0), (0, 1), (2, 1), ("all", "all")):
        found = select(group, successes=successes, failures=failures, require=require)
        assert [s is not None for s in found] == [True, True, True, False, False]
    found = select(group, require={"successes": 3})
    assert [s is not None for s in found] == [False, False, False, True, True]


def test_what_is_required_counts_equal_texts_as_dedupe_does() -> None:
    found = {
        dedupe: [s is not None for s in select(TWINS, dedupe=dedupe, require={"successes": 2})]
        for dedupe in ("all", "peers", "none")
    }
    assert found == {
        "all": [False, False, False, True, True],
        "peers": [True, True, False, True, True],
        "none": [True, True, True, True, True],
    }


def test_failures_without_feedback_are_passed_over_where_feedback_is_shown() -> None:
    group = Candidates(0, ("a", "x", "y"), (1, 1, 1), (0,), (1, 2), ("", "", "wrong"))
    assert [shown(s) for s in select(group, successes=0, failure_form="feedback")] == [((), (2,)), ((), (2,)), ((), ())]
    assert select(group, successes=0, failure_form="feedback")[2] is None
    assert shown(select(group, successes=0, failure_form="described")[0]) == ((), (1,))


def test_an_all_failed_group_may_show_summaries_of_its_failures() -> None:
    """The authors' row "8 solutions"."""
    failed = pool({}, {0: "x", 1: "y", 2: "z"})
    asked = {"successes": 1, "failures": 0, "summaries": "all"}
    summaries = tuple(Peer("failure", 0, i, summary=True) for i in (1, 2))
    assert select(failed, when_no_success="failure_only", **asked)[0] == Selection(summaries)
    assert select(failed, **asked) == [None] * 3


def test_failures_alone_are_enough_when_no_successes_are_asked_for() -> None:
    assert select(ALL_FAILED, successes=0)[0] == Selection((failure(1),))


def test_all_succeeded_shows_successes_only() -> None:
    assert select(pool({0: "a", 1: "b", 2: "c"}, {}))[0] == Selection((success(2), success(1)))


def test_verifier_error_is_neither_success_nor_failure(chat: Chat) -> None:
    (own,) = candidates_of([make_group(chat, [("a", 1.0), ("b", None), ("c", 0.0)])], chat, PeersConfig())
    assert (own.successes, own.failures) == ((0,), (2,))


def test_thinking_is_stripped_by_two_flags(chat: Chat) -> None:
    group = make_group(chat, [("<think>s</think>a", 1.0), ("<think>f</think>b", 0.0)])
    assert candidates_of([group], chat, PeersConfig())[0].texts == ("a", "b")
    keep_failures = PeersConfig(strip_thinking_failures=False)
    assert candidates_of([group], chat, keep_failures)[0].texts == ("a", "<think>f</think>b")
    keep_successes = PeersConfig(strip_thinking_successes=False)
    assert candidates_of([group], chat, keep_successes)[0].texts == ("<think>s</think>a", "b")
