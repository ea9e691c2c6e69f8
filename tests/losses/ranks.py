"""What each process of test_parallel.py does. No pytest here: it is imported in every process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mopd_nemo.losses import (
    Divergence,
    Head,
    Logits,
    LogLikelihood,
    Objective,
    SampledReverseKL,
    Tokens,
    TopK,
    Vocab,
    token_loss,
)

T, H, V = 11, 6, 40
OBJECTIVES: list[Objective] = [
    *(
        Divergence(kind, 0.3, support, 7, tail)  # type: ignore[arg-type]
        for kind in ("forward_kl", "reverse_kl", "jsd")
        for support, tail in [("full", True), ("student_topk", True), ("student_topk", False), ("teacher_topk", True)]
    ),
    SampledReverseKL(),
    LogLikelihood(),
]


def tensors(rows: int = T, seed: int = 0) -> tuple[list[Tensor], list[Tensor], Tokens, Tensor]:
    """Student and teacher (hidden states, weight, bias), tokens, weights: the same on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = ([normal(rows, H), normal(V, H) / H**0.5, normal(V)] for _ in range(2))
    ids_T = torch.randint(0, V, (rows,), generator=generator)
    tokens = Tokens(ids_T, sampler_logprobs_T=normal(rows) - 4)
    return student, teacher, tokens, torch.rand(rows, generator=generator, dtype=torch.float64)


def shard(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of a head, after padding with columns that would be the likeliest of all."""
    ranks = dist.get_world_size(group)
    width = -(-V // ranks) + 2 * (ranks > 2)
    padding = torch.full((ranks * width - V, *tensor.shape[1:]), 9.0, dtype=tensor.dtype)
    return torch.cat([tensor, padding])[dist.get_rank(group) * width :][:width].detach().clone()


def vocab_parallel() -> None:
    """Every objective and form over the local columns: losses, signals and gradients of the whole vocabulary."""
    group = dist.group.WORLD
    assert group is not None
    vocab = Vocab(group, V)
    student, teacher, tokens, weights_T = tensors()
    for objective in OBJECTIVES[:: dist.get_world_size() - 1]:
        leaves = [x.clone().requires_grad_() for x in student]
        whole = token_loss(objective, Head(*leaves), tokens, Head(*teacher), weights_T=weights_T, watch=5)
        whole.total.backward()
        for form in ("fused", "recomputed", "logits"):
            hidden, weight, bias = (x.clone().requires_grad_() for x in student)
            weight, bias = (shard(x, group).requires_grad_() for x in (weight, bias))
            source: Head | Logits = Head(hidden, weight, bias)
            if form == "logits":
                source = Logits(hidden @ weight.T + bias)
            found = token_loss(
                objective, source, tokens, Head(teacher[0], *(shard(x, group) for x in teacher[1:])),
                weights_T=None if form == "recomputed" else weights_T, vocab=vocab, chunk_size=6, watch=5,
            )  # fmt: skip
            (found.total if form != "recomputed" else (found.loss_T * weights_T).sum()).backward()
            torch.testing.assert_close(found.loss_T, whole.loss_T)
            torch.testing.assert_close(found.signals, whole.signals)
            if form == "logits":  # plain autograd leaves each rank its share of the hidden states' gradient
                dist.all_reduce(hidden.grad, group=group)
            torch.testing.assert_close(hidden.grad, leaves[0].grad)
            for mine, all_rows in ((weight, leaves[1]), (bias, leaves[2])):
                held = slice(dist.get_rank() * len(mine), min((dist.get_rank() + 1) * len(mine), V))
                torch.testing.assert_close(mine.grad[: held.stop - held.start], all_rows.grad[held])
                assert not mine.grad[held.stop - held.start :].any()


def teacher_topk_over_shards() -> None:
    """Ids and log-probabilities of the teacher are global; importance weights come from all columns."""
    group = dist.group.WORLD
    assert group is not None
    student, teacher, tokens, weights_T = tensors()
    values_TK, ids_TK = (teacher[0] @ teacher[1].T + teacher[2]).log_softmax(-1).topk(7)
    given = TopK(ids_TK, values_TK)
    objective = Divergence("jsd", 0.3, "teacher_topk", 7)
    whole = token_loss(objective, Head(*student), tokens, given, weights_T=weights_T, watch=5, importance_clip=2.0)
    local = Head(student[0], *(shard(x, group) for x in student[1:]))
    vocab = Vocab(group, V)
    found = token_loss(objective, local, tokens, given, weights_T=weights_T, vocab=vocab, watch=5, importance_clip=2.0)
    torch.testing.assert_close(found.total, whole.total)
    torch.testing.assert_close(found.signals, whole.signals)


def no_tokens() -> None:
    """No row at all: zero gradients on every rank, and every rank gets there."""
    group = dist.group.WORLD
    assert group is not None
    student, teacher, tokens, weights_T = tensors(rows=0)
    for objective in OBJECTIVES[::4]:
        leaves = [student[0].clone().requires_grad_(), *(shard(x, group).requires_grad_() for x in student[1:])]
        sharded = Head(teacher[0], *(shard(x, group) for x in teacher[1:]))
        found = token_loss(objective, Head(*leaves), tokens, sharded, weights_T=weights_T, vocab=Vocab(group, V))
        found.total.backward()
        assert found.total.item() == 0.0
        assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in leaves)


def everything() -> None:
    for work in (vocab_parallel, teacher_topk_over_shards, no_tokens):
        work()
        dist.barrier()
