"""Logits of a student or a teacher, given or computed a few rows at a time, and the tokens that a loss reads.

Shape suffixes: T response tokens, R rows of logits of which T are response tokens, C tokens of a chunk, V vocabulary
(the local columns when it is sharded), H hidden size, K support.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mopd_nemo.losses.vocab import Shard

Tensors = tuple[Tensor, Tensor | None, Tensor | None]
Gradients = list[Tensor | None]


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits that are given, of any float type."""

    logits_RV: Tensor
    rows_T: Tensor | None = None
    """The rows of the response tokens; None when every row is one."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.logits_RV.shape[0] if self.rows_T is None else self.rows_T.shape[0]

    @property
    def width(self) -> int:
        """V."""
        return self.logits_RV.shape[-1]

    @property
    def tensors(self) -> Tensors:
        """Those that may need a gradient."""
        return self.logits_RV, None, None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the logits."""
        return self.logits_RV.dtype

    def over(self, tensors: Tensors) -> Logits:
        """The same rows of other tensors."""
        return Logits(tensors[0], self.rows_T)

    def rows(self, shard: Shard, dtype: torch.dtype, needed: Sequence[bool] = ()) -> LogitsRows:
        """The logits by chunks, and their backward pass to the tensors that `needed` marks."""
        return LogitsRows(self, shard, needed)


@dataclass(frozen=True, slots=True)
class Head:
    """Hidden states and the LM head that turns them into logits, a few rows at a time."""

    hidden_TH: Tensor
    """Of the response tokens alone, whole on every rank."""
    weight_VH: Tensor
    bias_V: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.hidden_TH.shape[0]

    @property
    def width(self) -> int:
        """V."""
        return self.weight_VH.shape[0]

    @property
    def tensors(self) -> Tensors:
        """Those that may need a gradient."""
        return self.hidden_TH, self.weight_VH, self.bias_V

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the logits: that of the weight, or autocast's inside its context."""
        device = self.weight_VH.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight_VH.dtype

    def __getitem__(self, part: slice | Tensor) -> Head:
        return Head(self.hidden_TH[part], self.weight_VH, self.bias_V)

    def over(self, tensors: Tensors) -> Head:
        """The same with other tensors."""
        hidden_TH, weight_VH, bias_V = tensors
        assert weight_VH is not None
        return Head(hidden_TH, weight_VH, bias_V)

    def rows(self, shard: Shard, dtype: torch.dtype, needed: Sequence[bool] = ()) -> HeadRows:
        """The logits by chunks, and their backward pass to the tensors that `needed` marks."""
        return HeadRows(self, shard, dtype, needed)


@dataclass(frozen=True, slots=True)
class TopK:
    """A teacher's likeliest tokens."""

    ids_TK: Tensor
    """Global token ids, each at most once in a row."""
    logprobs_TK: Tensor
    """Under the *full-vocabulary* normalisation, so that the mass outside is known."""
    sampled_T: Tensor | None = None
    """Log-probability of the sampled token, for signals alone; None: unknown."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids_TK.shape[0]

    def __getitem__(self, part: slice | Tensor) -> TopK:
        sampled_T = None if self.sampled_T is None else self.sampled_T[part]
        return TopK(self.ids_TK[part], self.logprobs_TK[part], sampled_T)

    def to(self, device: torch.device) -> TopK:
        """The same on a device."""
        sampled_T = None if self.sampled_T is None else self.sampled_T.to(device)
        return TopK(self.ids_TK.to(device), self.logprobs_TK.to(device), sampled_T)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The sampled response tokens, laid end to end, with the values of each that some losses need."""

    ids_T: Tensor
    advantages_T: Tensor | None = None
    """For a policy gradient."""
    old_logprobs_T: Tensor | None = None
    """Of the policy in the denominator of a policy-gradient ratio; None: the student itself."""
    sampler_logprobs_T: Tensor | None = None
    """As the sampler reported them."""

    def __getitem__(self, part: slice | Tensor) -> Tokens:
        optional = (self.advantages_T, self.old_logprobs_T, self.sampler_logprobs_T)
        return Tokens(self.ids_T[part], *(None if x is None else x[part] for x in optional))


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

    def __init__(self, head: Head, shard: Shard, dtype: torch.dtype, needed: Sequence[bool]) -> None:
        self._shard = shard
        self._hidden_TH = head.hidden_TH.detach().to(dtype)
        self._weight_VH = head.weight_VH.detach()[: shard.columns].to(dtype)
        self._bias_V = None if head.bias_V is None else head.bias_V.detach()[: shard.columns].to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._grads: Gradients = [None, None, None]
        for i, tensor in enumerate((head.hidden_TH, head.weight_VH, head.bias_V)):
            if tensor is not None and needed and needed[i]:
                self._grads[i] = torch.zeros_like(tensor.detach(), dtype=tensor.dtype if i == 0 else wide)

    def logits(self, part: slice) -> Tensor:
        """logits_CV of the local columns."""
        if self._bias_V is None:
            return self._hidden_TH[part] @ self._weight_VH.T
        return torch.addmm(self._bias_V, self._hidden_TH[part], self._weight_VH.T)

    def backpropagate(self, part: slice, grad_CV: Tensor) -> None:
        """Add the share of these rows, given the gradient at their logits."""
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

    def __init__(self, source: Logits, shard: Shard, needed: Sequence[bool]) -> None:
        self._source = source
        self._columns = shard.columns
        self._grad_RV = torch.zeros_like(source.logits_RV.detach()) if needed and needed[0] else None

    def logits(self, part: slice) -> Tensor:
        return self._source.logits_RV.detach()[self._rows(part), : self._columns]

    def backpropagate(self, part: slice, grad_CV: Tensor) -> None:
        assert self._grad_RV is not None
        self._grad_RV[self._rows(part), : self._columns] = grad_CV

    def finish(self) -> Gradients:
        """The gradient of the logits."""
        return [self._grad_RV, None, None]

    def _rows(self, part: slice) -> slice | Tensor:
        return part if self._source.rows_T is None else self._source.rows_T[part]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, with the sum in total's type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
