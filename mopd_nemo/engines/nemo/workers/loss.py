"""A batch's objectives as one NeMo-RL loss function, on sharded logits.

NeMo-RL calls it with the logits of one rank: its columns of the vocabulary and, under context parallelism, its
positions, of a padded micro-batch or of one packed sequence. The loss is the sum over this rank's response tokens. Each
token brings its weight in the whole step, so the gradients of all ranks add up to that of the step.

Shape suffixes: B sequences, S positions, V local columns, T response tokens of all B sequences, R of them on this
context-parallel rank, M of those in one loss term, P terms, K support.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType
from torch import Tensor
from torch.distributed.tensor import DTensor

from mopd_nemo.engines.nemo.batches import joined
from mopd_nemo.engines.nemo.workers.divergence_loss import Groups, megatron_groups, signals_on
from mopd_nemo.engines.nemo.workers.rows import LocalRows, packed_rows, padded_rows
from mopd_nemo.losses.logits import Head, Logits, Tokens, TopK
from mopd_nemo.losses.objectives import Divergence, LogLikelihood, Objective, PolicyGradient, SampledReverseKL
from mopd_nemo.losses.token_loss import token_loss
from mopd_nemo.losses.vocab import Vocab

SIGNALS = (
    "student/entropy",
    "student/topk_mass",
    "teacher/topk_mass",
    "teacher/entropy",
    "teacher/advantage",
    "teacher/contrast",
    "teacher/sharper",
    "token/weight",
    "topk_overlap",
    "sampler/gap",
    "sampler/ratio",
)
"""Signals that are reported, over the tokens of the first term."""


def _dtensor_groups(logits: Tensor) -> Groups:
    return Groups(logits.device_mesh.get_group() if isinstance(logits, DTensor) else None, None)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The response tokens of a micro-batch whose logits this rank has."""

    logits: Tensor
    """[B·S, V]"""
    index_R: Tensor
    """Rows of `logits`."""
    tokens: Tokens
    teacher: TopK | Head | None
    contrast: Head | None
    """The teacher given failures, where hidden states are kept and the objective reads them."""
    weights_PR: Tensor
    parts: list[Tensor]
    """Per loss term, which of the R tokens have a weight."""


class BatchLoss:
    """The loss that `Policy.train` calls. `batches.train_batch` makes the data that it reads.

    Args:
        objectives: one for each term of the batch. Divergences compare the tokens in the data's `teacher_ids`, or with
            `teacher_hidden` those of their own support.
        importance_clip: as in `token_loss`, for the objectives that compare with a sampler.
        vocab_size: real tokens, without the columns that Megatron pads with.
        watch: k of the top-k signals; None watches nothing.
        student_support: `teacher_ids` are the student's likeliest tokens, not the teacher's.
        backend: of the NeMo-RL policy that calls it.
    """

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGIT
    teacher_head: Tensor | None = None
    """[V/TP, H] for `teacher_hidden`; set in the worker that kept them."""

    def __init__(
        self,
        objectives: Sequence[Objective],
        importance_clip: float | None,
        vocab_size: int,
        watch: int | None,
        student_support: bool,
        backend: Literal["megatron", "dtensor"] = "megatron",
    ) -> None:
        self.objectives = tuple(objectives)
        self.importance_clip = importance_clip
        self.vocab_size = vocab_size
        self.watch = watch
        self.student_support = student_support
        self.backend = backend

    def __call__(
        self, data: Mapping[str, Any], global_valid_seqs: Tensor, global_valid_toks: Tensor, logits: Tensor, **_: Any
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of a micro-batch and its share of the step's metrics, both to be summed."""
        groups = _dtensor_groups(logits) if self.backend == "dtensor" else megatron_groups()
        logits = logits.to_local() if isinstance(logits, DTensor) else logits
        cp_size = dist.get_world_size(groups.context) if groups.context else 1
        rows = _rows(data, logits, self.teacher_head, cp_size, dist.get_rank(groups.context) if groups.context else 0)
        vocab = Vocab(groups.tensor, self.vocab_size)
        totals: dict[str, Tensor] = {}
        parts = []
        for number, objective in enumerate(self.objectives):
            if not len(rows.parts[number]):
                continue
            value, signals = self._part(objective, rows, number, rows.parts[number], vocab)
            parts.append(value)
            totals[f"loss/{number}"] = value.detach()
            totals |= {name: signal.detach().sum() for name, signal in signals.items()}
        # A rank without rows still takes part in the backward pass.
        loss = torch.stack(parts).sum() if parts else rows.logits[:1].float().sum() * 0.0
        totals["loss"] = loss.detach()
        names = ["loss", *(f"loss/{number}" for number in range(len(self.objectives))), *SIGNALS]
        none = loss.new_zeros(())
        sums = torch.stack([totals.get(name, none).float() for name in names])
        if groups.context:  # NeMo-RL reports one of these ranks
            dist.all_reduce(sums, group=groups.context)
        metrics = dict(zip(names, sums.tolist(), strict=True))  # the only wait for the GPU
        # NeMo-RL assumes that every context-parallel rank has the whole loss, and divides by their number.
        return loss * cp_size, metrics | {"num_valid_samples": float(logits.shape[0])}

    def _part(
        self, objective: Objective, rows: _Rows, number: int, chosen_M: Tensor, vocab: Vocab
    ) -> tuple[Tensor, dict[str, Tensor]]:
        student = Logits(rows.logits, rows.index_R[chosen_M])
        tokens = rows.tokens[chosen_M]
        teacher = None if rows.teacher is None else rows.teacher[chosen_M]
        contrast = None
        corrects = objective.reads_sampler
        if isinstance(objective, SampledReverseKL):
            # Its gradient is that of a policy gradient with advantage log Q(y) - log P(y).
            assert isinstance(teacher, TopK)
            with torch.no_grad():
                student_M = -token_loss(LogLikelihood(), student, tokens, vocab=vocab).loss_T
            tokens = replace(tokens, advantages_T=teacher.logprobs_TK.squeeze(-1) - student_M, old_logprobs_T=None)
            objective, teacher = PolicyGradient(), None
        if isinstance(objective, Divergence):
            assert teacher is not None
            if isinstance(teacher, TopK):  # a contrast is in the targets already
                objective = replace(objective, support="teacher_topk", k=teacher.ids_TK.shape[-1], contrast=0.0)
            elif objective.reads_contrast:
                contrast = teacher if rows.contrast is None else rows.contrast[chosen_M]
        else:
            teacher = None
        result = token_loss(
            objective,
            student,
            tokens,
            teacher,
            contrast=contrast,
            weights_T=rows.weights_PR[number, chosen_M],
            importance_clip=self.importance_clip if corrects else None,
            vocab=vocab,
            watch=self.watch if number == 0 else None,
        )
        signals = dict(result.signals)
        if signals and isinstance(teacher, TopK) and self.student_support:
            signals = signals_on(signals, teacher)
        return result.total, {name: value for name, value in signals.items() if name in SIGNALS}


def _rows(data: Mapping[str, Any], logits_BSV: Tensor, head_VH: Tensor | None, cp_size: int, cp_rank: int) -> _Rows:
    device = logits_BSV.device
    *sizes, advantages = torch.stack(
        [data[key].double() for key in ("prompt_lengths", "input_lengths", "advantages")]
    ).tolist()  # one transfer: NeMo-RL has put them on the GPU
    prompts, lengths = ([int(size) for size in part] for part in sizes)
    if cp_size > 1:  # always packed, and NeMo-RL takes packed sequences one by one
        ends = [0, logits_BSV.shape[1] * cp_size]
        local = packed_rows(prompts, lengths, ends, cp_rank, cp_size)
    else:
        local = padded_rows(prompts, lengths)
    index_R = (local.sequence_R * logits_BSV.shape[1] + local.position_R).to(device)
    spans = list(zip(data["input_ids"], prompts, lengths, strict=True))
    ids_T = torch.cat([ids[prompt:length] for ids, prompt, length in spans])
    per_row = [
        torch.full((size - prompt,), own) for prompt, size, own in zip(prompts, lengths, advantages, strict=True)
    ]
    advantages_T = torch.cat(per_row)
    tokens = Tokens(
        _on_this_rank(ids_T, local, device),
        _on_this_rank(advantages_T, local, device),
        *(_on_this_rank(joined(data[key]), local, device) if key in data else None for key in ("old", "sampler")),
    )
    given = {
        name: _on_this_rank(_of_all_rows(data[f"teacher_{name}"]), local, device)
        for name in ("ids", "logprobs", "hidden", "second")
        if f"teacher_{name}" in data
    }
    teacher = contrast = None
    if "ids" in given:
        teacher = TopK(given["ids"].long(), given["logprobs"].float())
    elif "hidden" in given:
        assert head_VH is not None
        teacher = Head(given["hidden"], head_VH)
        contrast = Head(given["second"], head_VH) if "second" in given else None
    weights_PR = joined(data["weights"], axis=-1)[:, local.number_R]
    parts = [weights_R.nonzero().squeeze(-1).to(device) for weights_R in weights_PR]  # computed on the CPU
    return _Rows(logits_BSV.flatten(0, 1), index_R, tokens, teacher, contrast, weights_PR.to(device), parts)


def _of_all_rows(parts: Sequence[Any]) -> Tensor:
    """The targets of a micro-batch's rows in one tensor: those that a worker kept, or those that were sent to it."""
    if not isinstance(parts[0], Tensor):
        return joined(parts)
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _on_this_rank(part_T: Tensor, local: LocalRows, device: torch.device) -> Tensor:
    if len(local.number_R) < local.total:
        part_T = part_T[local.number_R.to(part_T.device)]
    return part_T.to(device, non_blocking=True)
