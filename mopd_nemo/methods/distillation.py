"""What the on-policy distillation methods share: contexts become teacher rows under one divergence."""

from __future__ import annotations

from collections.abc import Sequence

from mopd_nemo.config import DivergenceConfig
from mopd_nemo.lesson import Lesson, Part
from mopd_nemo.losses.objectives import Divergence, Objective, SampledReverseKL
from mopd_nemo.methods.base import train_row
from mopd_nemo.peers.contexts import PeerContext
from mopd_nemo.peers.statistics import context_metrics
from mopd_nemo.types import RolloutGroup


def distil(groups: Sequence[RolloutGroup], contexts: list[list[PeerContext]], divergence: DivergenceConfig) -> Lesson:
    """One row for each rollout whose context says something, all under one divergence (paper eq. 5)."""
    rows = [
        train_row(groups, g, r, teacher_prompt_ids=context.prompt_ids)
        for g, members in enumerate(contexts)
        for r, context in enumerate(members)
        if context.prompt_ids is not None
    ]
    part = Part(divergence_objective(divergence), tuple(range(len(rows))))
    return Lesson(rows, [part] if rows else [], context_metrics(contexts), contexts)


def divergence_objective(config: DivergenceConfig) -> Objective:
    """The configured objective."""
    if config.support == "sampled":
        return SampledReverseKL()
    return Divergence(config.kind, alpha=config.alpha, support=config.support, k=config.k, tail=config.tail)
