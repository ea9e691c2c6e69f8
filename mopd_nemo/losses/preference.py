"""Losses on pairs of responses to one prompt, from log-probabilities summed over each response.

Shape suffix: N pairs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(
    chosen_N: Tensor, rejected_N: Tensor, reference_chosen_N: Tensor, reference_rejected_N: Tensor, beta: float = 0.1
) -> Tensor:
    """-log σ(β[(log P - log P_ref)(chosen) - (log P - log P_ref)(rejected)]) per pair (Rafailov et al. 2023, eq. 7).

    Args:
        chosen_N: log P of the preferred responses, summed over tokens; the others likewise.
    """
    margin_N = (chosen_N - reference_chosen_N) - (rejected_N - reference_rejected_N)
    return -logsigmoid(beta * margin_N)


def simpo_loss(
    chosen_N: Tensor,
    rejected_N: Tensor,
    chosen_lengths_N: Tensor,
    rejected_lengths_N: Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """-log σ(β·(mean log P(chosen) - mean log P(rejected)) - γ) per pair (Meng et al. 2024, eq. 6).

    Args:
        chosen_N: log P of the preferred responses, summed over tokens.
        chosen_lengths_N: their tokens.
    """
    margin_N = chosen_N / chosen_lengths_N - rejected_N / rejected_lengths_N
    return -logsigmoid(beta * margin_N - gamma)
