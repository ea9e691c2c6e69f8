"""Rows of sequences that are cut over the ranks of a context-parallel group, as Megatron cuts them.

A sequence of S positions is cut into 2W equal pieces; rank r of W holds pieces r and 2W - 1 - r, in this order, so that
all ranks have the same share of causal attention. The row at a position predicts the token at the next one, which may
lie on another rank; therefore ids, weights and targets are looked up in the whole sequences, which every rank has.

The loss itself needs no collective: each rank gives the losses of its own rows, with weights of the whole step, and the
sum over ranks of totals and gradients is that of the whole. Only a loss on whole sequences needs `sum_over_ranks`.

Shape suffixes: B sequences, S positions of the whole sequence, L positions on this rank, T response tokens predicted
on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def positions(length: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """positions_L: which positions of a sequence of `length` a rank holds, in its order.

    Raises:
        ValueError: the length is no multiple of 2·ranks.
    """
    if ranks == 1:
        return torch.arange(length)
    if length % (2 * ranks):
        raise ValueError(f"a sequence of {length} positions cannot be cut over {ranks} ranks: pad to {2 * ranks}·n")
    pieces = torch.arange(length).chunk(2 * ranks)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])


def response_rows(is_response_BS: Tensor, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
    """Where the logits of response tokens are on this rank, and which tokens they predict.

    Args:
        is_response_BS: True at tokens that the loss is about. A first token has no row and is left out.

    Returns:
        rows_T: indices into this rank's logits, flattened to [B·L, V].
        tokens_T: indices of the predicted tokens, into whole sequences flattened to [B·S].
    """
    _, length = is_response_BS.shape
    target_L = (positions(length, rank, ranks) + 1).to(is_response_BS.device)
    wanted_BL = is_response_BS[:, target_L.clamp(max=length - 1)].bool() & (target_L < length)
    sequence_T, row_T = wanted_BL.nonzero(as_tuple=True)
    return sequence_T * len(target_L) + row_T, sequence_T * length + target_L[row_T]


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Σ over ranks, the same on each; one all-reduce of its size. Each rank's part gets the gradient of the sum.

    For the log-probabilities of whole sequences: every rank then makes the same loss from them, and the gradients of
    the ranks' own rows add up to the whole.
    """
    return values if group is None else _SumOverRanks.apply(values, group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        return grad, None
