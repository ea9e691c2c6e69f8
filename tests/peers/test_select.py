import pytest

from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig
from mopd_nemo.peers.select import Candidates, Peer, Selection, candidates_of, select_peers
from tests.conftest import make_group


def pool(successes: dict[int, str], failures: dict[int, str]) -> Candidates:
    texts = successes | failures
    return Candidates(
        group_index=0,
        texts=tuple(texts[i] for i in range(len(texts))),
        lengths=tuple(len(texts[i]) for i in range(len(texts))),
        successes=tuple(successes),
        failures=tuple(failures),
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


def select(
    candidates: Candidates, seed: str = "s", feedback: bool = False, **settings: object
) -> list[Selection | None]:
    return select_peers(candidates, [feedback] * len(candidates.texts), PeersConfig.model_validate(settings), seed)


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
    for target, selection in enumerate(select(group, successes=wanted[0], failures=wanted[1], min_successes=0)):
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


ALL_FAILED = pool({}, {0: "x", 1: "y"})
LONE_SUCCESS = pool({0: "a"}, {1: "x"})


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("skip", None),
        ("failure_only", Selection((failure(1),))),
        ("feedback", Selection(feedback=True)),
        ("plain", Selection()),
    ],
)
@pytest.mark.parametrize("group", [ALL_FAILED, LONE_SUCCESS])
def test_what_happens_without_a_success_is_a_setting(
    group: Candidates, policy: str, expected: Selection | None
) -> None:
    assert select(group, feedback=True, when_no_success=policy)[0] == expected


def test_feedback_that_is_missing_gives_no_signal() -> None:
    assert select(ALL_FAILED, feedback=False, when_no_success="feedback")[0] is None


def test_min_successes_asks_for_more_than_one() -> None:
    two = pool({0: "a", 1: "b"}, {2: "x", 3: "y"})
    selections = select(two, min_successes=2)
    assert [s is not None for s in selections] == [False, False, True, True]


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
