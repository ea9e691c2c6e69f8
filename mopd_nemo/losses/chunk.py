"""One chunk of rows: loss, signals, and the gradient at the logits.

Shape suffixes: C tokens of the chunk, V local columns, K support, N chosen tokens, D distributions: the student and,
where it has logits, the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from mopd_nemo.losses import dense
from mopd_nemo.losses.objectives import Divergence, Objective, loss_on_support
from mopd_nemo.losses.policy import importance_weights
from mopd_nemo.losses.rows import HeadRows, LogitsRows
from mopd_nemo.losses.signals import Look, entropy, signal_names, signals
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

    @property
    def signal_names(self) -> list[str]:
        """The signals that `chunk_loss` gives."""
        sampler = self.tokens.sampler_logprobs_T is not None
        return signal_names(self.teacher is not None, self.topk is not None, sampler) if self.watch else []


def chunk_loss(
    problem: Problem, part: slice, student_CV: Tensor, weights_C: Tensor | None, owned: bool
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """loss_C and signals; with `weights_C` also the gradient of Σ weights·loss at the logits.

    Args:
        owned: the student's logits may be overwritten.
    """
    tokens = problem.tokens[part]
    module, dtype = passes(student_CV), student_CV.dtype
    logits = [(student_CV, owned)]
    if problem.teacher is not None:
        logits.append((problem.teacher.logits(part), problem.teacher.owned))
    chunks, look = _look(problem, logits, tokens, None if problem.topk is None else problem.topk[part])
    del logits, student_CV  # on a CPU the chunks hold log-probabilities in their place
    watched = signals(look, tokens) if problem.watch else {}
    factor_C = None
    if problem.importance_clip is not None:
        assert tokens.sampler_logprobs_T is not None
        sampled_C = look.logprobs_DCN["sampled"][0].squeeze(-1)
        factor_C = importance_weights(sampled_C, tokens.sampler_logprobs_T, problem.importance_clip)
        weights_C = None if weights_C is None else weights_C * factor_C
    if problem.support == "full":
        assert isinstance(problem.objective, Divergence)
        kind, alpha = problem.objective.kind, problem.objective.alpha
        loss_C, grad_CV = module.full_divergence(*chunks, kind, alpha, weights_C, problem.shard.sum)
    else:
        loss_C, g_CK, name = _on_support(problem, look, tokens, weights_C)
        grad_CV = None
        if g_CK is not None:
            columns_CK, inside_CK = problem.shard.local(look.ids[name])
            grad_CV = module.support_gradient(chunks[0], columns_CK, inside_CK, g_CK)
    grad_CV = None if grad_CV is None else grad_CV.to(dtype)
    return loss_C if factor_C is None else loss_C * factor_C, watched, grad_CV


def passes(logits_CV: Tensor) -> ModuleType:
    """The module whose passes fit the tensor: Triton's on a GPU, except in float64."""
    if logits_CV.is_cuda and logits_CV.dtype != torch.float64:
        from mopd_nemo.losses import dense_triton

        return dense_triton
    return dense


def _look(
    problem: Problem, logits: list[tuple[Tensor, bool]], tokens: Tokens, topk: TopK | None
) -> tuple[list[dense.Chunk], Look]:
    """Normalisers, and the ids that loss and signals speak of with their log-probabilities."""
    support, shard, watch = problem.support, problem.shard, problem.watch
    chunks = [
        passes(logits_CV).read(
            logits_CV, whole=not shard.group, mean=bool(watch), blocks=bool(watch) or support == name, owned=owned
        )
        for (logits_CV, owned), name in zip(logits, ("student_topk", "teacher_topk"), strict=False)
    ]
    chunks = shard.normalise(chunks)

    def top(which: int, k: int) -> Tensor:
        return shard.topk(chunks[which].values_CV, k, chunks[which].maxima_CB)

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
    logprobs_DCN = {}
    if ids:
        picked_DCN = shard.pick(chunks, torch.cat(list(ids.values()), dim=-1))
        widths = [x.shape[-1] for x in ids.values()]
        logprobs_DCN = dict(zip(ids, picked_DCN.split(widths, dim=-1), strict=True))
    if watch and len(chunks) == 2:
        ids["teacher_top"] = top(1, min(watch, shard.size))
    elif watch and topk is not None:
        ids["teacher_top"] = topk.ids_TK
    return chunks, Look(
        ids,
        logprobs_DCN,
        [entropy(chunk) for chunk in chunks] if watch else [],
        None if topk is None else topk.logprobs_TK,
    )


def _on_support(
    problem: Problem, look: Look, tokens: Tokens, weights_C: Tensor | None
) -> tuple[Tensor, Tensor | None, str]:
    """loss_C of an objective that sees a few log-probabilities, its weighted derivative there, and which they are."""
    name = "sampled" if problem.support == "sampled" else "support"
    student_CK, *teacher = look.logprobs_DCN[name]
    teacher_CK = look.given_CK if look.given_CK is not None else (teacher[0] if teacher else None)
    if weights_C is None:
        return loss_on_support(problem.objective, student_CK, teacher_CK, tokens), None, name
    with torch.enable_grad():
        student_CK = student_CK.detach().requires_grad_()
        loss_C = loss_on_support(problem.objective, student_CK, teacher_CK, tokens)
        (g_CK,) = torch.autograd.grad(loss_C, student_CK, weights_C.to(loss_C.dtype))
    return loss_C.detach(), g_CK, name
