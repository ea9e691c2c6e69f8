"""A vocabulary whose columns are sharded over the ranks of a tensor-parallel group.

Rank r of W holds columns r·width to (r + 1)·width, as Megatron shards them; without a group it holds all. Nothing here
is differentiable: `token_loss` computes its own gradients.

Shape suffixes: R rows, C rows of a chunk, D distributions handled together, V local columns, K, N chosen tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from mopd_nemo.losses.dense import Chunk, exact_topk, read

CHUNK_BYTES = 2**28
"""Float32 logits that `topk_logprobs` and `logprobs_of` work on at once."""


@dataclass(frozen=True, slots=True)
class Vocab:
    """How the columns of a vocabulary are sharded."""

    group: dist.ProcessGroup | None = None
    """The tensor-parallel process group; None when every rank holds all columns."""
    size: int | None = None
    """Tokens of the whole vocabulary; columns beyond are padding, which is ignored. None: no padding."""

    def shard(self, width: int) -> Shard:
        """The part that this rank holds, given how many columns its tensors have.

        Raises:
            ValueError: it holds padding only, or the ranks together fewer columns than `size`.
        """
        rank = dist.get_rank(self.group) if self.group else 0
        ranks = dist.get_world_size(self.group) if self.group else 1
        size = ranks * width if self.size is None else self.size
        columns = min(width, size - rank * width)
        if columns < 1 or size > ranks * width:
            raise ValueError(
                f"vocabulary of {size} over {ranks} ranks of {width} columns: rank {rank} would hold {columns}"
            )
        return Shard(self.group, rank * width, columns, width, size)


@dataclass(frozen=True, slots=True)
class Shard:
    """Columns `offset` to `offset + columns` of a vocabulary of `size`, and collectives over the group with the rest.

    `width` is `columns` and the padding after them: the same on every rank.
    """

    group: dist.ProcessGroup | None
    offset: int
    columns: int
    width: int
    size: int

    def normalise(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks of D distributions with log-partition and mean over all columns. One all-gather."""
        if not self.group:
            return chunks
        watched = chunks[0].mean_C is not None
        statistics = [x for chunk in chunks for x in (chunk.lse_C, chunk.mean_C) if x is not None]
        parts = self._gathered(torch.stack(statistics)).unflatten(1, (len(chunks), -1))
        lse_DC = parts[:, :, 0].logsumexp(0)
        mean_DC = ((parts[:, :, 0] - lse_DC).exp() * parts[:, :, 1]).sum(0) if watched else [None] * len(chunks)
        return [
            replace(chunk, lse_C=lse_C, mean_C=mean_C)
            for chunk, lse_C, mean_C in zip(chunks, lse_DC, mean_DC, strict=True)
        ]

    def pick(self, chunks: list[Chunk], ids_CN: Tensor) -> Tensor:
        """Log-probabilities of D distributions at N global ids a row, [D, C, N], at least float32. One all-reduce."""
        local_CN, inside_CN = self.local(ids_CN)
        wide = torch.float64 if chunks[0].values_CV.dtype == torch.float64 else torch.float32
        picked_DCN = torch.stack([chunk.values_CV.gather(-1, local_CN).to(wide) for chunk in chunks])
        if self.group:
            self.sum(picked_DCN.masked_fill_(~inside_CN, 0.0))
        lse = [chunk.lse_C for chunk in chunks if chunk.lse_C is not None]
        return picked_DCN - torch.stack(lse)[..., None] if lse else picked_DCN

    def topk(self, logits_CV: Tensor, k: int, block_max: Tensor | None = None) -> Tensor:
        """Global ids of the k likeliest tokens of each row, in no order. Two all-gathers of k numbers a row."""
        values_CK, ids_CK = exact_topk(logits_CV, min(k, self.columns), block_max)
        if not self.group:
            return ids_CK
        missing = (0, min(k, self.width) - values_CK.shape[-1])  # where padding leaves a rank fewer than the others
        values_CK = torch.nn.functional.pad(values_CK, missing, value=float("-inf"))
        ids_CK = torch.nn.functional.pad(ids_CK, missing)
        values_CN = self._gathered(values_CK.contiguous()).movedim(0, 1).flatten(1)
        ids_CN = self._gathered((ids_CK + self.offset).contiguous()).movedim(0, 1).flatten(1)
        return ids_CN.gather(-1, values_CN.topk(k, dim=-1, sorted=False).indices)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place. One all-reduce."""
        if self.group:
            dist.all_reduce(values, group=self.group)
        return values

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Column numbers of global ids, 0 for those of other ranks, and which are held here."""
        inside = (ids >= self.offset) & (ids < self.offset + self.columns)
        return torch.where(inside, ids - self.offset, 0), inside

    def _gathered(self, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, values, group=self.group)
        return torch.stack(parts)


def topk_logprobs(logits_RV: Tensor, k: int, vocab: Vocab) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row, likeliest first, under the normalisation of the whole vocabulary.

    Collective: all ranks of the group call it with the same rows and get the same answer. So is `logprobs_of`.

    Args:
        logits_RV: this rank's columns, of any float type.

    Returns:
        ids_RK (int32) and logprobs_RK (float32).
    """
    shard, parts = vocab.shard(logits_RV.shape[-1]), []
    for part_CV in _parts(logits_RV):
        chunk = _normalised(part_CV, shard)
        ids_CK = shard.topk(chunk.values_CV, k)
        logprobs_CK, order_CK = shard.pick([chunk], ids_CK)[0].sort(-1, descending=True)
        parts.append((ids_CK.gather(-1, order_CK).int(), logprobs_CK))
    return torch.cat([ids for ids, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def logprobs_of(logits_RV: Tensor, ids_RK: Tensor, vocab: Vocab) -> Tensor:
    """logprobs_RK (float32) of given tokens; see `topk_logprobs`."""
    shard, parts = vocab.shard(logits_RV.shape[-1]), _parts(logits_RV)
    ids = ids_RK.long().split([len(part_CV) for part_CV in parts])
    pairs = zip(parts, ids, strict=True)
    return torch.cat([shard.pick([_normalised(part_CV, shard)], ids_CK)[0] for part_CV, ids_CK in pairs])


def _normalised(logits_CV: Tensor, shard: Shard) -> Chunk:
    real_CV = logits_CV[:, : shard.columns].float()
    chunk = read(real_CV, whole=not shard.group, mean=False, blocks=False, owned=False)
    return shard.normalise([chunk])[0]


def _parts(logits_RV: Tensor) -> tuple[Tensor, ...]:
    return logits_RV.split(max(CHUNK_BYTES // (4 * logits_RV.shape[-1]), 1))
