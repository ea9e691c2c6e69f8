"""Passes over a chunk of logits in plain PyTorch: normalisers, full-vocabulary divergences, gradients.

With a = log P, b = log Q, p = P, q = Q, and a loss that depends on P through log-probabilities with derivative g_v, the
gradient at logit v is g_v - p_v·Σg. `dense_triton.py` does the same in fewer passes on a GPU.

Shape suffixes: C tokens of a chunk, V local columns, N chosen tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mopd_nemo.losses.divergence import Kind
from mopd_nemo.losses.topk import block_maxima


def statistics(logits_CV: Tensor, mean: bool, blocks: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-partition over the local columns; if asked, the expected logit, and maxima of blocks for `exact_topk`."""
    wide_CV = _wide(logits_CV)
    lse_C = wide_CV.logsumexp(-1)
    mean_C = (torch.exp(wide_CV - lse_C[:, None]) * wide_CV).sum(-1) if mean else None
    return lse_C, mean_C, block_maxima(logits_CV) if blocks else None


def support_gradient(
    logits_CV: Tensor, lse_C: Tensor, columns_CN: Tensor, inside_CN: Tensor, g_CN: Tensor, owned: bool
) -> Tensor:
    """Gradient of a loss with derivative g at the log-probabilities of N distinct columns: g - P·Σg.

    Args:
        inside_CN: which columns are real; the others belong to another rank.
        owned: the logits may be overwritten.
    """
    grad_CV = _log_softmax(logits_CV, lse_C, owned).exp_().mul_(-g_CN.sum(-1, keepdim=True))
    grad_CV.scatter_add_(-1, columns_CN, g_CN.masked_fill(~inside_CN, 0.0))
    return grad_CV.to(logits_CV.dtype)


def divergence_sums(
    student_CV: Tensor, teacher_CV: Tensor, student_lse_C: Tensor, teacher_lse_C: Tensor, kind: Kind, alpha: float
) -> Tensor:
    """[2, C]: the local columns' share of the divergence, and of the sum that its gradient subtracts."""
    a_CV = _log_softmax(student_CV, student_lse_C, owned=False)
    b_CV = _log_softmax(teacher_CV, teacher_lse_C, owned=False)
    match kind:
        case "forward_kl":
            loss_C = (b_CV.exp() * b_CV.sub_(a_CV)).sum(-1)
            return torch.stack([loss_C, torch.zeros_like(loss_C)])
        case "reverse_kl":
            loss_C = (a_CV.exp() * a_CV.sub_(b_CV)).sum(-1)
            return torch.stack([loss_C, loss_C])
        case "jsd":
            m_CV = torch.logaddexp(a_CV + math.log1p(-alpha), b_CV + math.log(alpha))
            student_C = (a_CV.exp() * a_CV.sub_(m_CV)).sum(-1)
            teacher_C = (b_CV.exp() * b_CV.sub_(m_CV)).sum(-1)
            return torch.stack([(1.0 - alpha) * student_C + alpha * teacher_C, student_C])


def divergence_gradient(
    student_CV: Tensor,
    teacher_CV: Tensor,
    student_lse_C: Tensor,
    teacher_lse_C: Tensor,
    inner_C: Tensor,
    weights_C: Tensor,
    kind: Kind,
    alpha: float,
    owned: bool,
) -> Tensor:
    """Gradient of Σ weights·divergence at the student's logits.

    forward KL: p - q · reverse KL: p·(a - b - inner) · JSD: (1-α)·p·(a - m - inner), with m = log M.

    Args:
        inner_C: the second of `divergence_sums`, over all columns.
        owned: the student's logits may be overwritten.
    """
    a_CV = _log_softmax(student_CV, student_lse_C, owned)
    b_CV = _log_softmax(teacher_CV, teacher_lse_C, owned=False)
    weights_C1, inner_C1 = weights_C[:, None], inner_C[:, None]
    match kind:
        case "forward_kl":
            grad_CV = a_CV.exp_().sub_(b_CV.exp_()).mul_(weights_C1)
        case "reverse_kl":
            p_CV = a_CV.exp()
            grad_CV = a_CV.sub_(b_CV).sub_(inner_C1).mul_(p_CV).mul_(weights_C1)
        case "jsd":
            m_CV = torch.logaddexp(a_CV + math.log1p(-alpha), b_CV.add_(math.log(alpha)))
            p_CV = a_CV.exp()
            grad_CV = a_CV.sub_(m_CV).sub_(inner_C1).mul_(p_CV).mul_((1.0 - alpha) * weights_C1)
    return grad_CV.to(student_CV.dtype)


def _wide(logits_CV: Tensor) -> Tensor:
    return logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()


def _log_softmax(logits_CV: Tensor, lse_C: Tensor, owned: bool) -> Tensor:
    wide_CV = _wide(logits_CV)
    if wide_CV is not logits_CV or owned:
        return wide_CV.sub_(lse_C[:, None])
    return wide_CV - lse_C[:, None]
