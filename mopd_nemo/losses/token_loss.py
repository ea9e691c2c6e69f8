"""The one loss that engines call: any objective, per response token, without [tokens, vocabulary] ever being whole.

Rows are taken a chunk at a time: logits of the chunk, the loss, and at once the gradient at those logits, which a head
turns into gradients of its hidden states and weight. Where the weight of every token is known beforehand this happens
in the forward pass and costs four matrix products: student logits, teacher logits, and two for the gradients.
Otherwise the backward pass makes the logits again.

Shape suffixes: T response tokens, C tokens of a chunk, V local columns of the vocabulary, H hidden size, K support, N
chosen tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopd_nemo.losses.chunk import Problem, chunk_loss
from mopd_nemo.losses.objectives import Divergence, Objective, PolicyGradient, SampledReverseKL, needs_teacher
from mopd_nemo.losses.rows import Gradients, Plan
from mopd_nemo.losses.sources import Head, Logits, Tokens, TopK
from mopd_nemo.losses.vocab import Vocab

LOGIT_BUDGET = {"cpu": 2**22, "cuda": 2**29}
"""Logits of a chunk, as tokens × local columns: what a CPU's cache holds; 1 GiB in bfloat16 on a GPU."""

MIN_CHUNK = 256
"""Fewer rows would make matrix products wait for the head's weight."""


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """What `token_loss` gives back.

    Attributes:
        total: Σ weights·loss, or Σ loss where no weights were given; differentiable.
        loss_T: per token; differentiable only where no weights were given.
        signals: per-token diagnostics, when asked for; not differentiable.
    """

    total: Tensor
    loss_T: Tensor
    signals: dict[str, Tensor]


def token_loss(
    objective: Objective,
    student: Head | Logits,
    tokens: Tokens,
    teacher: Head | Logits | TopK | None = None,
    *,
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
        teacher: needed by `Divergence` and `SampledReverseKL`; never differentiated.
        weights_T: weight of each token in the total, such as `token_weights` gives. With a `Head` the gradient is then
            made in the forward pass, which saves making the logits twice; `total` must be what is differentiated.
        importance_clip: multiply each loss by `importance_weights` of the student against
            `tokens.sampler_logprobs_T`, at most this.
        vocab: tensor parallelism and padding. The rows must be the same on every rank of the group, each with its own
            columns; the results are the same on every rank, and the gradient of replicated hidden states is whole.
        chunk_size: rows at a time; by default as many as `LOGIT_BUDGET` allows, at least `MIN_CHUNK`.
        watch: also return `signals`, with top-k signals of this k.

    Memory is O(chunk·V), beside the gradients themselves.

    Collectives, where `vocab` has a group, for each chunk of C rows, S = 1 or 2 (student, teacher with logits):
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
    _check(objective, student, tokens, teacher, importance_clip)
    shard = vocab.shard(student.width)
    if isinstance(teacher, Head | Logits) and teacher.width != student.width:
        raise ValueError(f"teacher has {teacher.width} columns, student {student.width}: they must share a vocabulary")
    plan, tensors = Plan.of(student)
    device = tensors[0].device
    teacher_rows = None
    if isinstance(teacher, Head | Logits):
        teacher_plan, teacher_tensors = Plan.of(teacher)
        teacher_rows = teacher_plan.rows(teacher_tensors, shard)
    most = chunk_size or max(LOGIT_BUDGET.get(device.type, LOGIT_BUDGET["cuda"]) // shard.columns, MIN_CHUNK)
    problem = Problem(
        objective, tokens, teacher_rows, teacher if isinstance(teacher, TopK) else None, shard, importance_clip, watch
    )
    sweep = _Sweep(problem, plan, _chunks(student.num_tokens, most))
    signals: dict[str, Tensor] = {}
    if weights_T is not None and plan.is_head:
        gradients = torch.is_grad_enabled()
        total, loss_T = _WeightedSum.apply(sweep, signals, gradients, weights_T.detach(), *tensors)
        return TokenLoss(total, loss_T, signals)
    loss_T = _PerToken.apply(sweep, signals, *tensors)
    if weights_T is None:
        return TokenLoss(loss_T.sum(), loss_T, signals)
    return TokenLoss((loss_T * weights_T.detach()).sum(), loss_T.detach(), signals)


@dataclass(frozen=True, slots=True)
class _Sweep:
    """All chunks of a problem, one after the other."""

    problem: Problem
    plan: Plan
    chunks: list[slice]

    def run(
        self, tensors: tuple[Tensor | None, ...], weights_T: Tensor | None, needed: tuple[bool, ...]
    ) -> tuple[Tensor, dict[str, Tensor], Gradients]:
        """loss_T, signals, and the gradients of Σ weights·loss that are needed."""
        device = self.problem.tokens.ids_T.device
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            rows = self.plan.rows(tensors, self.problem.shard, needed)
            parts = []
            for part in self.chunks:
                weights_C = weights_T[part] if weights_T is not None and any(needed) else None
                loss_C, signals, grad_CV = chunk_loss(self.problem, part, rows.logits(part), weights_C, rows.owned)
                if grad_CV is not None:
                    rows.backpropagate(part, grad_CV)
                del grad_CV
                parts.append((loss_C, signals))
            gradients = rows.finish()
        empty = torch.zeros(0, device=device)
        loss_T = torch.cat([loss_C for loss_C, _ in parts] or [empty])
        signals = {
            name: torch.cat([signals[name] for _, signals in parts] or [empty]) for name in self.problem.signal_names
        }
        return loss_T, signals, gradients


class _WeightedSum(torch.autograd.Function):
    """Σ weights·loss whose gradient is ready when the forward pass ends."""

    @staticmethod
    def forward(ctx: Any, sweep: _Sweep, signals: dict[str, Tensor], gradients: bool, weights_T: Tensor, *tensors: Any):
        needed = tuple(ctx.needs_input_grad[4:]) if gradients else ()
        loss_T, found, grads = sweep.run(tensors, weights_T, needed)
        signals.update(found)
        ctx.dtypes = [None if x is None else x.dtype for x in tensors]
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(loss_T)
        return (loss_T * weights_T).sum(), loss_T

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor):  # type: ignore[override]
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = [None if g is None else _scaled(g, grad, dtype) for g, dtype in found]
        return None, None, None, None, *grads


def _scaled(value: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """value·factor in one pass; in place where the type allows, for a head's gradient is large.

    In place, autograd's version check then refuses a second backward pass.
    """
    if value.dtype == dtype:
        return value.mul_(factor)
    return torch.mul(value, factor, out=torch.empty_like(value, dtype=dtype))


class _PerToken(torch.autograd.Function):
    """loss_T whose gradient is made, logits and all, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, sweep: _Sweep, signals: dict[str, Tensor], *tensors: Any):
        loss_T, found, _ = sweep.run(tensors, None, ())
        signals.update(found)
        ctx.sweep = sweep
        ctx.save_for_backward(*tensors)
        return loss_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor):  # type: ignore[override]
        tensors = ctx.saved_tensors
        needed = tuple(ctx.needs_input_grad[2:])
        _, _, grads = ctx.sweep.run(tensors, grad_T, needed)
        grads = [None if g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True)]
        return None, None, *grads


def _chunks(num_tokens: int, most: int) -> list[slice]:
    """Equal chunks of at most `most` rows; of whole tiles of a matrix product where there are several."""
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
    clip: float | None,
) -> None:
    counts = {"student": student.num_tokens, "tokens": len(tokens.ids_T)}
    if teacher is not None:
        counts["teacher"] = teacher.num_tokens
    if len(set(counts.values())) != 1:
        raise ValueError(f"rows do not match: {counts}; each response token needs one row of each")
    if needs_teacher(objective) and teacher is None:
        raise ValueError(f"{type(objective).__name__} needs a teacher")
    if isinstance(teacher, TopK):
        if isinstance(objective, SampledReverseKL):
            raise ValueError("SampledReverseKL needs the teacher's log-probability of the sampled token: not TopK")
        if isinstance(objective, Divergence) and objective.support != "teacher_topk":
            raise ValueError(f"support={objective.support} needs a teacher's logits: give TopK with teacher_topk only")
        if isinstance(objective, Divergence) and teacher.ids_TK.shape[-1] != objective.k:
            raise ValueError(f"k={objective.k} but the teacher gives {teacher.ids_TK.shape[-1]} tokens a row")
    if isinstance(objective, PolicyGradient) and tokens.advantages_T is None:
        raise ValueError("PolicyGradient needs tokens.advantages_T")
    if clip is not None and tokens.sampler_logprobs_T is None:
        raise ValueError("importance_clip needs tokens.sampler_logprobs_T")
