"""Group relative policy optimisation: the paper's reinforcement-learning baseline. It needs no teacher."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from mopd_nemo.config import PolicyGradientConfig
from mopd_nemo.losses.objectives import PolicyGradient
from mopd_nemo.methods.base import Method, learned_fraction, train_example, with_reference
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import RolloutGroup


class Grpo(Method):
    """Clipped policy gradient on rewards relative to the group's mean."""

    uses: ClassVar = frozenset({"rollout.importance_clip", "reference"}) | {
        f"policy_gradient.{name}" for name in ("clip_low", "clip_high", "divide_by_std")
    }

    def build(self, groups: Sequence[RolloutGroup], step: int) -> TrainBatch:
        """Rollouts of groups whose rewards are all equal have advantage zero: they count in the mean, at no cost."""
        batch = add_policy_gradient(TrainBatch([], []), groups, self.config.policy_gradient, weight=1.0)
        batch = with_reference(batch, self.config)
        return replace(batch, metrics=batch.metrics | learned_fraction(batch.terms, groups))


def add_policy_gradient(
    batch: TrainBatch, groups: Sequence[RolloutGroup], config: PolicyGradientConfig, weight: float | None = None
) -> TrainBatch:
    """The batch with a policy-gradient term over every judged rollout. Examples that are there already are shared.

    Args:
        weight: of the term; default `policy_gradient.weight`.
    """
    advantages = _advantages(groups, config.divide_by_std)
    examples = {(example.group_index, example.rollout_index): example for example in batch.examples}
    for place, advantage in advantages.items():
        examples[place] = replace(examples.get(place) or train_example(groups, *place), advantage=advantage)
    counted = [number for number, place in enumerate(examples) if place in advantages]
    every = list(examples.values())
    learned = tuple(i for i in counted if every[i].advantage != 0.0)
    zero_loss = tuple(i for i in counted if every[i].advantage == 0.0)
    objective = PolicyGradient(config.clip_low, config.clip_high)
    term = LossTerm(objective, learned, config.weight if weight is None else weight, zero_loss)
    metrics = {"advantage/nonzero": len(learned) / max(len(counted), 1)}
    terms = [*batch.terms, *([term] if learned else [])]
    return replace(batch, examples=every, terms=terms, metrics=batch.metrics | metrics)


def group_advantages(rewards_G: Sequence[float], normalise_std: bool) -> list[float]:
    """Reward minus the group's mean, for each rollout of one prompt.

    `normalise_std` divides by the group's sample standard deviation (GRPO); without it, easy and hard prompts keep
    their scale (Dr. GRPO). A group of equal rewards, or of one rollout, has advantages 0.
    """
    if not rewards_G or max(rewards_G) == min(rewards_G):
        return [0.0] * len(rewards_G)
    mean = statistics.fmean(rewards_G)
    scale = statistics.stdev(rewards_G) if normalise_std else 1.0
    return [(reward - mean) / scale for reward in rewards_G]


def _advantages(groups: Sequence[RolloutGroup], divide_by_std: bool) -> dict[tuple[int, int], float]:
    """Per (group, rollout). A rollout that could not be judged has none and does not move its group's mean."""
    advantages: dict[tuple[int, int], float] = {}
    for group_index, group in enumerate(groups):
        rewards = [group.verdicts[i].reward for i in group.judged]
        for i, advantage in zip(group.judged, group_advantages(rewards, divide_by_std), strict=True):
            advantages[group_index, i] = advantage
    return advantages
