"""The weight of each token in the loss of an update.

The loss is Σ weight_t · loss_t, with weights fixed by the response lengths of the *whole* update. So it does not depend
on how the examples are split into micro-batches, ordered, packed or spread over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Aggregation = Literal["token_mean", "sequence_mean"]


def token_weights(lengths_N: Sequence[int], aggregation: Aggregation) -> list[float]:
    """Weight of each token of each of N responses, given the lengths of all responses of the update.

    `token_mean`: 1 / Σ lengths. `sequence_mean`: 1 / (N · length). Both sum to 1 over all tokens.
    """
    if not lengths_N:
        return []
    if min(lengths_N) < 1:
        raise ValueError(f"empty response among lengths {list(lengths_N)}")
    if aggregation == "token_mean":
        return [1.0 / sum(lengths_N)] * len(lengths_N)
    return [1.0 / (len(lengths_N) * length) for length in lengths_N]
