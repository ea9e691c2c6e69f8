"""The verdicts of a batch of rollouts, judged as each is finished or all at the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future

from mopd_nemo.chat import Chat
from mopd_nemo.thinking import OPEN, opens_thinking
from mopd_nemo.types import Outcome, Problem, Rollout, Verdict
from mopd_nemo.verifiers.pool import VerifierPool

logger = logging.getLogger(__name__)


class PendingVerdicts:
    """Judges the rollouts of some problems, whose ids must differ.

    `add` may be called for any rollout as soon as it is finished; `collect` judges those that were not added, and waits
    for all.

    Args:
        chat: says whether a problem's prompt ends inside a thinking block, as templates of thinking-only models do. Its
            responses then begin in one. None: no prompt does.
    """

    def __init__(self, pool: VerifierPool, chat: Chat | None) -> None:
        self._pool = pool
        self._chat = chat
        self._in_thinking: dict[str, bool] = {}
        self._futures: dict[tuple[str, int], Future[Verdict]] = {}

    def add(self, problem: Problem, sample: int, rollout: Rollout) -> None:
        """Start judging a problem's rollout number `sample`."""
        text = OPEN + rollout.text if self._begins_in_thinking(problem) else rollout.text
        future = self._pool.submit(problem.task, text, problem.answer, rollout.finished)
        self._futures[problem.id, sample] = future

    def _begins_in_thinking(self, problem: Problem) -> bool:
        if self._chat is None:
            return False
        if problem.id not in self._in_thinking:
            prompt = self._chat.decode(problem.prompt_ids, skip_special_tokens=False)
            self._in_thinking[problem.id] = opens_thinking(prompt)
        return self._in_thinking[problem.id]

    def collect(self, problems: Sequence[Problem], samples: Sequence[Sequence[Rollout]]) -> list[tuple[Verdict, ...]]:
        """Verdicts of all samples of all problems, in their order."""
        for problem, rollouts in zip(problems, samples, strict=True):
            for number, rollout in enumerate(rollouts):
                if (problem.id, number) not in self._futures:
                    self.add(problem, number, rollout)
        verdicts = [
            tuple(self._futures[problem.id, number].result() for number in range(len(rollouts)))
            for problem, rollouts in zip(problems, samples, strict=True)
        ]
        errors = [v.details["error"] for group in verdicts for v in group if v.outcome is Outcome.VERIFIER_ERROR]
        if errors:
            total = sum(map(len, verdicts))
            logger.warning("%d of %d responses could not be judged; the first: %s", len(errors), total, errors[0])
        return verdicts
