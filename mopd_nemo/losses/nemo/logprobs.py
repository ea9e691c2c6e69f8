"""Losses from log-probabilities that NeMo-RL has gathered: of the sampled token, or of a teacher's top-k.

NeMo-RL computes them on any of its backends, over tensor- and context-parallel ranks, and every rank of a
context-parallel group then has the whole loss.

Shape suffixes: B sequences, S positions, K support.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mopd_nemo.losses.logits import Tokens
from mopd_nemo.losses.nemo.protocol import Data, NemoAggregation, NemoLoss, metrics_of, token_weights_of
from mopd_nemo.losses.objectives import Divergence, LogLikelihood, PolicyGradient
from mopd_nemo.losses.reference import importance_weights, loss_on_support


class LogprobLoss(NemoLoss):
    """Clipped policy gradient, or supervised fine-tuning.

    From `data`, entry t about token t: `advantages` [B, S]; `prev_logprobs` [B, S] for the ratio, unless
    `on_policy`; `generation_logprobs` [B, S] with `importance_clip`.

    Args:
        on_policy: one update per batch: the policy is its own old one, and no pass for `prev_logprobs` is needed.
        importance_clip: weight tokens by trainer against sampler, at most this.
    """

    _input = "LOGPROB"

    def __init__(
        self,
        objective: PolicyGradient | LogLikelihood,
        *,
        aggregation: NemoAggregation = "token_mean",
        on_policy: bool = False,
        importance_clip: float | None = None,
    ) -> None:
        self._objective = objective
        self._aggregation: NemoAggregation = aggregation
        self._on_policy = on_policy
        self._importance_clip = importance_clip

    def __call__(
        self, data: Data, global_valid_seqs: Tensor, global_valid_toks: Tensor, *, next_token_logprobs: Tensor, **_: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss of a micro-batch: next_token_logprobs [B, S-1]."""
        weights_BS = token_weights_of(data, self._aggregation, global_valid_seqs, global_valid_toks)[:, 1:]
        place = weights_BS.nonzero(as_tuple=True)
        logprobs_T = next_token_logprobs[place]
        gradient = isinstance(self._objective, PolicyGradient)
        tokens = Tokens(
            data["input_ids"][:, 1:][place],
            advantages_T=data["advantages"][:, 1:][place] if gradient else None,
            old_logprobs_T=data["prev_logprobs"][:, 1:][place] if gradient and not self._on_policy else None,
        )
        loss_T = loss_on_support(self._objective, logprobs_T[:, None], None, tokens)
        signals = {}
        if self._importance_clip is not None:
            sampler_T = data["generation_logprobs"][:, 1:][place]
            loss_T = loss_T * importance_weights(logprobs_T, sampler_T, self._importance_clip)
            log_ratio_T = logprobs_T.detach() - sampler_T
            signals |= {"sampler/gap": log_ratio_T.abs(), "sampler/ratio": log_ratio_T.exp()}
        loss = (loss_T * weights_BS[place]).sum() + next_token_logprobs.sum() * 0.0  # a graph without tokens too
        return loss, metrics_of(loss, data, signals, global_valid_toks, None)


class TopKDivergenceLoss(NemoLoss):
    """Divergence on a teacher's top-k from NeMo-RL's own distillation input, on any of its backends.

    `teacher_topk_logits` and `teacher_topk_indices` [B, S, K] in `data`, row p about token p + 1, are log-probabilities
    under the full normalisation. NeMo-RL gathers the student's at the same ids; `zero_outside_topk` makes these
    full-vocabulary log-probabilities too, and `kl_type` only spares it an entropy.
    """

    _input = "DISTILLATION"
    zero_outside_topk = True
    kl_type = "forward"

    def __init__(self, objective: Divergence, *, aggregation: NemoAggregation = "token_mean") -> None:
        if objective.support != "teacher_topk":
            raise ValueError(f"support={objective.support}: NeMo-RL's distillation input has the teacher's top-k alone")
        self._objective = objective
        self._aggregation: NemoAggregation = aggregation

    def __call__(
        self,
        data: Data,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        *,
        student_topk_logprobs: Tensor,
        **_: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss of a micro-batch: student_topk_logprobs [B, S-1, K]."""
        weights_BS = token_weights_of(data, self._aggregation, global_valid_seqs, global_valid_toks)[:, 1:]
        place = weights_BS.nonzero(as_tuple=True)
        student_TK = student_topk_logprobs[place]
        teacher_TK = data["teacher_topk_logits"][:, :-1][place].to(student_TK)
        loss_T = loss_on_support(self._objective, student_TK, teacher_TK, Tokens(data["input_ids"][:, 1:][place]))
        loss = (loss_T * weights_BS[place]).sum() + student_topk_logprobs.sum() * 0.0  # a graph without tokens too
        signals = {"teacher/topk_mass": teacher_TK.exp().sum(-1)}
        return loss, metrics_of(loss, data, signals, global_valid_toks, None)
