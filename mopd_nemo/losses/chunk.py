"""One chunk of rows: loss, signals, and the gradient at the logits.

Shape suffixes: C tokens of the chunk, V local columns, K support, N chosen tokens, D distributions: the student and,
where it has logits, the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopd_nemo.losses import dense
from mopd_nemo.losses.objectives import Divergence, Objective, loss_on_support
from mopd_nemo.losses.policy import importance_weights
from mopd_nemo.losses.rows import HeadRows, LogitsRows
from mopd_nemo.losses.signals import Look, signals
from mopd_nemo.losses.sources import Tokens, TopK
from mopd_nemo.losses.vocab import Shard


@dataclass(frozen=True, slots=True)
class Problem:
    """What `token_loss` was asked, without the student's tensors."""

    objective: Objective
    tokens: Tokens
    teacher: HeadRows | LogitsRows | None
    topk: TopK | None
    shard: Shard
    importance_clip: float | None
    watch: int | None

    @property
    def support(self) -> str:
        """Where the loss looks: `full`, `student_topk`, `teacher_topk`, `given` or `sampled`."""
        if not isinstance(self.objective, Divergence):
            return "sampled"
        if self.topk is not None:
            return "given"
        return "full" if self.objective.k >= self.shard.size else self.objective.support


def chunk_loss(
    problem: Problem, part: slice, student_CV: Tensor, weights_C: Tensor | None, owned: bool
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """loss_C and signals; with `weights_C` also the gradient of Σ weights·loss at the logits.

    Args:
        owned: the student's logits may be overwritten.
    """
    tokens = problem.tokens[part]
    logits = [student_CV] if problem.teacher is None else [student_CV, problem.teacher.logits(part)]
    look = _look(problem, logits, tokens, None if problem.topk is None else problem.topk[part])
    watched = signals(look, tokens) if problem.watch else {}
    factor_C = None
    if problem.importance_clip is not None:
        assert tokens.sampler_logprobs_T is not None
        sampled_C = look.logprobs_DCN["sampled"][0].squeeze(-1)
        factor_C = importance_weights(sampled_C, tokens.sampler_logprobs_T, problem.importance_clip)
        weights_C = None if weights_C is None else weights_C * factor_C
    if problem.support == "full":
        loss_C, grad_CV = _full(problem, logits, look, weights_C, owned)
    else:
        loss_C, grad_CV = _on_support(problem, student_CV, look, tokens, weights_C, owned)
    return loss_C if factor_C is None else loss_C * factor_C, watched, grad_CV


def _look(problem: Problem, logits: list[Tensor], tokens: Tokens, topk: TopK | None) -> Look:
    """Normalisers, and the ids that loss and signals speak of with their log-probabilities."""
    support, shard, watch = problem.support, problem.shard, problem.watch
    found = [
        dense.statistics(logits_CV, mean=bool(watch), blocks=bool(watch) or support == name)
        for logits_CV, name in zip(logits, ("student_topk", "teacher_topk"), strict=False)
    ]
    lse_DC = torch.stack([lse_C for lse_C, _, _ in found])
    mean_DC = torch.stack([mean_C for _, mean_C, _ in found if mean_C is not None]) if watch else None
    lse_DC, mean_DC = shard.normalisers(lse_DC, mean_DC)

    def top(which: int, k: int) -> Tensor:
        return shard.topk(logits[which], k, found[which][2])

    ids: dict[str, Tensor] = {}
    if support in ("student_topk", "teacher_topk"):
        assert isinstance(problem.objective, Divergence)
        ids["support"] = top(0 if support == "student_topk" else 1, problem.objective.k)
    if topk is not None:
        ids["support"] = topk.ids_TK
    if support == "sampled" or watch or problem.importance_clip is not None:
        ids["sampled"] = tokens.ids_T[:, None]
    if watch:
        k = min(watch, shard.size)
        same = support == "student_topk" and isinstance(problem.objective, Divergence) and problem.objective.k == k
        ids["student_top"] = ids["support"] if same else top(0, k)
    picked_DCN = shard.pick(logits, torch.cat(list(ids.values()), dim=-1)) if ids else lse_DC[..., None][..., :0]
    logprobs_DCN = picked_DCN - lse_DC[..., None]
    split = dict(zip(ids, logprobs_DCN.split([x.shape[-1] for x in ids.values()], dim=-1), strict=True))
    if watch and len(logits) == 2:
        ids["teacher_top"] = top(1, min(watch, shard.size))
    elif watch and topk is not None:
        ids["teacher_top"] = topk.ids_TK
    return Look(lse_DC, mean_DC, ids, split, None if topk is None else topk.logprobs_TK)


def _on_support(
    problem: Problem, student_CV: Tensor, look: Look, tokens: Tokens, weights_C: Tensor | None, owned: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses that see a few log-probabilities: autograd on those, then one pass over the vocabulary."""
    name = "sampled" if problem.support == "sampled" else "support"
    student_CK, *teacher = look.logprobs_DCN[name]
    teacher_CK = look.given_CK if look.given_CK is not None else (teacher[0] if teacher else None)
    if weights_C is None:
        return loss_on_support(problem.objective, student_CK, teacher_CK, tokens), None
    with torch.enable_grad():
        student_CK = student_CK.detach().requires_grad_()
        loss_C = loss_on_support(problem.objective, student_CK, teacher_CK, tokens)
        (g_CK,) = torch.autograd.grad(loss_C, student_CK, weights_C.to(loss_C.dtype))
    columns_CK, inside_CK = problem.shard.local(look.ids[name])
    return loss_C.detach(), dense.support_gradient(student_CV, look.lse_DC[0], columns_CK, inside_CK, g_CK, owned)


def _full(
    problem: Problem, logits: list[Tensor], look: Look, weights_C: Tensor | None, owned: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergence over the whole vocabulary."""
    assert isinstance(problem.objective, Divergence)
    kind, alpha = problem.objective.kind, problem.objective.alpha
    both = (logits[0], logits[1], look.lse_DC[0], look.lse_DC[1])
    loss_C, inner_C = problem.shard.sum(dense.divergence_sums(*both, kind, alpha))
    if weights_C is None:
        return loss_C, None
    return loss_C, dense.divergence_gradient(*both, inner_C, weights_C, kind, alpha, owned)
