"""A verifier in one file: how much of a list of words a response contains, as a graded reward.

Problems name it as `module:Name`. The module must be on the Python path or in the working directory:

    {"id": "1", "prompt": "Name the primary colours.", "answer": ["red", "yellow", "blue"],
     "task": "examples.own_verifier:Words"}

or a config gives it a name of its own, with worker processes that limit its time and memory:

    verifier:
      custom: {words: {judge: "examples.own_verifier:Words", seconds: 5}}

A function does, too, such as `share_of_words` below; what it returns is the reward. A rollout is a success when its
reward reaches `verifier.success_threshold`.
"""

from __future__ import annotations

from typing import Any

from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers.base import AnswerError, Verifier, missing_answer


class Words(Verifier):
    """Reward: the share of the words that the response contains."""

    needs_worker = False  # a few string operations cannot hang

    @staticmethod
    def check_answer(answer: Any) -> None:
        """The gold answer is a list of words."""
        if not isinstance(answer, list) or not answer or not all(isinstance(word, str) for word in answer):
            raise AnswerError(f"answer={answer!r}: give a list of words")

    def judge(self, response: str, answer: Any, finished: bool) -> Verdict:
        """Judge one response."""
        if not response.strip():
            return missing_answer("The response is empty.", finished)
        missing = [word for word in answer if word.lower() not in response.lower()]
        reward = 1.0 - len(missing) / len(answer)
        if not missing:
            return Verdict(reward, Outcome.CORRECT)
        return Verdict(reward, Outcome.WRONG, feedback=f"Not mentioned: {', '.join(missing)}.")


def share_of_words(response: str, answer: Any, finished: bool) -> float:  # noqa: ARG001
    """The same reward without an outcome or feedback of its own."""
    return sum(word.lower() in response.lower() for word in answer) / len(answer)
