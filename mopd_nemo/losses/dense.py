"""Passes over a chunk of logits in plain PyTorch: normalisers, top-k, full-vocabulary divergences, gradients.

With a = log P, b = log Q, p = P, q = Q, and a loss that depends on P through log-probabilities with derivative g_v, the
gradient at logit v is g_v - p_v·Σg. `dense_triton.py` does the same in fewer passes on a GPU.

Shape suffixes: C tokens of a chunk (rows), V local columns, K selected, N chosen tokens, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mopd_nemo.losses.objectives import DivergenceKind

Reduce = Callable[[Tensor], Tensor]
"""Sum over the ranks that hold the other columns."""

BLOCK = 32
"""Columns of a block: near sqrt(V / k) at V = 150,000 and k = 100, where both selections are about equally wide."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of logits with its statistics."""

    values_CV: Tensor
    """Logits, up to a constant of the row."""
    lse_C: Tensor | None
    """Their log-partition, so that values - lse are log-probabilities; None where it is 0."""
    mean_C: Tensor | None
    """Expected value, if `read` was given `mean`."""
    maxima_CB: Tensor | None
    """Maxima of blocks for `exact_topk`, if `read` was given `blocks`."""
    owned: bool
    """The values may be overwritten."""

    @property
    def entropy_C(self) -> Tensor:
        """-Σ P log P of each row, in nats."""
        assert self.mean_C is not None
        return -self.mean_C if self.lse_C is None else self.lse_C - self.mean_C


def read(logits_CV: Tensor, *, whole: bool, mean: bool, blocks: bool, owned: bool) -> Chunk:
    """Normalisers of the local columns.

    Args:
        whole: no other rank holds columns.
        mean: also the expected value.
        blocks: also the maxima of blocks.
        owned: the logits may be overwritten.
    """
    wide = torch.float64 if logits_CV.dtype == torch.float64 else torch.float32
    if whole:
        values_CV, lse_C, owned = logits_CV.log_softmax(-1, dtype=wide), None, True
    else:
        values_CV, owned = logits_CV.to(wide), owned or logits_CV.dtype != wide
        lse_C = values_CV.logsumexp(-1)
    mean_C = None
    if mean:
        mean_C = _dot(torch.exp(values_CV if lse_C is None else values_CV - lse_C[:, None]), values_CV)
    return Chunk(values_CV, lse_C, mean_C, block_maxima(values_CV) if blocks else None, owned)


def support_gradient(student: Chunk, columns_CN: Tensor, inside_CN: Tensor, g_CN: Tensor) -> Tensor:
    """Gradient of a loss with derivative g at the log-probabilities of N distinct columns: g - P·Σg.

    Args:
        inside_CN: which columns are real; the others belong to another rank.
    """
    grad_CV = _logprobs(student).exp_().mul_(-g_CN.sum(-1, keepdim=True))
    return grad_CV.scatter_add_(-1, columns_CN, g_CN.masked_fill(~inside_CN, 0.0))


def full_divergence(
    student: Chunk, teacher: Chunk, kind: DivergenceKind, alpha: float, weights_C: Tensor | None, reduce: Reduce
) -> tuple[Tensor, Tensor | None]:
    """Divergence over the whole vocabulary; with weights also the gradient of Σ weights·divergence at the logits.

    forward KL: p - q · reverse KL: p·(a - b - KL) · JSD: (1-α)·p·(a - m - KL(P‖M)), with m = log M.
    """
    a_CV, b_CV = _logprobs(student), _logprobs(teacher)
    p_CV = a_CV.exp()
    match kind:
        case "forward_kl":
            q_CV = b_CV.exp()
            loss_C = reduce(_dot(q_CV, b_CV.sub_(a_CV)))
            grad_CV = None if weights_C is None else p_CV.sub_(q_CV)
        case "reverse_kl":
            gap_CV = a_CV.sub_(b_CV)
            loss_C = reduce(_dot(p_CV, gap_CV))
            grad_CV = None if weights_C is None else gap_CV.sub_(loss_C[:, None]).mul_(p_CV)
        case "jsd":
            q_CV = b_CV.exp()
            tiny = torch.finfo(p_CV.dtype).tiny  # where both underflow, every term has a factor 0
            m_CV = torch.mul(p_CV, 1.0 - alpha).add_(q_CV, alpha=alpha).clamp_min_(tiny).log_()
            gap_CV = a_CV.sub_(m_CV)
            student_C, teacher_C = reduce(torch.stack([_dot(p_CV, gap_CV), _dot(q_CV, b_CV.sub_(m_CV))]))
            loss_C = (1.0 - alpha) * student_C + alpha * teacher_C
            grad_CV = None if weights_C is None else gap_CV.sub_(student_C[:, None]).mul_(p_CV)
            weights_C = None if weights_C is None else (1.0 - alpha) * weights_C
    return loss_C, None if grad_CV is None or weights_C is None else grad_CV.mul_(weights_C[:, None])


def _logprobs(chunk: Chunk) -> Tensor:
    """values - lse, in place if the values are owned. The result may always be overwritten."""
    if chunk.lse_C is None:
        return chunk.values_CV if chunk.owned else chunk.values_CV.clone()
    return torch.sub(chunk.values_CV, chunk.lse_C[:, None], out=chunk.values_CV if chunk.owned else None)


def _dot(x_CV: Tensor, y_CV: Tensor) -> Tensor:
    return torch.linalg.vecdot(x_CV, y_CV)


def exact_topk(values_CV: Tensor, k: int, block_max_CB: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values and columns of the k largest entries of each row, in no order, in about one pass.

    A selection over a vocabulary of 150,000 reads it many times. The k largest entries are always in the k blocks with
    the largest maxima. So it is enough to take each block's maximum, select k blocks, and select among their entries.

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
