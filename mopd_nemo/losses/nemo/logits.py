"""A divergence to a teacher from the student's vocabulary-parallel, context-parallel logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mopd_nemo.losses.context_parallel import response_rows
from mopd_nemo.losses.logits import Head, Logits, Tokens, TopK
from mopd_nemo.losses.nemo.protocol import (
    Data,
    Groups,
    GroupsOf,
    NemoAggregation,
    NemoLoss,
    megatron_groups,
    metrics_of,
    token_weights_of,
)
from mopd_nemo.losses.objectives import Divergence, SampledReverseKL
from mopd_nemo.losses.token_loss import token_loss
from mopd_nemo.losses.vocab import Vocab


class DivergenceLoss(NemoLoss):
    """`token_loss` on the logits of a Megatron worker: any support, nothing gathered, no float32 copy of the logits.

    The teacher comes in `data`, with row p of [B, S, ...] about token p + 1, in one of two forms:
        - `teacher_hidden` [B, S, H]: last hidden states, with `teacher_head`: exact, and needed for `full`,
          `student_topk` and the sampled token;
        - `teacher_topk_indices` and `teacher_topk_logits` [B, S, K]: log-probabilities under the full normalisation
          (not raw logits), for `teacher_topk`.
    With `importance_clip`, `generation_logprobs` [B, S] are the sampler's, entry t about token t.

    Args:
        teacher_head: gives this rank's rows [V/TP, H] of the teacher's LM head; called in the worker.
        vocab_size: tokens of the tokenizer; Megatron pads its head beyond.
        watch: also report signals, with top-k signals of this k.
        groups: gives the parallel groups; called in the worker.

    NeMo-RL divides a loss by the context-parallel size, because its own losses are computed in full on every rank of
    that group. This one is a rank's share, and is multiplied by that size first.
    """

    _input = "LOGIT"

    def __init__(
        self,
        objective: Divergence | SampledReverseKL,
        *,
        aggregation: NemoAggregation = "token_mean",
        teacher_head: Callable[[], Tensor] | None = None,
        vocab_size: int | None = None,
        importance_clip: float | None = None,
        watch: int | None = None,
        groups: GroupsOf = megatron_groups,
    ) -> None:
        self._objective = objective
        self._aggregation: NemoAggregation = aggregation
        self._teacher_head = teacher_head
        self._vocab_size = vocab_size
        self._importance_clip = importance_clip
        self._watch = watch
        self._groups = groups

    def __call__(
        self, data: Data, global_valid_seqs: Tensor, global_valid_toks: Tensor, *, logits: Tensor, **_: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss of this rank's rows of a micro-batch: logits [B, S_padded/CP, V/TP]."""
        groups = self._groups()
        weights_BS = token_weights_of(data, self._aggregation, global_valid_seqs, global_valid_toks)
        rows_T, place = _rows(weights_BS > 0, logits.shape[1], groups)
        before = (place[0], place[1] - 1)  # the row that predicts a token lies one position before it
        result = token_loss(
            self._objective,
            Logits(logits.flatten(0, 1), rows_T),
            Tokens(
                data["input_ids"][place],
                sampler_logprobs_T=data["generation_logprobs"][place] if "generation_logprobs" in data else None,
            ),
            self._teacher(data, before, logits),
            weights_T=weights_BS[place],
            importance_clip=self._importance_clip,
            vocab=Vocab(groups.tensor, self._vocab_size),
            watch=self._watch,
        )
        metrics = metrics_of(result.total, data, result.signals, global_valid_toks, groups.context)
        context_ranks = dist.get_world_size(groups.context) if groups.context else 1
        return result.total * context_ranks, metrics

    def _teacher(self, data: Data, before: tuple[Tensor, Tensor], logits: Tensor) -> Head | TopK:
        if "teacher_hidden" in data:
            if self._teacher_head is None:
                raise ValueError("data has teacher_hidden but the loss was made without teacher_head")
            return Head(data["teacher_hidden"][before].to(logits.device), self._teacher_head())
        if "teacher_topk_indices" not in data:
            raise ValueError("data has neither teacher_hidden nor teacher_topk_indices: the divergence needs a teacher")
        ids_TK = data["teacher_topk_indices"][before].to(logits.device, torch.long)
        return TopK(ids_TK, data["teacher_topk_logits"][before].to(logits.device, torch.float32))


def _rows(is_response_BS: Tensor, local_length: int, groups: Groups) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Rows of this rank's flattened logits, and (sequence, position) of the tokens that they predict."""
    ranks = dist.get_world_size(groups.context) if groups.context else 1
    rank = dist.get_rank(groups.context) if groups.context else 0
    length = local_length * ranks  # the logits may be padded beyond the data, to what the ranks can share evenly
    padded_BS = torch.nn.functional.pad(is_response_BS, (0, length - is_response_BS.shape[1]))
    rows_T, tokens_T = response_rows(padded_BS, rank, ranks)
    return rows_T, (tokens_T // length, tokens_T % length)
