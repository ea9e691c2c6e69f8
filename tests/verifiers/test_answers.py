import pytest

from mopd_nemo.config.verifiers import FeedbackConfig, VerifierConfig
from mopd_nemo.types import Outcome
from mopd_nemo.verifiers.answers import ArithmeticVerifier, final_answer, gold_text, last_boxed, number_or_text
from mopd_nemo.verifiers.base import AnswerError


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a} then cut \boxed{\frac{1", "a"),
        (r"\boxed{}", ""),
        ("no box", None),
        (r"\boxed {42}", "42"),
        (r"\boxed{\left\{ x=1 \right.}", r"\left\{ x=1 \right."),
        (r"\fbox{42}", "42"),
        (r"\boxed{\boxed{7}}", r"\boxed{7}"),
        # adjacent boxes are one answer
        (r"$\boxed{4}$ and $\boxed{-7}$", "4,-7"),
        (r"\[\boxed{4}\] \[\boxed{-7}\]", "4,-7"),
        (r"$\boxed{4}, \boxed{5}$ or $\boxed{6}$.", "4,5,6"),
        (r"\boxed{1} papers and \boxed{2} bins", "1,2"),
        (r"$x = \boxed{1}$ and $y = \boxed{2}$", "1,2"),
        (r"\boxed{3} \quad \text{and} \quad \boxed{3}", "3"),
        # one that a later one takes back is not
        (r"\boxed{5}. Wait, that is wrong: \boxed{4}", "4"),
        (r"\boxed{5}, or rather \boxed{4}", "4"),
        (r"\boxed{5}, no, \boxed{4}", "4"),
        (r"\boxed{\frac12} = \boxed{0.5}", "0.5"),
        (r"\boxed{5} is what we get for the first part of it. The second: \boxed{6}", "6"),
    ],
)
def test_the_last_complete_box_counts(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("✅ Final Answer: **73**", "73"),
        ("### Final Answer: 42", "42"),
        ("**Answer**: $\\frac12$", "$\\frac12$"),
        ("- **The final answer is:** 42", "42"),
        ("**Final Answer**\n\n42", "42"),
        ("Final Answer: The final answer is $12$. I hope it is correct.", "$12$"),
        ("#### Answer: 8", "8"),
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


def test_plain_numbers_are_one_value_however_written() -> None:
    assert number_or_text("$1{,}000$") == number_or_text("1000.0") == number_or_text("2000/2") == 1000
    assert number_or_text("1e999999999") == "1e999999999"
    assert number_or_text("12,34") == "12,34"


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("#### 18", "18"),
        (5, "5"),
        (r"\boxed{\pi}", r"\pi"),
        (1e-07, "1e-07"),
        (r"\boxed{4} and \boxed{-7}", "4,-7"),
        (" x ", "x"),
    ],
)
def test_gold_answers_in_the_forms_of_datasets(answer: object, gold: str) -> None:
    assert gold_text(answer) == gold


@pytest.mark.parametrize("answer", ["", "  ", None, True, ["1"], {}])
def test_bad_gold_answers_are_refused(answer: object) -> None:
    with pytest.raises(AnswerError):
        gold_text(answer)


arithmetic = ArithmeticVerifier(VerifierConfig())


def test_verdicts_of_arithmetic() -> None:
    assert arithmetic.judge(r"7+5=2 \boxed{2}", "2", True).outcome is Outcome.CORRECT
    assert arithmetic.judge(r"\boxed{3}", "2", True).outcome is Outcome.WRONG
    assert arithmetic.judge("7+5=2", "2", True).outcome is Outcome.BAD_FORMAT
    assert arithmetic.judge("7+5", "2", False).outcome is Outcome.TRUNCATED


def test_feedback_has_the_answer_only_on_request() -> None:
    assert "2" not in arithmetic.judge(r"\boxed{3}", "2", True).feedback
    revealing = ArithmeticVerifier(VerifierConfig(feedback=FeedbackConfig(reveal_gold=True)))
    assert "2" in revealing.judge(r"\boxed{3}", "2", True).feedback
