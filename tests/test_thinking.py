import pytest

from mopd_nemo.thinking import after_thinking, opens_thinking, strip_thinking


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        ("plain answer", "plain answer"),
        ("<think>secret</think>answer", "answer"),
        ("<think>a</think>one<think>b</think>two", "onetwo"),
        ("before <think>cut off in the middle", "before"),
        ("secret that began in the prompt</think>\nanswer", "answer"),
        ("secret</think>answer<think>more, cut", "answer"),
        ("<think>\nline\nline\n</think>\n\nanswer", "answer"),
        ("<think>all of it", ""),
    ],
)
def test_thinking_is_removed(text: str, visible: str) -> None:
    assert strip_thinking(text) == visible


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a</think>b</think>c", "c"),
        ("<think>a", ""),
        ("<think>a</think>b<think>c", "b"),
        ("a<think>b", "a"),
        ("plain", "plain"),
        ("<think>a<think>b</think>c", "c"),
    ],
)
def test_what_is_judged(text: str, answer: str) -> None:
    assert after_thinking(text) == answer


def test_response_that_never_leaves_thinking_opened_by_the_prompt_shows_nothing() -> None:
    assert strip_thinking("still thinking", opened_in_prompt=True) == ""
    assert strip_thinking("thought</think>answer", opened_in_prompt=True) == "answer"


def test_prompt_that_ends_inside_thinking_is_recognised() -> None:
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_thinking("<|im_start|>assistant\n")
