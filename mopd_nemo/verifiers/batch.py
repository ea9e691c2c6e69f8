"""The verdicts of a batch of rollouts, judged as each is finished or all at the end."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from mopd_nemo.types import Problem, Rollout, Verdict
from mopd_nemo.verifiers.pool import VerifierPool


class Verifying:
    """Judges the rollouts of some problems.

    `add` may be called for any rollout as soon as it is finished, from the thread that generates; `collect` judges
    those that were not added and waits for all.
    """

    def __init__(self, pool: VerifierPool, problems: Sequence[Problem]) -> None:
        self._pool = pool
        self._problems = problems
        self._futures: dict[tuple[int, int], Future[Verdict]] = {}

    def add(self, problem: int, sample: int, rollout: Rollout) -> None:
        """Start judging sample `sample` of problem number `problem`."""
        of = self._problems[problem]
        self._futures[problem, sample] = self._pool.submit(of.task, rollout.text, of.answer, rollout.finished)

    def collect(self, samples: Sequence[Sequence[Rollout]]) -> list[tuple[Verdict, ...]]:
        """Verdicts of all samples, in their order."""
        for problem, rollouts in enumerate(samples):
            for sample, rollout in enumerate(rollouts):
                if (problem, sample) not in self._futures:
                    self.add(problem, sample, rollout)
        return [
            tuple(self._futures[problem, sample].result() for sample in range(len(rollouts)))
            for problem, rollouts in enumerate(samples)
        ]
