"""Divergences between a student P and a teacher Q at every response token (paper eq. 8-10, appendix B).

Top-k supports keep the full-vocabulary normalisation, so that the probability outside the support is known exactly and
forms one more "tail" token. That makes every objective here a divergence: never negative, zero only where P = Q on the
support, at most the full-vocabulary value, and equal to it once k reaches V.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
Support = Literal["full", "student_topk", "teacher_topk"]


def token_divergence(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    *,
    kind: Kind,
    alpha: float = 0.5,
    support: Support = "student_topk",
    k: int = 100,
    tail: bool = True,
) -> Tensor:
    """Divergence per token, differentiable in the student only.

    Args:
        student_logits_TV: logits of P, any float type; the result has this type, or float32 if it is narrower.
        teacher_logits_TV: logits of Q over the same vocabulary.
        kind: `forward_kl` KL(Q‖P) (eq. 8), `reverse_kl` KL(P‖Q) (eq. 9), or `jsd` (eq. 10, generalised).
        alpha: for `jsd`, the teacher's share of M = (1-α)P + αQ in D = (1-α)·KL(P‖M) + α·KL(Q‖M).
        support: compare all V tokens, or only the k likeliest of the student or the teacher.
        k: size of a top-k support; k ≥ V is the full vocabulary.
        tail: add the mass outside the support as one more token; False renormalises P and Q on the support.

    Returns:
        loss_T, in nats.
    """
    student_TV = _log_softmax(student_logits_TV)
    teacher_TV = _log_softmax(teacher_logits_TV.detach())
    if support == "full" or k >= student_TV.shape[-1]:
        return _divergence(student_TV, teacher_TV, kind, alpha)
    chooser_TV = student_TV.detach() if support == "student_topk" else teacher_TV
    ids_TK = chooser_TV.topk(k, dim=-1).indices
    return support_divergence(student_TV.gather(-1, ids_TK), teacher_TV.gather(-1, ids_TK), kind, alpha, tail)


def sampled_reverse_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor, sampled_ids_T: Tensor) -> Tensor:
    """The reverse KL seen through the sampled token alone, in its score-function form.

    loss_t = stop_gradient(log P(y_t) - log Q(y_t)) · log P(y_t): its value is no divergence, but its gradient is an
    unbiased estimate of that of KL(P‖Q) when y_t was sampled from P.

    Returns:
        loss_T.
    """
    index_T1 = sampled_ids_T.unsqueeze(-1)
    student_T = _log_softmax(student_logits_TV).gather(-1, index_T1).squeeze(-1)
    teacher_T = _log_softmax(teacher_logits_TV.detach()).gather(-1, index_T1).squeeze(-1)
    return (student_T - teacher_T).detach() * student_T


def support_divergence(student_TK: Tensor, teacher_TK: Tensor, kind: Kind, alpha: float, tail: bool) -> Tensor:
    """loss_T from the log-probabilities that student and teacher give to the K tokens of a support."""
    finish = _with_tail if tail else _renormalised
    return _divergence(finish(student_TK), finish(teacher_TK), kind, alpha)


def _divergence(student_TK: Tensor, teacher_TK: Tensor, kind: Kind, alpha: float) -> Tensor:
    """D between two log-distributions over the same K outcomes."""
    match kind:
        case "forward_kl":
            return _kl(teacher_TK, student_TK)
        case "reverse_kl":
            return _kl(student_TK, teacher_TK)
        case "jsd":
            log_alpha = torch.tensor([1.0 - alpha, alpha], dtype=torch.float64).log().tolist()
            mixture_TK = _logaddexp(student_TK + log_alpha[0], teacher_TK + log_alpha[1])
            return (1.0 - alpha) * _kl(student_TK, mixture_TK) + alpha * _kl(teacher_TK, mixture_TK)


def _kl(p_TK: Tensor, q_TK: Tensor) -> Tensor:
    """KL(p‖q) of log-distributions, summed over outcomes. One that p cannot give adds nothing."""
    impossible_TK = p_TK == -torch.inf
    p_TK, q_TK = p_TK.masked_fill(impossible_TK, 0.0), q_TK.masked_fill(impossible_TK, 0.0)
    return (p_TK.exp() * (p_TK - q_TK)).masked_fill(impossible_TK, 0.0).sum(-1)


def _logaddexp(a_TK: Tensor, b_TK: Tensor) -> Tensor:
    """log(e^a + e^b), with a gradient of zero where both are -inf, for which PyTorch's is NaN."""
    impossible_TK = (a_TK == -torch.inf) & (b_TK == -torch.inf)
    sum_TK = torch.logaddexp(a_TK.masked_fill(impossible_TK, 0.0), b_TK.masked_fill(impossible_TK, 0.0))
    return sum_TK.masked_fill(impossible_TK, -torch.inf)


def _with_tail(logprobs_TK: Tensor) -> Tensor:
    """Append log(1 - Σ exp). The mass is kept one rounding step below 1, where the tail's gradient stops."""
    mass_T1 = logprobs_TK.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(logprobs_TK.dtype).eps)
    return torch.cat([logprobs_TK, torch.log(-torch.expm1(mass_T1))], dim=-1)


def _renormalised(logprobs_TK: Tensor) -> Tensor:
    return logprobs_TK - logprobs_TK.logsumexp(-1, keepdim=True)


def _log_softmax(logits_TV: Tensor) -> Tensor:
    wide = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    return torch.log_softmax(logits_TV, dim=-1, dtype=wide)
