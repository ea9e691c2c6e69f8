import json
from pathlib import Path

import pytest

from mopd_nemo.config.verifiers import ChoiceConfig, VerifierConfig
from mopd_nemo.types import Outcome
from mopd_nemo.verifiers.base import AnswerError
from mopd_nemo.verifiers.choice import ChoiceVerifier, gold_letter

strict = ChoiceVerifier(VerifierConfig())
lenient = ChoiceVerifier(VerifierConfig(choice=ChoiceConfig(format="lenient")))

CASES = [
    # response, strict finds, lenient finds
    ("<answer>\nB\n</answer>", "B", "B"),
    ("<answer>A</answer> no: <answer>B</answer>", "B", "B"),
    ("<think><answer>A</answer></think><answer>B</answer>", "B", "B"),
    ("<answer><answer>B</answer></answer>", "B", "B"),
    ("<answer>b</answer>", None, "B"),
    ("<answer>(B)</answer>", None, "B"),
    ("<answer>**B**</answer>", None, "B"),
    ("<answer>B. Water</answer>", None, "B"),
    ("<answer>B: Water</answer>", None, "B"),
    ("B", None, "B"),
    ("b.", None, "B"),
    (r"so \boxed{B}", None, "B"),
    (r"so \boxed{\text{B}}", None, "B"),
    ("The correct answer is B.", None, "B"),
    ("Answer: (B)", None, "B"),
    ("the answer is option B because A is false", None, "B"),
    ("**Answer:** B", None, "B"),
    ("**Answer**: B", None, "B"),
    ("**Final Answer:** **B**", None, "B"),
    ("### Answer: `B`", None, "B"),
    ("ANSWER: $B$", None, "B"),
    (r"Answer: \(B\)", None, "B"),
    (r"Answer: $\mathbf{B}$", None, "B"),
    ("Answer:\n\n**B**", None, "B"),
    ("<answer>Option B</answer>", None, "B"),
    ("<answer>The answer is B.</answer>", None, "B"),
    (r"<answer>\boxed{B}</answer>", None, "B"),
    ("<answer>$B$</answer>", None, "B"),
    ("<answer>**B) Water**</answer>", None, "B"),
    (r"It grows with \boxed{\Delta E}. Answer: B", None, "B"),
    (r"\boxed{3.5 \text{ eV}}, so the correct option is B.", None, "B"),
    ("The answer I chose is B", None, "B"),
    ("The answer that I think fits best is (B).", None, "B"),
    ("My choice would be B", None, "B"),
    ("The correct answer must be option B, as I said", None, "B"),
    ("Option A is wrong. The answer is B because A melts.", None, "B"),
    ("The answer I would give", None, None),
    ("The answer cannot be B", None, None),
    ("The answer can't be C. The answer is B.", None, "B"),
    ("Answer: B and D", None, None),
    ("The answer is (B) or (D).", None, None),
    ("The answer is B and C is wrong.", None, "B"),
    ("The answer is I think unknown", None, None),
    ("The answer is A matter of taste", None, None),
    ("The answer depends on temperature", None, None),
    ("Answer: Carbon", None, None),
    ("Answer: Boron", None, None),
    (r"\boxed{\Delta E}", None, None),
    ("<answer>A or B</answer>", None, None),
    ("<answer>Water</answer>", None, None),
    ("<answer>AB</answer>", None, None),
    ("<answer></answer>", None, None),
    ("<answer>B", None, None),
    ("The answer isn't clear", None, None),
    ("A cat sat.", None, None),
]


@pytest.mark.parametrize(("response", "in_strict", "in_lenient"), CASES)
def test_formats(response: str, in_strict: str | None, in_lenient: str | None) -> None:
    for verifier, found in ((strict, in_strict), (lenient, in_lenient)):
        right = verifier.judge(response, "B", True)
        wrong = verifier.judge(response, "C", True)
        if found is None:
            assert right.outcome is wrong.outcome is Outcome.BAD_FORMAT
        else:
            assert (right.outcome, right.details["found"], right.reward) == (Outcome.CORRECT, found, 1.0)
            assert (wrong.outcome, wrong.reward) == (Outcome.WRONG, 0.0)


def test_a_cut_response_is_truncated_not_badly_formatted() -> None:
    assert strict.judge("<reasoning> well", "B", False).outcome is Outcome.TRUNCATED


def test_feedback_never_names_the_right_option() -> None:
    assert strict.judge("<answer>A</answer>", "D", True).feedback == "The answer A is wrong."


@pytest.mark.parametrize("answer", ["", "AB", 1, None, "4"])
def test_bad_gold_answers_are_refused(answer: object) -> None:
    with pytest.raises(AnswerError):
        gold_letter(answer)


def test_real_rows_of_every_domain(shared_data: Path) -> None:
    for domain in ("biology", "chemistry", "material", "physics"):
        lines = (shared_data / "sciknoweval" / domain / "test.json").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, filter(None, lines)):
            wrong = next(letter for letter in "ABCD" if letter != row["answer"])
            assert strict.judge(f"<answer>\n{row['answer']}\n</answer>", row["answer"], True).reward == 1.0
            verdict = strict.judge(f"<answer>{wrong}</answer>", row["answer"], True)
            assert verdict.reward == 0.0 and f" {row['answer']} " not in verdict.feedback
