"""Offline distillation by teacher forcing (paper section 5.4, "GKD"): fit the student to what the teacher wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from mopd_nemo.lesson import Lesson, Part
from mopd_nemo.losses.objectives import LogLikelihood
from mopd_nemo.methods.base import Method, signal, train_row
from mopd_nemo.types import RolloutGroup


class Gkd(Method):
    """Maximum likelihood of the teacher's completions, right and wrong ones alike, as in the paper."""

    writer: ClassVar[Literal["student", "teacher"]] = "teacher"

    def build(self, groups: Sequence[RolloutGroup], step: int) -> Lesson:
        """Every completion is a row."""
        rows = [train_row(groups, g, r) for g, group in enumerate(groups) for r in range(len(group.rollouts))]
        parts = [Part(LogLikelihood(), tuple(range(len(rows))))]
        return Lesson(rows, parts, signal(parts, groups))
