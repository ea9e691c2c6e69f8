"""What each process of test_parallel.py does. No pytest here: it is imported in every process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from mopd_nemo.engines.nemo.workers.divergence_loss import DivergenceLoss, Groups
from mopd_nemo.engines.nemo.workers.rows import positions, response_rows
from mopd_nemo.losses.logits import Head, Logits, Tokens, TopK
from mopd_nemo.losses.objectives import (
    Divergence,
    LogLikelihood,
    Objective,
    ReferenceKL,
    SampledReverseKL,
    Suppression,
    token_weights,
)
from mopd_nemo.losses.token_loss import token_loss
from mopd_nemo.losses.vocab import Vocab, logprobs_of, topk_logprobs

T, H, V = 11, 6, 40
OBJECTIVES: list[Objective] = [
    *(
        Divergence(kind, 0.3, support, 7, tail)  # type: ignore[arg-type]
        for kind in ("forward_kl", "reverse_kl", "jsd")
        for support, tail in [("full", True), ("student_topk", True), ("student_topk", False), ("teacher_topk", True)]
    ),
    *(
        Divergence("jsd", 0.3, support, 7, weights=weights)  # type: ignore[arg-type]
        for weights in ("student_entropy", "teacher_certainty", "divergence")
        for support in ("full", "student_topk")
    ),
    Divergence("forward_kl", 0.3, "student_topk", 7, entry_clip=0.05),
    ReferenceKL(k=7),
    Suppression(0.05),
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


def scores_over_shards() -> None:
    """A teacher's likeliest tokens and given tokens from shards with padding, against the whole vocabulary."""
    group = dist.group.WORLD
    assert group is not None
    logits_RV = torch.randn(9, V, generator=torch.Generator().manual_seed(1)) * 3
    vocab, whole_RV = Vocab(group, V), logits_RV.log_softmax(-1)
    mine_RV = shard(logits_RV.T, group).T
    ids_RK, logprobs_RK = topk_logprobs(mine_RV, 7, vocab)
    torch.testing.assert_close(logprobs_RK, whole_RV.topk(7).values)
    assert torch.equal(ids_RK.long(), whole_RV.topk(7).indices) and ids_RK.dtype == torch.int32
    torch.testing.assert_close(logprobs_of(mine_RV, ids_RK, vocab), logprobs_RK)


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


def tensor_and_context_parallel() -> None:
    """Sequences cut as Megatron cuts them and a sharded vocabulary: 2 x (ranks / 2), or context alone with 2 ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tensor_ranks = 2 if ranks == 4 else 1
    context_ranks = ranks // tensor_ranks
    tensor_groups = [dist.new_group(range(i, i + tensor_ranks)) for i in range(0, ranks, tensor_ranks)]
    context_groups = [dist.new_group(range(i, ranks, tensor_ranks)) for i in range(tensor_ranks)]
    context = context_groups[rank % tensor_ranks]
    tensor = tensor_groups[rank // tensor_ranks]

    sequences, length = 3, 16
    is_response = torch.zeros(sequences, length, dtype=torch.bool)
    is_response[0, 3:13] = True
    is_response[1, 14:15] = True  # in the last piece alone: rank 0 of the context group holds it
    is_response[2, 0:2] = True  # the first token of a sequence has no row that predicts it
    student, teacher, tokens, _ = tensors(rows=sequences * length)
    ids_BS = tokens.ids_T.view(sequences, length)
    lengths = [10, 1, 1]
    weights_BS = torch.zeros(sequences, length, dtype=torch.float64)
    for i, weight in enumerate(token_weights(lengths, "sequence_mean")):
        weights_BS[i][is_response[i]] = weight

    def total(held: Tensor, here: tuple[int, int], vocab: Vocab | None, cut: Callable[[Tensor], Tensor]):
        """Total and leaves, from the rows of one rank."""
        leaves = [student[0].view(sequences, length, H)[:, held].clone(), *(cut(x) for x in student[1:])]
        leaves = [x.requires_grad_() for x in leaves]
        rows_T, tokens_T = response_rows(is_response, *here)
        logits = Logits((leaves[0] @ leaves[1].T + leaves[2]).flatten(0, 1), rows_T)
        hidden_TH = teacher[0].view(sequences, length, H)[:, held].flatten(0, 1)[rows_T]
        picked = Tokens(ids_BS.flatten()[tokens_T])
        teacher_head = Head(hidden_TH, *(cut(x) for x in teacher[1:]))
        found = token_loss(
            Divergence(k=7), logits, picked, teacher_head, weights_T=weights_BS.flatten()[tokens_T], vocab=vocab
        )
        return found.total, leaves

    everything = torch.arange(length)
    whole, whole_leaves = total(everything, (0, 1), None, torch.clone)
    whole.backward()

    here = (dist.get_rank(context), context_ranks)
    pieces = length // (2 * context_ranks)
    held = torch.cat(
        [torch.arange(p * pieces, (p + 1) * pieces) for p in (here[0], 2 * context_ranks - 1 - here[0])]
    )  # as megatron.core.utils.get_batch_on_this_cp_rank
    sharded = tensor_ranks > 1
    mine, leaves = total(
        held, here, Vocab(tensor, V) if sharded else None, (lambda x: shard(x, tensor)) if sharded else torch.clone
    )
    mine.backward()
    dist.all_reduce(mine_total := mine.detach().clone(), group=context)
    torch.testing.assert_close(mine_total, whole.detach())
    for x in leaves[1:]:  # a replicated weight: the ranks' gradients add up
        dist.all_reduce(x.grad, group=context)
    if sharded:
        dist.all_reduce(leaves[0].grad, group=tensor)
    torch.testing.assert_close(leaves[0].grad, whole_leaves[0].grad[:, held])
    for x, y in zip(leaves[1:], whole_leaves[1:], strict=True):
        expected = shard(y.grad, tensor) if sharded else y.grad
        real = min(len(x), V - dist.get_rank(tensor) * len(x)) if sharded else V
        torch.testing.assert_close(x.grad[:real], expected[:real])


def everything() -> None:
    works = [vocab_parallel, teacher_topk_over_shards, scores_over_shards, no_tokens, tensor_and_context_parallel]
    for work in [*works, nemo_over_ranks] if dist.get_world_size() == 2 else works:
        work()
        dist.barrier()


def nemo_over_ranks() -> None:
    """NeMo-RL's logits loss with two ranks of the vocabulary, then with two ranks of the sequences."""
    world = dist.group.WORLD
    assert world is not None
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(0)
    sequences, length, padded = 2, 7, 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.zeros(sequences, length)
    mask[0, 2:7], mask[1, 1:4] = 1, 1
    data = {
        "input_ids": torch.randint(0, V, (sequences, length), generator=generator),
        "token_mask": mask,
        "sample_mask": torch.ones(sequences),
        "teacher_hidden": normal(sequences, length, H),
    }
    logits, head = normal(sequences, padded, V), normal(V, H)
    counts = (torch.tensor(2.0), torch.tensor(8.0))
    columns, held = slice(rank * V // 2, (rank + 1) * V // 2), positions(padded, rank, 2)
    cuts = [
        (head[columns], Groups(tensor=world), (..., columns), 1),
        (head, Groups(context=world), (slice(None), held), 2),
    ]
    for objective in (Divergence(k=7), Divergence("reverse_kl", support="full")):
        whole_logits = logits.clone().requires_grad_()
        whole_fn = DivergenceLoss(objective, teacher_head=lambda: head, groups=Groups, watch=5)
        whole, whole_metrics = whole_fn(data, *counts, logits=whole_logits)
        whole.backward()
        for my_head, my_groups, mine, context_ranks in cuts:
            local = logits[mine].clone().requires_grad_()
            loss_fn = DivergenceLoss(
                objective, teacher_head=partial(_same, my_head), groups=partial(_same, my_groups), watch=5
            )
            loss, metrics = loss_fn(data, *counts, logits=local)
            (loss / context_ranks).backward()  # NeMo-RL divides by the context-parallel size
            torch.testing.assert_close(metrics, whole_metrics)
            torch.testing.assert_close(local.grad, whole_logits.grad[mine])


def _same(value: object) -> object:
    return value
