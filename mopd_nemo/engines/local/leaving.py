"""Rows that are finished leave a batch, and as few as possible of the others move.

Shape suffixes: L layers, B rows, K key-value heads, C positions, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def without(ended_B: Tensor) -> Tensor:
    """The rows to go on with. The last ones take the places of those that ended, the others stay where they are."""
    running = (~ended_B).nonzero().squeeze(-1)
    count = len(running)
    order_B = torch.arange(count, device=ended_B.device)
    order_B[ended_B[:count]] = running[running >= count]
    return order_B


def move(cache_L2BKCD: Tensor, order_B: Tensor) -> None:
    """Bring row `order_B[i]` of a cache to position i; those that stay where they are cost nothing."""
    moved = (order_B != torch.arange(len(order_B), device=order_B.device)).nonzero().squeeze(-1)
    if len(moved):
        cache_L2BKCD[:, :, moved] = cache_L2BKCD[:, :, order_B[moved]]
