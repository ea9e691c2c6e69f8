"""Preference baselines: pairs of a success and a failure of one group, at the same rollout budget."""

from __future__ import annotations

from collections.abc import Sequence

from mopd_nemo import lesson
from mopd_nemo.lesson import Lesson, Part, Preference
from mopd_nemo.methods.base import Method, signal, train_row
from mopd_nemo.peers.groups import distinct
from mopd_nemo.types import RolloutGroup


class Dpo(Method):
    """Direct preference optimisation against a frozen reference, which is this method's teacher."""

    def build(self, groups: Sequence[RolloutGroup], step: int) -> Lesson:
        """The reference reads the student's prompt."""
        objective = lesson.Dpo(self.config.dpo.beta)
        return _pairs(groups, objective, with_reference=True)


class Simpo(Method):
    """Simple preference optimisation: mean log-probabilities, no reference."""

    def build(self, groups: Sequence[RolloutGroup], step: int) -> Lesson:
        """Pairs without a reference."""
        objective = lesson.Simpo(self.config.simpo.beta, self.config.simpo.margin)
        return _pairs(groups, objective, with_reference=False)


def _pairs(groups: Sequence[RolloutGroup], objective: Preference, with_reference: bool) -> Lesson:
    """The i-th distinct success with the i-th distinct failure: no rollout serves twice."""
    rows = []
    for g, group in enumerate(groups):
        successes = distinct(group, group.successes)
        failures = distinct(group, group.failures)
        prompt = group.problem.prompt_ids if with_reference else None
        for pair in zip(successes, failures, strict=False):  # what the longer side has more is left out
            rows += [train_row(groups, g, r, teacher_prompt_ids=prompt) for r in pair]
    parts = [Part(objective, tuple(range(len(rows))))] if rows else []
    return Lesson(rows, parts, signal(parts, groups) | {"pairs": len(rows) / 2})
