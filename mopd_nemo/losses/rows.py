"""Logits of a few rows at a time, and the way of their gradient back to what made them.

Shape suffixes as in `sources.py`, and C tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopd_nemo.losses.sources import Head, Logits
from mopd_nemo.losses.vocab import Shard

Gradients = list[Tensor | None]


class HeadRows:
    """Rows of a `Head`: one matrix product for the logits, two for the gradients.

    The gradient of the weight is summed over chunks in float32 (float64 for float64), whatever the weight's type. The
    gradient of the hidden states is the local columns' share; `finish` adds the other ranks' (one all-reduce of
    [T, H]).

    Args:
        dtype: precision of the matrix products.
        needed: which of hidden states, weight and bias want a gradient; empty for none.
    """

    owned = True
    """The logits belong to the caller, who may overwrite them."""

    def __init__(self, head: Head, shard: Shard, dtype: torch.dtype, needed: tuple[bool, ...] = ()) -> None:
        self._shard = shard
        self._hidden_TH = head.hidden_TH.to(dtype)
        self._weight_VH = head.weight_VH[: shard.columns].to(dtype)
        self._bias_V = None if head.bias_V is None else head.bias_V[: shard.columns].to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._grads: Gradients = [None, None, None]
        for i, tensor in enumerate((head.hidden_TH, head.weight_VH, head.bias_V)):
            if tensor is not None and needed and needed[i]:
                self._grads[i] = torch.zeros_like(tensor, dtype=tensor.dtype if i == 0 else wide)

    def logits(self, part: slice) -> Tensor:
        """logits_CV of the local columns."""
        if self._bias_V is None:
            return self._hidden_TH[part] @ self._weight_VH.T
        return torch.addmm(self._bias_V, self._hidden_TH[part], self._weight_VH.T)

    def backpropagate(self, part: slice, grad_CV: Tensor) -> None:
        """Take the gradient at the logits of these rows."""
        hidden, weight, bias = self._grads
        if hidden is not None:
            hidden[part] = grad_CV @ self._weight_VH
        if weight is not None:
            _add_product(weight[: self._shard.columns], grad_CV.T, self._hidden_TH[part])
        if bias is not None:
            bias[: self._shard.columns] += grad_CV.sum(0, dtype=bias.dtype)

    def finish(self) -> Gradients:
        """Gradients of hidden states, weight and bias."""
        if self._grads[0] is not None:
            self._shard.sum(self._grads[0])
        return self._grads


class LogitsRows:
    """Rows of `Logits`; their gradient has the type of the logits."""

    owned = False

    def __init__(self, source: Logits, shard: Shard, needed: tuple[bool, ...] = ()) -> None:
        self._source = source
        self._columns = shard.columns
        self._grad_RV = torch.zeros_like(source.logits_RV) if needed and needed[0] else None

    def logits(self, part: slice) -> Tensor:
        return self._source.logits_RV[self._rows(part), : self._columns]

    def backpropagate(self, part: slice, grad_CV: Tensor) -> None:
        assert self._grad_RV is not None
        self._grad_RV[self._rows(part), : self._columns] = grad_CV

    def finish(self) -> Gradients:
        """The gradient of the logits."""
        return [self._grad_RV, None, None]

    def _rows(self, part: slice) -> slice | Tensor:
        return part if self._source.rows_T is None else self._source.rows_T[part]


@dataclass(frozen=True, slots=True)
class Plan:
    """A source of logits without its tensors: enough to make rows of them again in a backward pass."""

    rows_T: Tensor | None
    is_head: bool
    dtype: torch.dtype

    @staticmethod
    def of(source: Head | Logits) -> tuple[Plan, tuple[Tensor, Tensor | None, Tensor | None]]:
        """Plan and tensors of a source, under the autocast setting of this moment."""
        if isinstance(source, Head):
            return Plan(None, True, source.compute_dtype), (source.hidden_TH, source.weight_VH, source.bias_V)
        return Plan(source.rows_T, False, source.logits_RV.dtype), (source.logits_RV, None, None)

    def rows(
        self, tensors: tuple[Tensor | None, ...], shard: Shard, needed: tuple[bool, ...] = ()
    ) -> HeadRows | LogitsRows:
        """Rows over the tensors; `needed` says which of them want a gradient."""
        first, weight_VH, bias_V = (None if x is None else x.detach() for x in tensors)
        assert first is not None
        if not self.is_head:
            return LogitsRows(Logits(first, self.rows_T), shard, needed)
        assert weight_VH is not None
        return HeadRows(Head(first, weight_VH, bias_V), shard, self.dtype, needed)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, with the sum in total's type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
