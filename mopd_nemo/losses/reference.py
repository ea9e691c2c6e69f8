"""The formulas of every objective, differentiable and in plain PyTorch.

P is the student and Q the teacher (paper eq. 8-10, appendix B). Top-k supports keep the full-vocabulary normalisation,
so the probability outside the support is known exactly and forms one more "tail" token. That makes every divergence
here a divergence: never negative, zero only where P = Q on the support, at most the full-vocabulary value, and equal to
it once k reaches V.

Shape suffixes: T response tokens, V vocabulary, K support, N pairs of responses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mopd_nemo.losses.logits import Tokens
from mopd_nemo.losses.objectives import (
    Divergence,
    DivergenceKind,
    Dpo,
    LogLikelihood,
    Objective,
    PolicyGradient,
    SampledReverseKL,
    Simpo,
    Support,
    Suppression,
    TokenWeights,
)

PLAUSIBLE = 0.1
"""A contrast applies to tokens with at least this share of the likeliest token's probability (Li et al. 2023)."""
CONTRAST_BOUND = 3.0
"""Nats: the largest log-ratio of two teachers that counts. So a token that is rare after failures cannot dominate."""
LOG_RATIO_BOUND = 20.0
"""Log-ratios are held within ± this before exp, so that one stray token cannot become infinite."""


def loss_on_support(objective: Objective, student_TK: Tensor, teacher_TK: Tensor | None, tokens: Tokens) -> Tensor:
    """loss_T of a token objective from log-probabilities of its support.

    Args:
        student_TK: of a divergence's support; for the other objectives of the sampled token alone (K = 1).
        teacher_TK: likewise, for objectives that read a teacher.
    """
    match objective, teacher_TK:
        case Divergence(), Tensor():
            arguments = objective.kind, objective.alpha, objective.tail, objective.entry_clip
            return support_divergence(student_TK, teacher_TK, *arguments)
        case SampledReverseKL(), Tensor():
            return _sampled_reverse_kl(student_TK.squeeze(-1), teacher_TK.squeeze(-1))
        case PolicyGradient(), _:
            assert tokens.advantages_T is not None
            return clipped_policy_gradient(
                student_TK.squeeze(-1),
                tokens.old_logprobs_T,
                tokens.advantages_T,
                objective.clip_low,
                objective.clip_high,
            )
        case Suppression(below=below), _:
            return suppressed(student_TK.squeeze(-1), below)
        case LogLikelihood(), _:
            return -student_TK.squeeze(-1)
    raise TypeError(f"{objective} has no loss per token, or lacks its teacher")


def pair_loss(objective: Objective, logprobs_2N: Tensor, lengths_2N: Tensor, reference_2N: Tensor | None) -> Tensor:
    """loss_N of an objective on pairs.

    Args:
        logprobs_2N: log P of whole responses, summed over tokens: chosen, rejected, chosen, rejected, ...
        lengths_2N: their tokens.
        reference_2N: the reference model's sums, for objectives that read a teacher.
    """
    chosen_N, rejected_N = logprobs_2N[::2], logprobs_2N[1::2]
    match objective:
        case Dpo():
            assert reference_2N is not None
            return dpo_loss(chosen_N, rejected_N, reference_2N[::2], reference_2N[1::2], objective.beta)
        case Simpo():
            lengths = lengths_2N[::2], lengths_2N[1::2]
            return simpo_loss(chosen_N, rejected_N, *lengths, objective.beta, objective.margin)
    raise TypeError(f"{objective} is not taken on pairs")


def token_divergence(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    *,
    kind: DivergenceKind,
    alpha: float = 0.5,
    support: Support = "student_topk",
    k: int = 100,
    tail: bool = True,
    weights: TokenWeights = "none",
    entry_clip: float | None = None,
    contrast: float = 0.0,
    contrast_logits_TV: Tensor | None = None,
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
        weights: multiply by `token_weight`, or for `divergence` by `divergence_weight`.
        entry_clip: most that one outcome adds; see `divergence_entries`.
        contrast: β of `contrasted`, which then takes the teacher's place, except in the choice of the support.
        contrast_logits_TV: logits of the teacher given failures alone, for a contrast.

    Returns:
        loss_T, in nats.
    """
    student_TK = _log_softmax(student_logits_TV)
    teacher_TK = _log_softmax(teacher_logits_TV.detach())
    others = [_log_softmax(contrast_logits_TV.detach())] if contrast_logits_TV is not None and contrast else []
    if support != "full" and k < student_TK.shape[-1]:
        chooser_TV = student_TK.detach() if support == "student_topk" else teacher_TK
        ids_TK = chooser_TV.topk(k, dim=-1).indices
        student_TK, teacher_TK, *others = (x.gather(-1, ids_TK) for x in (student_TK, teacher_TK, *others))
        finish = _with_tail if tail else _renormalised
    else:
        finish = _renormalised
    for other_TK in others:
        teacher_TK = contrasted(teacher_TK, other_TK, contrast, tail=finish is _with_tail)
    student_TK, teacher_TK = finish(student_TK), finish(teacher_TK)
    loss_T = _divergence(student_TK, teacher_TK, kind, alpha, entry_clip)
    if weights == "divergence":
        return loss_T * divergence_weight(loss_T)
    weight_T = token_weight(weights, entropy(student_TK), entropy(teacher_TK), student_TK.shape[-1])
    return loss_T if weight_T is None else loss_T * weight_T


def sampled_reverse_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor, sampled_ids_T: Tensor) -> Tensor:
    """The reverse KL estimated from the sampled token alone, in its score-function form.

    loss_t = stop_gradient(log P(y_t) - log Q(y_t)) · log P(y_t). Its value is no divergence. Its gradient is an
    unbiased estimate of that of KL(P‖Q) when y_t was sampled from P.

    Returns:
        loss_T.
    """
    index_T1 = sampled_ids_T.unsqueeze(-1)
    student_T = _log_softmax(student_logits_TV).gather(-1, index_T1).squeeze(-1)
    teacher_T = _log_softmax(teacher_logits_TV.detach()).gather(-1, index_T1).squeeze(-1)
    return _sampled_reverse_kl(student_T, teacher_T)


def support_divergence(
    student_TK: Tensor,
    teacher_TK: Tensor,
    kind: DivergenceKind,
    alpha: float,
    tail: bool,
    entry_clip: float | None = None,
) -> Tensor:
    """loss_T from the log-probabilities that student and teacher give to the K tokens of a support."""
    finish = _with_tail if tail else _renormalised
    return _divergence(finish(student_TK), finish(teacher_TK), kind, alpha, entry_clip)


def contrasted(success_TK: Tensor, failure_TK: Tensor, beta: float, tail: bool) -> Tensor:
    """Log-probabilities of the target Q_c ∝ Q_S·(Q_S / Q_F)^β on a support.

    Q_S is the teacher given successes, Q_F the teacher given failures alone. The ratio applies to tokens with at least
    `PLAUSIBLE` times the probability of Q_S's likeliest token, up to `CONTRAST_BOUND` nats. For other tokens and for
    the tail it is 1. With β = 0 or Q_F = Q_S, Q_c is Q_S.

    Args:
        success_TK: log Q_S of the support, under the full-vocabulary normalisation; `failure_TK` likewise.
        tail: the mass of Q_S outside the support is one more token. Without it the support is all there is.
    """
    plausible_TK = success_TK >= success_TK.amax(-1, keepdim=True) + math.log(PLAUSIBLE)
    ratio_TK = (success_TK - failure_TK).clamp(-CONTRAST_BOUND, CONTRAST_BOUND).masked_fill(~plausible_TK, 0.0)
    scores_TK = success_TK + beta * ratio_TK
    whole_TK = torch.cat([scores_TK, _with_tail(success_TK)[:, -1:]], dim=-1) if tail else scores_TK
    return scores_TK - whole_TK.logsumexp(-1, keepdim=True)


def token_weight(weights: TokenWeights, student_T: Tensor, teacher_T: Tensor, outcomes: int) -> Tensor | None:
    """Weight of each token by the entropies H(P) and H(Q) of its n outcomes, in [0, 1] and without gradient.

    `sharper`: 1 where H(Q) < H(P), else 0. `student_entropy`: H(P) / ln n; TIP (arXiv 2604.14084) keeps the half of a
    batch's tokens where H(P) is largest. `teacher_certainty`: 1 - H(Q) / ln n; EOPD (arXiv 2603.07079) finds reverse KL
    unstable where H(Q) is large. Each is a function of the token alone, so batching does not matter.

    Args:
        student_T: H(P), in nats; `teacher_T`: H(Q).
        outcomes: n, the tokens of the support and the tail.

    Returns:
        weight_T; None: every token counts in full, or its weight follows from its loss (`divergence_weight`).
    """
    student_T, teacher_T, most = student_T.detach(), teacher_T.detach(), max(math.log(outcomes), 1e-9)
    match weights:
        case "sharper":
            return (teacher_T < student_T).to(student_T.dtype)
        case "student_entropy":
            return (student_T / most).clamp(0.0, 1.0)
        case "teacher_certainty":
            return (1.0 - teacher_T / most).clamp(0.0, 1.0)
    return None


def support_weight(weights: TokenWeights, student_TK: Tensor, teacher_TK: Tensor, tail: bool) -> Tensor | None:
    """`token_weight` from the log-probabilities of a support."""
    finish = _with_tail if tail else _renormalised
    student_TK, teacher_TK = finish(student_TK), finish(teacher_TK)
    return token_weight(weights, entropy(student_TK), entropy(teacher_TK), student_TK.shape[-1])


def divergence_weight(loss_T: Tensor) -> Tensor:
    """1 - exp(-D) of a divergence D, in [0, 1) and without gradient: more where student and teacher disagree more.

    TIP (arXiv 2604.14084) ranks the tokens of a batch by D; this form needs no other token.
    """
    return -torch.expm1(-loss_T.detach()).clamp(max=0.0)


def entropy(logprobs_TK: Tensor) -> Tensor:
    """-Σ p log p of log-distributions, in nats."""
    return -(logprobs_TK.exp() * logprobs_TK.masked_fill(logprobs_TK == -torch.inf, 0.0)).sum(-1)


def divergence_entries(student_TK: Tensor, teacher_TK: Tensor, kind: DivergenceKind, alpha: float) -> Tensor:
    """What each of K outcomes adds to the divergence of two log-distributions: none negative, and their sum is D.

    For `jsd` (1-α)·p·log(p/m) + α·q·log(q/m), as in OPSD (arXiv 2601.18734) and TRL. For a KL p·log(p/q) - p + q: the
    added terms sum to 0. OPSD and miles clip without them. Entries of opposite signs then no longer cancel: a clipped
    forward KL can be negative, and makes the tokens less likely that the teacher wants most.
    """
    match kind:
        case "forward_kl":
            return _kl_entries(teacher_TK, student_TK) - teacher_TK.exp() + student_TK.exp()
        case "reverse_kl":
            return _kl_entries(student_TK, teacher_TK) - student_TK.exp() + teacher_TK.exp()
        case "jsd":
            mixture_TK = _mixture(student_TK, teacher_TK, alpha)
            return (1.0 - alpha) * _kl_entries(student_TK, mixture_TK) + alpha * _kl_entries(teacher_TK, mixture_TK)


def _divergence(
    student_TK: Tensor, teacher_TK: Tensor, kind: DivergenceKind, alpha: float, entry_clip: float | None
) -> Tensor:
    """D between two log-distributions over the same K outcomes, or the sum of its clipped entries."""
    if entry_clip is not None:
        return divergence_entries(student_TK, teacher_TK, kind, alpha).clamp(max=entry_clip).sum(-1)
    match kind:
        case "forward_kl":
            return _kl(teacher_TK, student_TK)
        case "reverse_kl":
            return _kl(student_TK, teacher_TK)
        case "jsd":
            mixture_TK = _mixture(student_TK, teacher_TK, alpha)
            return (1.0 - alpha) * _kl(student_TK, mixture_TK) + alpha * _kl(teacher_TK, mixture_TK)


def _kl(p_TK: Tensor, q_TK: Tensor) -> Tensor:
    """KL(p‖q) of log-distributions, summed over outcomes."""
    return _kl_entries(p_TK, q_TK).sum(-1)


def _kl_entries(p_TK: Tensor, q_TK: Tensor) -> Tensor:
    """p·log(p/q) of each outcome. One of probability 0 under p adds nothing."""
    impossible_TK = p_TK == -torch.inf
    p_TK, q_TK = p_TK.masked_fill(impossible_TK, 0.0), q_TK.masked_fill(impossible_TK, 0.0)
    return (p_TK.exp() * (p_TK - q_TK)).masked_fill(impossible_TK, 0.0)


def _mixture(student_TK: Tensor, teacher_TK: Tensor, alpha: float) -> Tensor:
    """log((1-α)P + αQ)."""
    log_alpha = torch.tensor([1.0 - alpha, alpha], dtype=torch.float64).log().tolist()
    return _logaddexp(student_TK + log_alpha[0], teacher_TK + log_alpha[1])


def _logaddexp(a_TK: Tensor, b_TK: Tensor) -> Tensor:
    """log(e^a + e^b), with gradient zero where both are -inf: PyTorch's gradient there is NaN."""
    impossible_TK = (a_TK == -torch.inf) & (b_TK == -torch.inf)
    sum_TK = torch.logaddexp(a_TK.masked_fill(impossible_TK, 0.0), b_TK.masked_fill(impossible_TK, 0.0))
    return sum_TK.masked_fill(impossible_TK, -torch.inf)


def _with_tail(logprobs_TK: Tensor) -> Tensor:
    """Append log(1 - Σ exp). The mass is clamped to one rounding step below 1, where the tail's gradient is 0."""
    mass_T1 = logprobs_TK.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(logprobs_TK.dtype).eps)
    return torch.cat([logprobs_TK, torch.log(-torch.expm1(mass_T1))], dim=-1)


def _renormalised(logprobs_TK: Tensor) -> Tensor:
    return logprobs_TK - logprobs_TK.logsumexp(-1, keepdim=True)


def _log_softmax(logits_TV: Tensor) -> Tensor:
    wide = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    return torch.log_softmax(logits_TV, dim=-1, dtype=wide)


def _sampled_reverse_kl(student_T: Tensor, teacher_T: Tensor) -> Tensor:
    return (student_T - teacher_T).detach() * student_T


def clipped_policy_gradient(
    logprobs_T: Tensor, old_logprobs_T: Tensor | None, advantages_T: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """-min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A) with r = P(y_t) / P_old(y_t), per token.

    Without `old_logprobs_T` the policy has not moved since it sampled: r is 1 and only its gradient matters.
    """
    old_T = logprobs_T.detach() if old_logprobs_T is None else old_logprobs_T
    ratio_T = (logprobs_T - old_T).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    clipped_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)


def suppressed(logprobs_T: Tensor, below: float) -> Tensor:
    """log P(y_t) where P(y_t) < below, else 0: a policy gradient with the constant advantage -1 on unlikely tokens.

    A control without a teacher: Ding and Zhang (arXiv 2608.31046) find that much of what distillation on the student's
    own responses gains is the suppression of tokens of low log-probability. The bound is ours.
    """
    return logprobs_T * (logprobs_T.detach() < math.log(below))


def importance_weights(trainer_logprobs_T: Tensor, sampler_logprobs_T: Tensor, clip: float = 2.0) -> Tensor:
    """min(P_trainer(y_t) / P_sampler(y_t), clip), without gradient.

    Corrects for a sampler, such as another engine or precision, whose distribution differs slightly from the trainer's.
    """
    log_ratio_T = trainer_logprobs_T.detach() - sampler_logprobs_T
    return log_ratio_T.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().clamp(max=clip)


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
