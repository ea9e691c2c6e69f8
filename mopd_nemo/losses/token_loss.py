"""The one loss that engines call: any objective, per response token, without a whole [tokens, vocabulary] tensor.

Rows are taken a chunk at a time: the logits of the chunk, the loss, and at once the gradient at those logits, which a
head turns into gradients of its hidden states and weight. Where the weight of every token is known beforehand, this
happens in the forward pass and costs four matrix products: student logits, teacher logits, and two for the gradients.
Otherwise the backward pass computes the logits again.

Shape suffixes: T response tokens, C tokens of a chunk, V local columns of the vocabulary, H hidden size, K support, N
chosen tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopd_nemo.losses.chunk import ChunkLoss
from mopd_nemo.losses.logits import Gradients, Head, Logits, Tensors, Tokens, TopK
from mopd_nemo.losses.objectives import Divergence, Objective, SampledReverseKL
from mopd_nemo.losses.vocab import Vocab

LOGIT_BUDGET = {"cpu": 2**22, "cuda": 2**29}
"""Logits of a chunk, as tokens × local columns: the size of a CPU's cache; 1 GiB in bfloat16 on a GPU."""

MIN_CHUNK = 256
"""Fewer rows would make matrix products wait for the head's weight."""


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Result of `token_loss`."""

    total: Tensor
    """Σ weights·loss, or Σ loss without weights; differentiable."""
    loss_T: Tensor
    """Per token; differentiable only without weights."""
    signals: dict[str, Tensor]
    """Per-token diagnostics (`ChunkLoss.signal_names`) if `watch` is given; not differentiable."""


def token_loss(
    objective: Objective,
    student: Head | Logits,
    tokens: Tokens,
    teacher: Head | Logits | TopK | None = None,
    *,
    contrast: Head | Logits | None = None,
    weights_T: Tensor | None = None,
    importance_clip: float | None = None,
    vocab: Vocab | None = None,
    chunk_size: int | None = None,
    watch: int | None = None,
) -> TokenLoss:
    """Loss of every response token, differentiable in the student.

    Args:
        objective: what to minimise.
        student: hidden states and head, or logits, of the response tokens; row t predicts token t.
        tokens: the sampled tokens.
        teacher: needed by `Divergence` and `SampledReverseKL`, for `ReferenceKL` the reference; never differentiated.
        contrast: the teacher given failures alone, for an objective that reads it.
        weights_T: weight of each token in the total, such as `token_weights` gives. With a `Head`, the forward pass
            then computes the gradient of `total` too, which saves computing the logits twice.
        importance_clip: multiply each loss by `importance_weights` of the student against
            `tokens.sampler_logprobs_T`, at most this.
        vocab: tensor parallelism and padding. The rows must be the same on every rank of the group, each with its own
            columns; the results are the same on every rank, and the gradient of replicated hidden states is whole.
        chunk_size: rows at a time; by default as many as `LOGIT_BUDGET` allows, at least `MIN_CHUNK`.
        watch: also return `signals`, with top-k signals of this k.

    Memory is O(chunk·V), beside the gradients themselves.

    Collectives, where `vocab` has a group, for each chunk of C rows, S = 1 to 3 (student, teacher's logits, contrast):
        - normalisers: one all-gather of S·C float32 (2·S·C with `watch`);
        - log-probabilities of the support: one all-reduce of S·C·(k + 1) float32;
        - `student_topk`, `teacher_topk` and `watch` with each top-k: two all-gathers of k·C numbers;
        - `full`: one all-reduce of 2·C float32;
        and once per call an all-reduce of [T, H] for the hidden states' gradient. The backward pass has none if
        `weights_T` was given with a `Head`; otherwise the same again.

    Raises:
        ValueError: arguments that do not fit together.
    """
    vocab = vocab or Vocab()
    _check(objective, student, tokens, teacher, contrast, importance_clip)
    shard = vocab.shard(student.width)
    device = student.tensors[0].device
    most = chunk_size or max(LOGIT_BUDGET.get(device.type, LOGIT_BUDGET["cuda"]) // shard.columns, MIN_CHUNK)
    chunk_loss = ChunkLoss(
        objective,
        tokens,
        teacher.rows(shard, teacher.compute_dtype) if isinstance(teacher, Head | Logits) else None,
        teacher if isinstance(teacher, TopK) else None,
        shard,
        importance_clip,
        watch,
        None if contrast is None else contrast.rows(shard, contrast.compute_dtype),
    )
    sweep = _Sweep(chunk_loss, student, student.compute_dtype, _chunks(student.num_tokens, most))
    if weights_T is not None and isinstance(student, Head):
        gradients = torch.is_grad_enabled()
        total, loss_T, *signals = _WeightedSum.apply(sweep, gradients, weights_T.detach(), *student.tensors)
    else:
        loss_T, *signals = _PerToken.apply(sweep, *student.tensors)
        total = loss_T.sum() if weights_T is None else (loss_T * weights_T.detach()).sum()
        loss_T = loss_T if weights_T is None else loss_T.detach()
    return TokenLoss(total, loss_T, dict(zip(chunk_loss.signal_names, signals, strict=True)))


@dataclass(frozen=True, slots=True)
class _Sweep:
    """The passes over all chunks."""

    chunk_loss: ChunkLoss
    student: Head | Logits
    dtype: torch.dtype
    """Of the student's logits: autocast's setting may be another one when the backward pass comes."""
    chunks: list[slice]

    def run(
        self, tensors: Tensors, weights_T: Tensor | None, needed: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor], Gradients]:
        """loss_T, signals, and the gradients of Σ weights·loss that are needed."""
        chunk_loss = self.chunk_loss
        device = chunk_loss.tokens.ids_T.device
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            rows = self.student.over(tensors).rows(chunk_loss.shard, self.dtype, needed)
            results = []
            for part in self.chunks:
                weights_C = weights_T[part] if weights_T is not None and any(needed) else None
                loss_C, signals, grad_CV = chunk_loss(part, rows.logits(part), weights_C, rows.owned)
                if grad_CV is not None:
                    rows.backpropagate(part, grad_CV)
                del grad_CV
                results.append((loss_C, *signals))
            gradients = rows.finish()
        if not results:
            results = [[torch.zeros(0, device=device)] * (1 + len(chunk_loss.signal_names))]
        loss_T, *signals = (torch.cat(parts) for parts in zip(*results, strict=True))
        return loss_T, signals, gradients


class _WeightedSum(torch.autograd.Function):
    """Σ weights·loss, whose gradient the forward pass computes; beside it loss_T and signals."""

    @staticmethod
    def forward(ctx: Any, sweep: _Sweep, gradients: bool, weights_T: Tensor, *tensors: Any):
        needed = tuple(ctx.needs_input_grad[3:]) if gradients else ()
        loss_T, signals, grads = sweep.run(tensors, weights_T, needed)
        ctx.dtypes = [None if x is None else x.dtype for x in tensors]
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(loss_T, *signals)
        return (loss_T * weights_T).sum(), loss_T, *signals

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor):  # type: ignore[override]
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, None, *(None if g is None else _scaled(g, grad, dtype) for g, dtype in grads)


def _scaled(value: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """value·factor in one pass; in place where the type allows, because a head's gradient is large.

    In place, autograd's version check then refuses a second backward pass.
    """
    if value.dtype == dtype:
        return value.mul_(factor)
    return torch.mul(value, factor, out=torch.empty_like(value, dtype=dtype))


class _PerToken(torch.autograd.Function):
    """loss_T and signals. The backward pass computes the logits again."""

    @staticmethod
    def forward(ctx: Any, sweep: _Sweep, *tensors: Any):
        loss_T, signals, _ = sweep.run(tensors, None, ())
        ctx.sweep = sweep
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*signals)
        return loss_T, *signals

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, *_: Tensor):  # type: ignore[override]
        tensors = ctx.saved_tensors
        _, _, grads = ctx.sweep.run(tensors, grad_T, tuple(ctx.needs_input_grad[1:]))
        return None, *(None if g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True))


def _chunks(num_tokens: int, most: int) -> list[slice]:
    """Equal chunks of at most `most` rows. Several chunks have a multiple of 128 rows, a tile of a matrix product."""
    if num_tokens == 0:
        return []
    count = -(-num_tokens // most)
    size = -(-num_tokens // count)
    if count > 1 and most >= 128:
        size = min(-(-size // 128) * 128, most)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _check(
    objective: Objective,
    student: Head | Logits,
    tokens: Tokens,
    teacher: Head | Logits | TopK | None,
    contrast: Head | Logits | None,
    clip: float | None,
) -> None:
    counts = {"student": student.num_tokens, "tokens": len(tokens.ids_T)}
    counts |= {name: x.num_tokens for name, x in (("teacher", teacher), ("contrast", contrast)) if x is not None}
    if len(set(counts.values())) != 1:
        raise ValueError(f"rows do not match: {counts}; each response token needs one row of each")
    for other in (teacher, contrast):
        if isinstance(other, Head | Logits) and other.width != student.width:
            raise ValueError(
                f"teacher has {other.width} columns, student {student.width}: they must share a vocabulary"
            )
    if (objective.reads_teacher or objective.reads_reference) and teacher is None:
        raise ValueError(f"{type(objective).__name__} needs a teacher")
    if objective.reads_contrast != (contrast is not None):
        raise ValueError(f"{objective} {'needs' if contrast is None else 'does not read'} a teacher after failures")
    if isinstance(teacher, TopK):
        _check_topk(objective, teacher, tokens)
    if objective.reads_old_policy and tokens.advantages_T is None:
        raise ValueError("PolicyGradient needs tokens.advantages_T")
    if clip is not None and tokens.sampler_logprobs_T is None:
        raise ValueError("importance_clip needs tokens.sampler_logprobs_T")


def _check_topk(objective: Objective, teacher: TopK, tokens: Tokens) -> None:
    """A teacher's likeliest tokens suffice for a divergence on just these tokens, and the sampled one for its own."""
    match objective:
        case Divergence(reads_contrast=True):
            raise ValueError(
                "a contrast needs the logits of both teachers: for TopK, apply `reference.contrasted` beforehand"
            )
        case SampledReverseKL():
            if not torch.equal(teacher.ids_TK, tokens.ids_T[:, None]):
                raise ValueError("SampledReverseKL needs the teacher's log-probability of the sampled token: not TopK")
        case Divergence(support=support) if support != "teacher_topk":
            raise ValueError(f"support={support} needs a teacher's logits: give TopK with teacher_topk only")
        case Divergence(k=k) if teacher.ids_TK.shape[-1] != k:
            raise ValueError(f"k={k} but the teacher gives {teacher.ids_TK.shape[-1]} tokens a row")
