"""Maximum likelihood of whole responses: the teacher's (GKD), or the student's own successes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mopd_nemo.losses.objectives import LogLikelihood
from mopd_nemo.methods.base import Method, distinct_responses, learned_fraction, train_example
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import RolloutGroup, TrainExample


class Gkd(Method):
    """Offline distillation by teacher forcing (paper section 5.5, "GKD"): fit the student to a teacher's completions.

    `mopd complete` writes the completions. Right and wrong ones are learned alike, as in the paper.
    """

    teachers: ClassVar = ("external",)
    uses: ClassVar = frozenset({"gkd"})
    samples: ClassVar = False

    def build(self, groups: Sequence[RolloutGroup], step: int) -> TrainBatch:
        """Every completion is an example."""
        return _likelihood(groups, [train_example(groups, g, r) for g, r in _every_rollout(groups)])


class VerifiedSft(Method):
    """Fine-tuning on verified successes (rejection sampling)."""

    def build(self, groups: Sequence[RolloutGroup], step: int) -> TrainBatch:
        """Equal responses of a group count once, so that an easy problem does not drown the rest."""
        return _likelihood(
            groups,
            [
                train_example(groups, group_index, rollout_index)
                for group_index, group in enumerate(groups)
                for rollout_index in distinct_responses(group, group.successes)
            ],
        )


def _every_rollout(groups: Sequence[RolloutGroup]) -> list[tuple[int, int]]:
    return [(g, r) for g, group in enumerate(groups) for r in range(len(group.rollouts))]


def _likelihood(groups: Sequence[RolloutGroup], examples: list[TrainExample]) -> TrainBatch:
    terms = [LossTerm(LogLikelihood(), tuple(range(len(examples))))] if examples else []
    return TrainBatch(examples, terms, learned_fraction(terms, groups))
