"""Preference baselines: pairs of a success and a failure of one group, at the same rollout budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mopd_nemo.losses import objectives
from mopd_nemo.losses.objectives import Objective
from mopd_nemo.methods.base import Method, distinct_responses, learned_fraction, train_example
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import RolloutGroup


class Dpo(Method):
    """Direct preference optimisation against a frozen reference, which is this method's teacher."""

    teachers: ClassVar = ("frozen", "external")
    uses: ClassVar = frozenset({"dpo"})
    pairs: ClassVar = True

    def build(self, groups: Sequence[RolloutGroup], step: int) -> TrainBatch:
        """The reference reads the student's prompt."""
        return _pairs(groups, objectives.Dpo(self.config.dpo.beta))


class Simpo(Method):
    """Simple preference optimisation: mean log-probabilities, no reference."""

    uses: ClassVar = frozenset({"simpo"})
    pairs: ClassVar = True

    def build(self, groups: Sequence[RolloutGroup], step: int) -> TrainBatch:
        """Pairs without a reference."""
        return _pairs(groups, objectives.Simpo(self.config.simpo.beta, self.config.simpo.margin))


def _pairs(groups: Sequence[RolloutGroup], objective: Objective) -> TrainBatch:
    """The i-th distinct success with the i-th distinct failure, so that no rollout is used twice."""
    examples = []
    for group_index, group in enumerate(groups):
        successes, failures = (distinct_responses(group, indices) for indices in (group.successes, group.failures))
        prompt = group.problem.prompt_ids if objective.reads_teacher else None
        for pair in zip(successes, failures, strict=False):  # the longer side's surplus is left out
            examples += [train_example(groups, group_index, i, teacher_prompt_ids=prompt) for i in pair]
    terms = [LossTerm(objective, tuple(range(len(examples))))] if examples else []
    return TrainBatch(examples, terms, learned_fraction(terms, groups) | {"pairs": len(examples) / 2})
