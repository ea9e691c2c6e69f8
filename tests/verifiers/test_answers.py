import pytest

from mopd_nemo.verifiers.answers import after_thinking, canonical, final_answer, gold_text, last_boxed
from mopd_nemo.verifiers.base import AnswerError


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a} then cut \boxed{\frac{1", "a"),
        (r"\boxed{}", ""),
        ("no box", None),
    ],
)
def test_the_last_complete_box_counts(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<think>\boxed{1}</think>It is \boxed{2}.", "2"),
        (r"<think>\boxed{1}", "1"),
        ("work\n#### 1,234", "1,234"),
        ("Answer: 7", "7"),
        ("**Final Answer:** 7", "7"),
        ("Therefore the final answer is 12.", "12"),
        ("The final answer is: $x^2$", "$x^2$"),
        (r"The final answer is 3, that is \boxed{4}", "4"),
        ("We know that 7 is prime.", None),
        (r"\boxed{ }", None),
    ],
)
def test_final_answers_are_found_boxed_or_in_words(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_only_closed_thinking_is_left_out() -> None:
    assert after_thinking("a</think>b</think>c") == "c"
    assert after_thinking("<think>a") == "<think>a"


def test_plain_numbers_are_one_value_however_written() -> None:
    assert canonical("$1{,}000$".replace("{,}", ",")) == canonical("1000.0") == canonical("2000/2")
    assert canonical("1e999999999") == "1e999999999"
    assert canonical("12,34") == "12,34"


@pytest.mark.parametrize(("answer", "gold"), [("#### 18", "18"), (5, "5"), (r"\boxed{\pi}", r"\pi"), (" x ", "x")])
def test_gold_answers_in_the_forms_of_datasets(answer: object, gold: str) -> None:
    assert gold_text(answer) == gold


@pytest.mark.parametrize("answer", ["", "  ", None, True, ["1"], {}])
def test_bad_gold_answers_are_refused(answer: object) -> None:
    with pytest.raises(AnswerError):
        gold_text(answer)
