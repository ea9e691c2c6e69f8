"""What counts as a leak, and which of its tokens are masked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mopd_nemo.chat import Chat
from mopd_nemo.config import LeakConfig, Templates
from mopd_nemo.peers.leaks import Leak, find_leaks, leak_metrics, leaking_tokens
from mopd_nemo.types import RolloutGroup
from tests.conftest import make_group

SOLUTION = "First add seven and five to get twelve then keep its last digit alone which is two"


def leaks_of(group: RolloutGroup, *context: str, words: int = 12) -> list[tuple[Leak, ...]]:
    return find_leaks([group], context or ("peers",), Templates(), LeakConfig(words=words))[0]


def told(chat: Chat, *texts: str, question: str = "What is 7+5 modulo 10?", privileged: str = SOLUTION) -> RolloutGroup:
    group = make_group(chat, [(text, 1.0) for text in texts], messages=({"role": "user", "content": question},))
    return replace(group, problem=replace(group.problem, privileged=privileged))


@pytest.mark.parametrize(
    ("text", "leaked"),
    [
        ("last correct solution of this problem: 2", "correct solution of this problem"),
        ("7+5=2\n\nANOTHER  correct\nsolution", "ANOTHER  correct\nsolution"),
        ("so 2. Now solve the problem above correctly.", "Now solve the problem above correctly"),
        ("a correct solution is 2", None),
        ("The attempt failed and its result is wrong", None),
        ("[...]", None),
        ("", None),
    ],
)
def test_words_of_our_templates_leak(chat: Chat, text: str, leaked: str | None) -> None:
    (found,) = leaks_of(told(chat, text))
    assert [text[leak.start : leak.end] for leak in found] == ([leaked] if leaked else [])
    assert all(leak.kind == "template" for leak in found)


def test_long_spans_of_privileged_text_leak_where_a_context_shows_it(chat: Chat) -> None:
    said = "I think: " + " ".join(SOLUTION.split()[2:15])
    short = " ".join(SOLUTION.split()[2:13])
    group = told(chat, said.upper(), short)
    found = leaks_of(group, "privileged")
    assert [[leak.kind for leak in own] for own in found] == [["privileged"], []]
    assert leaks_of(group, "privileged", words=11)[1], "eleven words"
    assert leaks_of(group, "peers") == [(), ()], "nobody was shown it"


def test_what_the_question_says_does_not_leak(chat: Chat) -> None:
    heading = "A correct solution of this problem"
    asked = told(chat, heading, SOLUTION, question=f"Write: {heading}: {SOLUTION}")
    assert leaks_of(asked, "privileged") == [(), ()]


def test_rates_are_over_all_rollouts(chat: Chat) -> None:
    group = told(chat, "Another correct solution", SOLUTION, "2", "3")
    found = leak_metrics([leaks_of(group, "privileged")])
    assert found == {"leak/rate": 0.5, "leak/template": 0.25, "leak/privileged": 0.25}


@pytest.mark.parametrize("before", ["", "7+5=2\n", "naïve 🙂 √ "])
def test_masked_tokens_are_those_of_the_leak(chat: Chat, before: str) -> None:
    group = told(chat, f"{before}Now solve the problem above correctly.\n\\boxed{{2}}")
    rollout = group.rollouts[0]
    masked = leaking_tokens(leaks_of(group)[0], rollout.response_ids, chat)
    assert list(masked) == list(range(masked[0], masked[-1] + 1))
    text = chat.decode([rollout.response_ids[position] for position in masked])
    assert text.strip().rstrip(".") == "Now solve the problem above correctly"
