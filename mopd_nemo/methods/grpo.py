"""Group relative policy optimisation: the paper's reinforcement-learning baseline. No teacher, no teacher's cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mopd_nemo.config import PolicyGradientConfig
from mopd_nemo.lesson import Lesson, Part
from mopd_nemo.losses.objectives import PolicyGradient
from mopd_nemo.losses.policy import group_advantages
from mopd_nemo.methods.base import Method, signal, train_row
from mopd_nemo.types import RolloutGroup


class Grpo(Method):
    """Clipped policy gradient on rewards relative to the group's mean."""

    def build(self, groups: Sequence[RolloutGroup], step: int) -> Lesson:
        """Rollouts of groups whose rewards are all equal have advantage zero: they count in the mean, unread."""
        lesson = add_policy_gradient(Lesson([], []), groups, self.config.policy_gradient, weight=1.0)
        return replace(lesson, metrics=lesson.metrics | signal(lesson.parts, groups))


def add_policy_gradient(
    lesson: Lesson, groups: Sequence[RolloutGroup], config: PolicyGradientConfig, weight: float | None = None
) -> Lesson:
    """The lesson with a policy-gradient part over every judged rollout; rows that are there already are shared.

    Args:
        weight: of the part; default `policy_gradient.weight`.
    """
    advantages = _advantages(groups, config.divide_by_std)
    there = {(row.group_index, row.rollout_index) for row in lesson.rows}
    rows = [*lesson.rows, *(train_row(groups, g, r) for g, r in advantages if (g, r) not in there)]
    rows = [replace(row, advantage=advantages.get((row.group_index, row.rollout_index), 0.0)) for row in rows]
    counted = [i for i, row in enumerate(rows) if (row.group_index, row.rollout_index) in advantages]
    taught = tuple(i for i in counted if rows[i].advantage != 0.0)
    silent = tuple(i for i in counted if rows[i].advantage == 0.0)
    objective = PolicyGradient(config.clip_low, config.clip_high)
    part = Part(objective, taught, config.weight if weight is None else weight, silent)
    metrics = {"advantage/nonzero": len(taught) / max(len(counted), 1)}
    return Lesson(rows, [*lesson.parts, *([part] if taught else [])], lesson.metrics | metrics, lesson.contexts)


def _advantages(groups: Sequence[RolloutGroup], divide_by_std: bool) -> dict[tuple[int, int], float]:
    """Per (group, rollout). A rollout that could not be judged has none and does not move its group's mean."""
    advantages: dict[tuple[int, int], float] = {}
    for g, group in enumerate(groups):
        rewards = [group.verdicts[r].reward for r in group.judged]
        advantages |= {
            (g, r): advantage
            for r, advantage in zip(group.judged, group_advantages(rewards, divide_by_std), strict=True)
        }
    return advantages
