import random

from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig
from mopd_nemo.peers.render import build_contexts
from mopd_nemo.types import RolloutGroup
from tests.conftest import make_group


def make_groups(chat: Chat, num_groups: int = 3) -> list[RolloutGroup]:
    """Groups of four successes and four failures of many lengths; every text names its group and outcome."""
    rng = random.Random(0)
    groups = []
    for g in range(num_groups):
        words = [("right", 1.0)] * 4 + [("wrong", 0.0)] * 4
        groups.append(
            make_group(chat, [(f"{w} g{g}r{r} " + "x " * rng.randint(1, 60), s) for r, (w, s) in enumerate(words)])
        )
    return groups


def contexts(chat: Chat, groups: list[RolloutGroup], **settings: object) -> list[list[str]]:
    built = build_contexts(groups, chat, PeersConfig.model_validate({"failures": 1} | settings), "step 1")
    return [[chat.decode(c.prompt_ids or (), skip_special_tokens=False) for c in group] for group in built]


def test_no_control_shows_own_peers_only(chat: Chat) -> None:
    for g, group in enumerate(contexts(chat, make_groups(chat))):
        assert all(f"right g{g}" in text and f"wrong g{g}" in text for text in group)


def test_random_peer_keeps_headings_and_number_but_not_outcomes(chat: Chat) -> None:
    groups = make_groups(chat)
    texts = contexts(chat, groups, control="random_peer")
    flat = [text for group in texts for text in group]
    assert all(t.count("correct solution") == 2 and t.count("A failed attempt") == 1 for t in flat)
    mislabelled = [t for t in flat if "wrong g" in t.split("A failed attempt")[0]]
    assert 0.5 < len(mislabelled) / len(flat) < 1.0
    for g, group in enumerate(texts):
        assert all(f"g{g}r{r} " not in text for r, text in enumerate(group)), "never the target itself"
        assert not any(f"g{other}r" in text for other in range(3) if other != g for text in group)
    assert texts == contexts(chat, groups, control="random_peer"), "seeded"


def test_unrelated_prompt_shows_the_same_outcomes_of_other_problems_at_matched_length(chat: Chat) -> None:
    groups = make_groups(chat, num_groups=12)
    regular, controlled = contexts(chat, groups), contexts(chat, groups, control="unrelated_prompt")
    for g, (plain, other) in enumerate(zip(regular, controlled, strict=True)):
        for a, b in zip(plain, other, strict=True):
            assert f"g{g}r" not in b
            assert "right" in b.split("A failed attempt")[0] and "wrong" in b.split("A failed attempt")[1]
            assert abs(len(chat.encode(a)) - len(chat.encode(b))) < 0.1 * len(chat.encode(a)) + 8


def test_success_only_fills_with_own_then_foreign_successes(chat: Chat) -> None:
    groups = make_groups(chat)
    texts = contexts(chat, groups, control="success_only")
    assert all("wrong" not in text and text.count("correct solution") == 3 for group in texts for text in group)
    assert not any("g1r" in text for text in texts[0])
    scarce = contexts(chat, groups, control="success_only", successes="all", failures=2)
    target_0, target_4 = scarce[0][0], scarce[0][4]
    assert target_0.count("right g0") == 3 and target_0.count("right") == 5
    assert target_4.count("right g0") == 4 and target_4.count("right") == 6


def test_targets_without_signal_stay_so(chat: Chat) -> None:
    failed = make_group(chat, [("a", 0.0), ("b", 0.0)])
    for control in ("random_peer", "unrelated_prompt", "success_only"):
        peers = PeersConfig.model_validate({"failures": 1, "control": control})
        built = build_contexts([failed, *make_groups(chat)], chat, peers, "s")
        assert all(context.prompt_ids is None for context in built[0])
