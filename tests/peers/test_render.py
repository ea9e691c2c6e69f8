import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig
from mopd_nemo.peers.render import fair_budgets, render_user_turn, summary_of
from mopd_nemo.peers.sources import ContextSection


@given(st.lists(st.integers(0, 500), min_size=1, max_size=9), st.integers(-10, 2000))
def test_budgets_fit_and_waste_nothing(wanted: list[int], room: int) -> None:
    budgets = fair_budgets(wanted, room)
    assert all(0 <= budget <= want for budget, want in zip(budgets, wanted, strict=True))
    assert sum(budgets) <= max(room, 0)
    assert sum(budgets) >= min(sum(wanted), room - len(wanted))


def test_small_wants_are_met_in_full() -> None:
    assert fair_budgets([10, 100, 100], 110) == [10, 50, 50]


def test_no_sections_leave_the_question_untouched(chat: Chat) -> None:
    assert render_user_turn("question", [], PeersConfig(), chat, room=100).text == "question"


def test_braces_and_template_marks_in_peers_are_kept_verbatim(chat: Chat) -> None:
    peer = r"\boxed{2} {text} {0} {name} \1"
    assert (
        peer
        in render_user_turn("question {text}", [ContextSection("success", peer)], PeersConfig(), chat, room=100).text
    )


@pytest.mark.parametrize("budget", [16, 17, 40])
def test_cut_peer_keeps_start_and_end_within_its_budget(chat: Chat, budget: int) -> None:
    peer = "START " + "7+5=2 " * 100 + "END"
    rendered = render_user_turn(
        "q", [ContextSection("failure", peer)], PeersConfig(max_peer_tokens=budget), chat, room=10_000
    )
    empty = render_user_turn("q", [ContextSection("failure", "")], PeersConfig(), chat, room=0)
    assert rendered.num_truncated == 1
    assert len(chat.encode(rendered.text)) <= len(chat.encode(empty.text)) + budget + 1
    assert "STA" in rendered.text and "ND" in rendered.text and "[...]" in rendered.text


@pytest.mark.parametrize("text", ["语言模型" * 30, "🙂🙃" * 40, "naïve café " * 30, "√½→∞" * 30])
@pytest.mark.parametrize("budget", range(8, 40))
def test_peers_are_cut_at_whole_characters(chat: Chat, text: str, budget: int) -> None:
    rendered = render_user_turn(
        "q", [ContextSection("success", text)], PeersConfig(max_peer_tokens=budget), chat, room=10_000
    )
    assert rendered.num_truncated == 1 and "\ufffd" not in rendered.text


def test_summaries_are_cut_at_whole_characters(chat: Chat) -> None:
    for tokens in range(1, 20):
        assert "\ufffd" not in summary_of("语言模型" * 30, chat, tokens)


def test_summary_block_is_shown_alone(chat: Chat) -> None:
    text = "7+5=2 <summary> add,\nthen cut </summary> bye <summary>no</summary>"
    assert summary_of(text, chat, 64) == "add,\nthen cut"


def test_without_a_block_the_beginning_is_shown(chat: Chat) -> None:
    shown = summary_of("one two three " * 50, chat, 16)
    assert "one two three".startswith(shown[:5]) and len(chat.encode(shown)) <= 16
    assert summary_of("short", chat, 16) == "short"
