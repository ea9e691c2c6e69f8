"""One chunk of response tokens: loss, signals, and the gradient at the logits.

Shape suffixes: C tokens of the chunk, V local columns, K support or top-k, N chosen tokens, D distributions: the
student, a teacher with logits, and for a contrast the teacher given failures alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mopd_nemo.losses import dense
from mopd_nemo.losses.logits import HeadRows, LogitsRows, Tokens, TopK
from mopd_nemo.losses.objectives import Divergence, DivergenceKind, Objective, TokenWeights
from mopd_nemo.losses.reference import (
    contrasted,
    divergence_weight,
    importance_weights,
    loss_on_support,
    support_weight,
    token_weight,
)
from mopd_nemo.losses.vocab import Shard


class Kernels(Protocol):
    """The passes over a chunk of logits, as `dense` has them in PyTorch and `dense_triton` in Triton."""

    def read(self, logits_CV: Tensor, *, whole: bool, mean: bool, blocks: bool, owned: bool) -> dense.Chunk: ...

    def support_gradient(self, student: dense.Chunk, columns_CN: Tensor, inside_CN: Tensor, g_CN: Tensor) -> Tensor: ...

    def full_divergence(
        self,
        student: dense.Chunk,
        teacher: dense.Chunk,
        kind: DivergenceKind,
        alpha: float,
        weights_C: Tensor | None,
        reduce: dense.Reduce,
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True, slots=True)
class ChunkStats:
    """Values that losses and signals read off a chunk of logits."""

    support_ids_CK: Tensor | None
    """Ids of the tokens on which the loss compares student and teacher; None: the whole vocabulary."""
    support_DCK: Tensor | None
    """Their log-probabilities."""
    sampled_DC: Tensor | None
    """Log-probabilities of the sampled token."""
    student_top_CK: Tensor | None
    """Ids of the student's likeliest tokens. This field and the next two are None without signals."""
    student_top_DCK: Tensor | None
    """Their log-probabilities."""
    teacher_top_CK: Tensor | None
    """Ids of the teacher's likeliest tokens."""
    entropies: list[Tensor]
    """Of the D distributions; empty without signals."""


@dataclass(frozen=True, slots=True)
class ChunkLoss:
    """The loss of `token_loss`, for any chunk of its tokens."""

    objective: Objective
    tokens: Tokens
    teacher: HeadRows | LogitsRows | None
    topk: TopK | None
    shard: Shard
    importance_clip: float | None
    watch: int | None
    """k of the top-k signals; None: no signals."""
    contrast: HeadRows | LogitsRows | None = None
    """The teacher given failures alone, for an objective that reads it."""

    def __call__(
        self, part: slice, student_CV: Tensor, weights_C: Tensor | None, owned: bool
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """loss_C and the signals of `signal_names`; with weights also the gradient of Σ weights·loss at the logits.

        Args:
            owned: the student's logits may be overwritten.
        """
        tokens, kernels, dtype = self.tokens[part], kernels_for(student_CV), student_CV.dtype
        topk = None if self.topk is None else self.topk[part]
        logits = [(student_CV, owned)]
        if self.teacher is not None:
            logits.append((self.teacher.logits(part), self.teacher.owned))
        if self.contrast is not None:
            logits.append((self.contrast.logits(part), self.contrast.owned))
        chunks = self._read(logits)
        del logits, student_CV  # on a CPU the chunks hold log-probabilities in their place
        stats = self._stats(chunks, tokens, topk)
        teacher_CK = self._target(stats.support_DCK, topk)
        weight_C = factor_C = self._weight(stats.support_DCK, teacher_CK, chunks)
        if self.importance_clip is not None:
            assert tokens.sampler_logprobs_T is not None and stats.sampled_DC is not None
            ratio_C = importance_weights(stats.sampled_DC[0], tokens.sampler_logprobs_T, self.importance_clip)
            factor_C = ratio_C if factor_C is None else factor_C * ratio_C
        if factor_C is not None and weights_C is not None:
            weights_C = weights_C * factor_C
        grad_CV = None
        if stats.support_DCK is None:
            assert self.divergence is not None
            student, teacher = chunks
            loss_C, grad_CV = kernels.full_divergence(
                student, teacher, self.divergence.kind, self.divergence.alpha, weights_C, self.shard.sum
            )
        else:
            assert stats.support_ids_CK is not None
            loss_C, g_CK = self._on_support(stats.support_DCK[0], teacher_CK, tokens, weights_C)
            if g_CK is not None:
                grad_CV = kernels.support_gradient(chunks[0], *self.shard.local(stats.support_ids_CK), g_CK)
        if self._weights == "divergence":
            weight_C = divergence_weight(loss_C)
            factor_C = weight_C if factor_C is None else factor_C * weight_C
            grad_CV = None if grad_CV is None else grad_CV.mul_(weight_C.to(grad_CV.dtype)[:, None])
        signals = self._signals(stats, tokens, topk, weight_C) if self.watch else []
        grad_CV = None if grad_CV is None else grad_CV.to(dtype)
        return loss_C if factor_C is None else loss_C * factor_C, signals, grad_CV

    @property
    def divergence(self) -> Divergence | None:
        """The objective, if it compares more than the sampled token."""
        return self.objective if isinstance(self.objective, Divergence) else None

    @property
    def support(self) -> str:
        """Tokens that the loss compares: `full`, `student_topk`, `teacher_topk`, `given` or `sampled`."""
        if self.divergence is None:
            return "sampled"
        if self.topk is not None:
            return "given"
        whole = self.divergence.k >= self.shard.size and not self.divergence.needs_entries
        return "full" if whole else self.divergence.support

    @property
    def signal_names(self) -> list[str]:
        """Per-token diagnostics, the same on every rank, whether or not it has tokens.

        `student/entropy`, `teacher/entropy`: nats.
        `student/topk_mass`: P's mass on its own k likeliest tokens; `teacher/topk_mass`: Q's mass on the same tokens.
        `topk_overlap`: share of P's k likeliest tokens that are also among Q's.
        `teacher/advantage`: log Q(y_t) - log P(y_t) of the sampled token; negative where the teacher disagrees.
        `teacher/contrast`: log Q_S(y_t) - log Q_F(y_t) of the sampled token; negative where failures make it likelier.
        `teacher/sharper`: 1 where `divergence.weights: sharper` counts the token, else 0.
        `token/weight`: the weight that the other `divergence.weights` give it.
        `sampler/gap`: |log P(y_t) - sampler's log-probability|; only rounding when sampling at temperature 1.
        `sampler/ratio`: P(y_t) / the sampler's probability, before any clipping; 1 on average for an exact sampler.
        A signal is left out where its input is missing, such as a teacher's logits.
        """
        if not self.watch:
            return []
        names = ["student/entropy", "student/topk_mass"]
        if self.teacher is not None:
            names += ["teacher/entropy", "teacher/topk_mass", "teacher/advantage"]
        elif self.topk is not None and self.topk.sampled_T is not None:
            names.append("teacher/advantage")
        if self.contrast is not None:
            names.append("teacher/contrast")
        if self._weights != "none":
            names.append("teacher/sharper" if self._weights == "sharper" else "token/weight")
        if self.teacher is not None or self.support == "given":
            names.append("topk_overlap")
        return [*names, "sampler/gap", "sampler/ratio"] if self.tokens.sampler_logprobs_T is not None else names

    def _read(self, logits: list[tuple[Tensor, bool]]) -> list[dense.Chunk]:
        """All distributions with their log-partitions over all columns."""
        watch = bool(self.watch)
        mean = watch or (self._weights != "none" and self.support == "full")
        chunks = [
            kernels_for(logits_CV).read(
                logits_CV, whole=not self.shard.group, mean=mean, blocks=watch or self.support == chooser, owned=owned
            )
            for (logits_CV, owned), chooser in zip(logits, ("student_topk", "teacher_topk", None), strict=False)
        ]
        return self.shard.normalise(chunks)

    def _stats(self, chunks: list[dense.Chunk], tokens: Tokens, topk: TopK | None) -> ChunkStats:
        """Ids and log-probabilities for loss and signals. One collective picks them all."""
        watch = min(self.watch, self.shard.size) if self.watch else None

        def top_CK(which: int, k: int) -> Tensor:
            return self.shard.topk(chunks[which].values_CV, k, chunks[which].maxima_CB)

        support_CK = student_top_CK = teacher_top_CK = None
        same = False
        match self.support, self.divergence:
            case "sampled", _:
                support_CK = tokens.ids_T[:, None]
            case "given", _:
                support_CK = topk.ids_TK if topk is not None else None
            case ("student_topk" | "teacher_topk") as chooser, Divergence(k=k):
                support_CK = top_CK(0 if chooser == "student_topk" else 1, k)
                same = chooser == "student_topk" and k == watch
        if watch is not None:
            student_top_CK = support_CK if same else top_CK(0, watch)
        wants_sampled = self.support != "sampled" and (watch is not None or self.importance_clip is not None)
        groups = [support_CK, tokens.ids_T[:, None] if wants_sampled else None, student_top_CK]
        ids = [ids_CN for ids_CN in groups if ids_CN is not None]
        picked = iter(
            self.shard.pick(chunks, torch.cat(ids, dim=-1)).split([x.shape[-1] for x in ids], dim=-1) if ids else ()
        )
        support_DCK, sampled_DCN, student_top_DCK = (None if x is None else next(picked) for x in groups)
        sampled_DCN = support_DCK if self.support == "sampled" else sampled_DCN
        if watch is not None and len(chunks) > 1:
            teacher_top_CK = top_CK(1, watch)
        elif watch is not None and topk is not None and self.support == "given":
            teacher_top_CK = topk.ids_TK
        return ChunkStats(
            support_CK,
            support_DCK,
            None if sampled_DCN is None else sampled_DCN.squeeze(-1),
            student_top_CK,
            student_top_DCK,
            teacher_top_CK,
            [chunk.entropy_C for chunk in chunks] if watch is not None else [],
        )

    @property
    def _weights(self) -> TokenWeights:
        return "none" if self.divergence is None else self.divergence.weights

    def _target(self, support_DCK: Tensor | None, topk: TopK | None) -> Tensor | None:
        """The teacher's log-probabilities of the support; with a contrast, those of the contrasted target."""
        if topk is not None:
            return topk.logprobs_TK
        if support_DCK is None or len(support_DCK) == 1:
            return None
        if len(support_DCK) == 2 or self.divergence is None:
            return support_DCK[1]
        return contrasted(support_DCK[1], support_DCK[2], self.divergence.contrast, self.divergence.tail)

    def _weight(
        self, support_DCK: Tensor | None, teacher_CK: Tensor | None, chunks: list[dense.Chunk]
    ) -> Tensor | None:
        """`reference.token_weight`."""
        if self._weights == "none":
            return None
        if support_DCK is None:
            return token_weight(self._weights, chunks[0].entropy_C, chunks[1].entropy_C, self.shard.size)
        assert teacher_CK is not None and self.divergence is not None
        return support_weight(self._weights, support_DCK[0], teacher_CK, self.divergence.tail)

    def _on_support(
        self, student_CK: Tensor, teacher_CK: Tensor | None, tokens: Tokens, weights_C: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """loss_C of an objective on a few log-probabilities, and its weighted derivative at the student's."""
        if weights_C is None:
            return loss_on_support(self.objective, student_CK, teacher_CK, tokens), None
        with torch.enable_grad():
            student_CK = student_CK.detach().requires_grad_()
            loss_C = loss_on_support(self.objective, student_CK, teacher_CK, tokens)
            (g_CK,) = torch.autograd.grad(loss_C, student_CK, weights_C.to(loss_C.dtype))
        return loss_C.detach(), g_CK

    def _signals(self, stats: ChunkStats, tokens: Tokens, topk: TopK | None, weight_C: Tensor | None) -> list[Tensor]:
        """In the order of `signal_names`."""
        assert stats.sampled_DC is not None and stats.student_top_DCK is not None and stats.student_top_CK is not None
        mass_DC, sampled_DC = stats.student_top_DCK.exp().sum(-1), stats.sampled_DC
        signals = [stats.entropies[0], mass_DC[0]]
        if len(stats.entropies) > 1:
            signals += [stats.entropies[1], mass_DC[1], sampled_DC[1] - sampled_DC[0]]
        elif topk is not None and topk.sampled_T is not None:
            signals.append(topk.sampled_T - sampled_DC[0])
        if len(stats.entropies) > 2:
            signals.append(sampled_DC[1] - sampled_DC[2])
        if weight_C is not None:
            signals.append(weight_C)
        if stats.teacher_top_CK is not None:
            signals.append(_overlap(stats.student_top_CK, stats.teacher_top_CK))
        if tokens.sampler_logprobs_T is not None:
            log_ratio_C = sampled_DC[0] - tokens.sampler_logprobs_T
            signals += [log_ratio_C.abs(), log_ratio_C.exp()]
        return signals


def kernels_for(logits_CV: Tensor) -> Kernels:
    """The implementation for a tensor: Triton on a GPU, except in float64; PyTorch elsewhere."""
    if logits_CV.is_cuda and logits_CV.dtype != torch.float64:
        from mopd_nemo.losses import dense_triton

        return dense_triton
    return dense


def _overlap(ids_CK: Tensor, others_CK: Tensor) -> Tensor:
    """Share of each row's ids that the other has too; neither repeats an id."""
    sorted_CK = others_CK.sort(-1).values
    nearest_CK = torch.searchsorted(sorted_CK, ids_CK).clamp(max=sorted_CK.shape[-1] - 1)
    return (sorted_CK.gather(-1, nearest_CK) == ids_CK).float().mean(-1)
