"""A divergence as NeMo-RL's own training loops call a loss: an object that satisfies its `LossFunction` protocol.

It imports without NeMo-RL and can be pickled to its workers. Names in `data` are NeMo-RL's. Losses of micro-batches add
up, so each divides by the global counts that it is given; metrics add up likewise.

The row at a position predicts the token at the next one. Under context parallelism that token may be on another rank,
so ids, weights and targets are looked up in the whole sequences, which every rank has.

Shape suffixes: B sequences, S positions of the whole sequence, L positions on this rank, T response tokens predicted on
this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mopd_nemo.engines.nemo.workers.rows import response_rows
from mopd_nemo.losses.logits import Head, Logits, Tokens, TopK
from mopd_nemo.losses.objectives import Aggregation, Divergence, SampledReverseKL
from mopd_nemo.losses.token_loss import token_loss
from mopd_nemo.losses.vocab import Vocab

Data = Mapping[str, Any]
"""A `BatchedDataDict` of a micro-batch: `input_ids`, `token_mask` [B, S], `sample_mask` [B], and inputs of the loss."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Ranks that hold the rest of the vocabulary and of the sequences; None where this rank holds all."""

    tensor: dist.ProcessGroup | None = None
    context: dist.ProcessGroup | None = None


def megatron_groups() -> Groups:
    """Megatron's groups of this process. Called in the worker: groups cannot be pickled."""
    from megatron.core import parallel_state  # neither the driver nor the DTensor policy need have Megatron

    context = parallel_state.get_context_parallel_group()
    return Groups(parallel_state.get_tensor_model_parallel_group(), context if context.size() > 1 else None)


class DivergenceLoss:
    """`token_loss` on the logits of a Megatron worker: any support, no gather, no float32 copy of the logits.

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
        student_support: the tokens of `teacher_topk_indices` are the student's likeliest, not the teacher's.
        groups: gives the parallel groups; called in the worker.

    NeMo-RL divides a loss by the context-parallel size, because its own losses are computed in full on every rank of
    that group. This one is a rank's share, and is multiplied by that size first.
    """

    def __init__(
        self,
        objective: Divergence | SampledReverseKL,
        *,
        aggregation: Aggregation = "token_mean",
        teacher_head: Callable[[], Tensor] | None = None,
        vocab_size: int | None = None,
        importance_clip: float | None = None,
        watch: int | None = None,
        student_support: bool = False,
        groups: Callable[[], Groups] = megatron_groups,
    ) -> None:
        self._objective = objective
        self._aggregation: Aggregation = aggregation
        self._teacher_head = teacher_head
        self._vocab_size = vocab_size
        self._importance_clip = importance_clip
        self._watch = watch
        self._student_support = student_support
        self._groups = groups

    @property
    def input_type(self) -> Any:
        """NeMo-RL's own enum member, which it compares by identity."""
        from nemo_rl.algorithms.loss.interfaces import LossInputType

        return LossInputType.LOGIT

    @property
    def loss_type(self) -> Any:
        """NeMo-RL's own enum member."""
        from nemo_rl.algorithms.loss.interfaces import LossType

        return LossType.TOKEN_LEVEL

    def __call__(
        self, data: Data, global_valid_seqs: Tensor, global_valid_toks: Tensor, *, logits: Tensor, **_: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss of this rank's rows of a micro-batch: logits [B, S_padded/CP, V/TP]."""
        groups = self._groups()
        weights_BS = _token_weights(data, self._aggregation, global_valid_seqs, global_valid_toks)
        rows_T, place = _rows(weights_BS > 0, logits.shape[1], groups)
        before = (place[0], place[1] - 1)  # a token is predicted by the row one position before it
        teacher = self._teacher(data, before, logits)
        result = token_loss(
            self._objective,
            Logits(logits.flatten(0, 1), rows_T),
            Tokens(
                data["input_ids"][place],
                sampler_logprobs_T=data["generation_logprobs"][place] if "generation_logprobs" in data else None,
            ),
            teacher,
            weights_T=weights_BS[place],
            importance_clip=self._importance_clip,
            vocab=Vocab(groups.tensor, self._vocab_size),
            watch=self._watch,
        )
        signals = signals_on(result.signals, teacher) if self._student_support else result.signals
        metrics = _metrics(result.total, data, signals, global_valid_toks, groups.context)
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


def signals_on(signals: Mapping[str, Tensor], teacher: Head | TopK) -> dict[str, Tensor]:
    """Signals of `token_loss` where a `TopK` names the student's likeliest tokens.

    Their overlap with themselves says nothing; what the teacher gives them is `teacher/topk_mass`.
    """
    kept = {name: signal for name, signal in signals.items() if name != "topk_overlap"}
    return kept | {"teacher/topk_mass": teacher.logprobs_TK.exp().sum(-1)} if isinstance(teacher, TopK) else kept


def _rows(is_response_BS: Tensor, local_length: int, groups: Groups) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Rows of this rank's flattened logits, and (sequence, position) of the tokens that they predict."""
    ranks = dist.get_world_size(groups.context) if groups.context else 1
    rank = dist.get_rank(groups.context) if groups.context else 0
    length = local_length * ranks  # the logits may be padded to a multiple that the ranks share evenly
    padded_BS = torch.nn.functional.pad(is_response_BS, (0, length - is_response_BS.shape[1]))
    rows_T, tokens_T = response_rows(padded_BS, rank, ranks)
    return rows_T, (tokens_T // length, tokens_T % length)


def _token_weights(
    data: Data, aggregation: Aggregation, global_valid_seqs: Tensor, global_valid_toks: Tensor
) -> Tensor:
    """weights_BS of each token in the loss of the step; 0 for prompts, padding and masked samples.

    `token_mean`: 1 / all valid tokens; `sequence_mean`: 1 / (all valid sequences · valid tokens of the sequence). The
    first token of a sequence is predicted by no row and has none.
    """
    mask_BS = data["token_mask"] * data["sample_mask"].unsqueeze(-1)
    mask_BS = torch.cat([torch.zeros_like(mask_BS[:, :1]), mask_BS[:, 1:]], dim=1).float()
    if aggregation == "token_mean":
        return mask_BS / torch.as_tensor(global_valid_toks).clamp(min=1).to(mask_BS.device)
    lengths_B1 = data["token_mask"][:, 1:].sum(-1, keepdim=True).clamp(min=1)
    return mask_BS / lengths_B1 / torch.as_tensor(global_valid_seqs).clamp(min=1).to(mask_BS.device)


def _metrics(
    loss: Tensor, data: Data, signals: dict[str, Tensor], global_valid_toks: Tensor, context: dist.ProcessGroup | None
) -> dict[str, float]:
    """`loss`, `num_valid_samples`, and signals as shares of their means: sums over micro-batches are the means.

    Args:
        signals: per token, of this rank's rows.
        context: where the rows of other ranks are; loss and signals are summed over it.
    """
    names = list(signals)
    total = torch.as_tensor(global_valid_toks).clamp(min=1).to(loss.device)
    values = torch.stack([loss.detach().float(), *(signals[name].sum().float() / total for name in names)])
    if context is not None:
        dist.all_reduce(values, group=context)
    metrics = dict(zip(["loss", *names], values.tolist(), strict=True))
    return {**metrics, "num_valid_samples": float(data["sample_mask"].sum())}
