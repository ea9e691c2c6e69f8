"""A control without a teacher: unlikely tokens of the student's own responses are made less likely, right or wrong.

What distillation gains over this, it gains from its teacher (`losses.reference.suppressed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mopd_nemo.losses.objectives import Suppression
from mopd_nemo.methods.base import Method, learned_fraction, train_example
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import RolloutGroup


class Suppress(Method):
    """The same negative advantage for every unlikely token."""

    uses: ClassVar = frozenset({"rollout.importance_clip", "suppress"})

    def build(self, groups: Sequence[RolloutGroup], step: int) -> TrainBatch:
        """Every rollout is an example, whatever its verdict."""
        examples = [train_example(groups, g, r) for g, group in enumerate(groups) for r in range(len(group.rollouts))]
        terms = [LossTerm(Suppression(self.config.suppress.below), tuple(range(len(examples))))]
        return TrainBatch(examples, terms, learned_fraction(terms, groups))
