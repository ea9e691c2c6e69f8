"""Fine-tuning on verified successes (rejection sampling): maximum likelihood of what the verifier accepted."""

from __future__ import annotations

from collections.abc import Sequence

from mopd_nemo.lesson import Lesson, Part
from mopd_nemo.losses.objectives import LogLikelihood
from mopd_nemo.methods.base import Method, signal, train_row
from mopd_nemo.peers.groups import distinct
from mopd_nemo.types import RolloutGroup


class VerifiedSft(Method):
    """Every success once, on the student's own prompt."""

    def build(self, groups: Sequence[RolloutGroup], step: int) -> Lesson:
        """Equal responses of a group count once, so that an easy problem does not drown the rest."""
        rows = [train_row(groups, g, r) for g, group in enumerate(groups) for r in distinct(group, group.successes)]
        parts = [Part(LogLikelihood(), tuple(range(len(rows))))] if rows else []
        return Lesson(rows, parts, signal(parts, groups))
