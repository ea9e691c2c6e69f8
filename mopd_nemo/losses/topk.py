"""The k largest of very wide rows, in about one pass.

A selection over a vocabulary of 150,000 reads it many times. The k largest entries always lie in the k blocks with the
largest maxima, so it is enough to take each block's maximum, select k blocks, and select again among their entries.

Shape suffixes: C rows, V columns, K selected, B blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""Columns of a block: near sqrt(V / k) at V = 150,000 and k = 100, where both selections are about equally wide."""


def exact_topk(values_CV: Tensor, k: int, block_max_CB: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values and columns of the k largest entries of each row, in no order.

    Args:
        block_max_CB: maxima of consecutive blocks of `BLOCK` columns, where they are known; the last may be short.
    """
    rows, width = values_CV.shape
    if 4 * k * BLOCK > width:
        return tuple(values_CV.topk(k, dim=-1, sorted=False))
    if block_max_CB is None:
        block_max_CB = block_maxima(values_CV)
    blocks_CK = block_max_CB.topk(k, dim=-1, sorted=False).indices
    columns_CN = (blocks_CK[:, :, None] * BLOCK + torch.arange(BLOCK, device=values_CV.device)).view(rows, -1)
    candidates_CN = values_CV.gather(-1, columns_CN.clamp(max=width - 1))
    if width % BLOCK:
        candidates_CN.masked_fill_(columns_CN >= width, float("-inf"))
    top = candidates_CN.topk(k, dim=-1, sorted=False)
    return top.values, columns_CN.gather(-1, top.indices)


def block_maxima(values_CV: Tensor) -> Tensor:
    """Maximum of each block of `BLOCK` columns; the last block may be short."""
    rows, width = values_CV.shape
    whole = width - width % BLOCK
    maxima = [values_CV[:, :whole].reshape(rows, -1, BLOCK).amax(-1)]
    if whole < width:
        maxima.append(values_CV[:, whole:].amax(-1, keepdim=True))
    return torch.cat(maxima, dim=-1)
