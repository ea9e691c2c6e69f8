"""Policy gradient: advantages within a group, the clipped objective, weights between sampler and trainer.

Shape suffix: T response tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Log-ratios are held within ± this before exp, so that one stray token cannot become infinite."""


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


def clipped_policy_gradient(
    logprobs_T: Tensor, old_logprobs_T: Tensor | None, advantages_T: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """-min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A) with r = P(y_t) / P_old(y_t), per token.

    Without `old_logprobs_T` the policy has not moved since it sampled: r is 1 and only its gradient matters.
    """
    old_T = logprobs_T.detach() if old_logprobs_T is None else old_logprobs_T
    ratio_T = (logprobs_T - old_T).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    clipped_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)


def importance_weights(trainer_logprobs_T: Tensor, sampler_logprobs_T: Tensor, clip: float = 2.0) -> Tensor:
    """min(P_trainer(y_t) / P_sampler(y_t), clip), without gradient.

    Corrects for a sampler (another engine, another precision) that drew y_t from not quite the trainer's P.
    """
    log_ratio_T = trainer_logprobs_T.detach() - sampler_logprobs_T
    return log_ratio_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().clamp(max=clip)
