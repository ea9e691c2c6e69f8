"""Log-probabilities over a vocabulary whose columns are spread over a tensor-parallel group.

Every function is collective: all ranks of the group call it with the same rows and get the same answer.
Shape suffixes: R rows, V columns of this rank, K tokens per row.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 2**28
"""Float32 logits worked on at once."""

Scores = dict[str, Tensor]
"""`ids` [T, k] int32 and `logprobs` [T, k], T response tokens sequence by sequence in order."""


def topk_logprobs(logits_RV: Tensor, k: int, vocab_size: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row and their log-probabilities under the full vocabulary.

    Args:
        logits_RV: this rank's columns; any float type.
        k: at most `vocab_size`.
        vocab_size: columns from here on are padding, of the kind Megatron adds to make shards equal, and do not count.

    Returns:
        ids_RK (int32), likeliest first, and logprobs_RK (float32).
    """
    parts = [_topk_chunk(chunk_RV, k, vocab_size, group) for chunk_RV in _chunks(logits_RV)]
    return torch.cat([ids for ids, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def logprobs_of(logits_RV: Tensor, ids_RK: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """Log-probabilities of given tokens under the full vocabulary; arguments as for `topk_logprobs`.

    Returns:
        logprobs_RK (float32).
    """
    sizes = [len(chunk) for chunk in _chunks(logits_RV)]
    pairs = zip(_chunks(logits_RV), ids_RK.split(sizes), strict=True)
    return torch.cat([_given_chunk(chunk_RV, ids, vocab_size, group) for chunk_RV, ids in pairs])


def _topk_chunk(logits_RV: Tensor, k: int, vocab_size: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    logits_RV, first = _real_columns(logits_RV, vocab_size, group)
    partition_R1 = _log_partition(logits_RV, group)
    values_RK, ids_RK = logits_RV.topk(min(k, logits_RV.shape[-1]), dim=-1)
    values = _gathered(values_RK, group)
    ids = _gathered(ids_RK + first, group)
    values_RK, order_RK = torch.cat(values, dim=-1).topk(k, dim=-1)
    return torch.cat(ids, dim=-1).gather(-1, order_RK).int(), values_RK - partition_R1


def _given_chunk(logits_RV: Tensor, ids_RK: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    logits_RV, first = _real_columns(logits_RV, vocab_size, group)
    partition_R1 = _log_partition(logits_RV, group)
    local_RK = ids_RK.long() - first
    here_RK = (local_RK >= 0) & (local_RK < logits_RV.shape[-1])
    values_RK = logits_RV.gather(-1, local_RK.clamp(0, logits_RV.shape[-1] - 1)).masked_fill(~here_RK, 0.0)
    dist.all_reduce(values_RK, group=group)  # each token is on one rank, the others add zero
    return values_RK - partition_R1


def _real_columns(logits_RV: Tensor, vocab_size: int, group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """Float32 logits with padding at -inf, and the id of the first column."""
    width = logits_RV.shape[-1]
    first = dist.get_rank(group) * width
    logits_RV = logits_RV.float()
    if first + width > vocab_size:
        padding_V = torch.arange(first, first + width, device=logits_RV.device) >= vocab_size
        logits_RV = logits_RV.masked_fill(padding_V, float("-inf"))
    return logits_RV, first


def _log_partition(logits_RV: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log Σ exp over the whole vocabulary, [R, 1]."""
    maximum_R1 = logits_RV.amax(-1, keepdim=True)
    dist.all_reduce(maximum_R1, op=dist.ReduceOp.MAX, group=group)
    total_R1 = (logits_RV - maximum_R1).exp().sum(-1, keepdim=True)
    dist.all_reduce(total_R1, group=group)
    return maximum_R1 + total_R1.log()


def _gathered(part: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


def _chunks(logits_RV: Tensor) -> tuple[Tensor, ...]:
    return logits_RV.split(max(CHUNK_BYTES // (4 * logits_RV.shape[-1]), 1))
