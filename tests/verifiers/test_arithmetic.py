from mopd_nemo.config.verifiers import FeedbackConfig, VerifierConfig
from mopd_nemo.types import Outcome
from mopd_nemo.verifiers.arithmetic import ArithmeticVerifier

verifier = ArithmeticVerifier(VerifierConfig())


def test_verdicts() -> None:
    assert verifier.judge(r"7+5=2 \boxed{2}", "2", True).outcome is Outcome.CORRECT
    assert verifier.judge(r"\boxed{3}", "2", True).outcome is Outcome.WRONG
    assert verifier.judge("7+5=2", "2", True).outcome is Outcome.BAD_FORMAT
    assert verifier.judge("7+5", "2", False).outcome is Outcome.TRUNCATED


def test_feedback_has_the_answer_only_on_request() -> None:
    assert "2" not in verifier.judge(r"\boxed{3}", "2", True).feedback
    revealing = ArithmeticVerifier(VerifierConfig(feedback=FeedbackConfig(reveal_gold=True)))
    assert "2" in revealing.judge(r"\boxed{3}", "2", True).feedback
