import json
from pathlib import Path

import pytest

from mopd_nemo.config.verifiers import FeedbackConfig, VerifierConfig
from mopd_nemo.types import Outcome
from mopd_nemo.verifiers.math import MathVerifier, equivalent

verifier = MathVerifier(VerifierConfig())


@pytest.mark.parametrize(
    ("gold", "found"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", r"\dfrac12"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        (r"\{1,2,3\}", r"\{3,2,1\}"),
        ("(1,2)", "(1, 2)"),
        ("[0,1)", "[0, 1)"),
        (r"\frac{\pi}{4}", r"\pi/4"),
        ("1234", "1,234"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
        ("10", r"10\text{ cm}"),
        ("x=5", "5"),
    ],
)
def test_equal_answers_in_other_words_are_correct(gold: str, found: str) -> None:
    assert equivalent(gold, found)


@pytest.mark.parametrize(
    ("gold", "found"),
    [(r"\frac{1}{2}", r"\frac{1}{3}"), ("(1,2)", "(2,1)"), ("[0,1)", "[0,1]"), (r"\sqrt{2}", "1.41"), ("5", "-5")],
)
def test_different_answers_are_wrong(gold: str, found: str) -> None:
    assert not equivalent(gold, found)


def test_verdicts() -> None:
    assert verifier.judge(r"so \boxed{4}", "4", True).outcome is Outcome.CORRECT
    wrong = verifier.judge(r"so \boxed{5}", "4", True)
    assert (wrong.reward, wrong.outcome, wrong.details["found"]) == (0.0, Outcome.WRONG, "5")
    assert verifier.judge("no idea", "4", True).outcome is Outcome.BAD_FORMAT
    assert verifier.judge("no idea ye", "4", False).outcome is Outcome.TRUNCATED
    assert verifier.judge(r"\boxed{4} and so on and o", "4", False).outcome is Outcome.CORRECT
    assert verifier.judge(r"\boxed{\]]]]{{}}}", "4", True).outcome is Outcome.WRONG


def test_feedback_has_the_gold_answer_only_on_request() -> None:
    assert "271" not in verifier.judge(r"\boxed{5}", "271", True).feedback
    revealing = MathVerifier(VerifierConfig(feedback=FeedbackConfig(reveal_gold=True)))
    assert "271" in revealing.judge(r"\boxed{5}", "271", True).feedback


def test_real_gsm8k_solutions_are_correct_and_their_neighbours_wrong(shared_data: Path) -> None:
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    for row in map(json.loads, lines):
        gold = row["answer"].rpartition("#### ")[2]
        assert verifier.judge(row["answer"], row["answer"], True).outcome is Outcome.CORRECT
        assert verifier.judge(rf"\boxed{{\${gold}.00}}", row["answer"], True).outcome is Outcome.CORRECT
        assert verifier.judge(rf"\boxed{{{gold}1}}", row["answer"], True).outcome is Outcome.WRONG
