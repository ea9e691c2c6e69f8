"""Which data-parallel rank works on which rows of a step.

Rows are dealt once a step. A rank scores the rows that it trains on, so what a worker learns of a row can stay there.
The rows of a problem stay together where that is even enough, since they share prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from mopd_nemo.engines.nemo.prompts import evenly
from mopd_nemo.methods.batch import LossTerm
from mopd_nemo.types import TrainExample

EVEN = 1.1
"""Rows stay together if the busiest rank then has at most this many times the work it would have of single rows."""
UPDATE_COST = 4
"""Work of a token in an update, where scoring is 1: forward, the same recomputed, and twice that backward."""


def deal(rows: Sequence[TrainExample], updates: Sequence[Sequence[LossTerm]], ranks: int, *, packed: bool) -> list[int]:
    """The rank of each row.

    Args:
        rows: of the step.
        updates: the terms of each optimiser update. Each update is dealt evenly by itself; so are the other rows.
        packed: work is a row's tokens. Otherwise every row is padded, and work is the number of rows.
    """
    costs = _costs(rows) if packed else [1] * len(rows)
    rank_of = [0] * len(rows)
    parts = [{i for term in terms for i in term.examples} for terms in updates]
    parts.append(set(range(len(rows))).difference(*parts))
    for part in parts:
        ways = (lambda i: rows[i].group_index, lambda i: (rows[i].group_index, rows[i].teacher_prompt_ids))
        for i, rank in _dealt_together(sorted(part), ways, costs, ranks).items():
            rank_of[i] = rank
    return rank_of


def deal_sequences(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], ranks: int, *, packed: bool) -> list[int]:
    """The rank of each (prompt, response) sequence of a pass that only scores; see `deal`."""
    prompts = [tuple(prompt) for prompt, _ in sequences]
    readers = Counter(prompts)
    costs = [
        len(prompt) / readers[prompt] + len(response) for prompt, (_, response) in zip(prompts, sequences, strict=True)
    ]
    part = list(range(len(sequences)))
    found = _dealt_together(part, (prompts.__getitem__,), costs if packed else [1] * len(part), ranks)
    return [found[i] for i in part]


def _costs(rows: Sequence[TrainExample]) -> list[float]:
    """Work of each row, and its part of the work on prompts that are read once for several."""
    contexts = [(row.teacher_prompt_ids, row.contrast_prompt_ids) for row in rows]
    readers = [Counter(prompts) for prompts in zip(*contexts, strict=True)]
    costs = []
    for row, prompts in zip(rows, contexts, strict=True):
        cost: float = UPDATE_COST * (len(row.prompt_ids) + len(row.response_ids))
        for prompt, count in zip(prompts, readers, strict=True):
            if prompt is not None:
                cost += len(prompt) / count[prompt] + len(row.response_ids)
        costs.append(cost)
    return costs


def _dealt_together(
    part: list[int], together: Sequence[Callable[[int], Hashable]], costs: Sequence[float], ranks: int
) -> dict[int, int]:
    """Ranks of some rows, those with one key together, by the first way that is even enough; else row by row."""
    ways: tuple[Callable[[int], Hashable], ...] = (*together, lambda i: i)
    tried = []
    for key in ways:
        units: dict[Hashable, list[int]] = {}
        for i in part:
            units.setdefault(key(i), []).append(i)
        tried.append(spread(list(units.values()), costs, ranks))
    most = EVEN * tried[-1][1]
    return next(found for found, busiest in tried if busiest <= most)


def spread(units: Sequence[Sequence[int]], costs: Sequence[float], ranks: int) -> tuple[dict[int, int], float]:
    """The rank of each row of some units, which stay whole, and the work of the busiest rank."""
    work = [sum(costs[i] for i in unit) for unit in units]
    shares = evenly(work, ranks)
    found = {i: rank for rank, share in enumerate(shares) for number in share for i in units[number]}
    return found, max(sum(work[number] for number in share) for share in shares)


def lanes(rank_of: Sequence[int], ranks: int) -> list[int]:
    """Row numbers rank by rank, as many for each; numbers from `len(rank_of)` on are filler, which NeMo-RL needs."""
    own = [[i for i, rank in enumerate(rank_of) if rank == lane] for lane in range(ranks)]
    size = max(map(len, own))
    order, filler = [], len(rank_of)
    for members in own:
        missing = size - len(members)
        order += [*members, *range(filler, filler + missing)]
        filler += missing
    return order


def dealt(batch: dict[str, Any], order: Sequence[int]) -> Any:
    """A `BatchedDataDict` that NeMo-RL cuts where the deal says, and not as it would deal rows itself.

    Args:
        batch: with rows and filler in the order of their numbers.
        order: see `lanes`.
    """
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict, SlicedDataDict

    class Dealt(BatchedDataDict):
        def shard_by_batch_size(
            self,
            shards: int,
            batch_size: int | None = None,
            allow_uneven_shards: bool = False,
            dynamic_batching_args: Any = None,
            sequence_packing_args: Any = None,
        ) -> Any:
            """As NeMo-RL's, of one global batch. With micro-batches, also the positions in the order of the parts."""
            size = self.size // shards
            lanes = [range(rank * size, (rank + 1) * size) for rank in range(shards)]
            lengths = self["input_lengths"].tolist()
            if sequence_packing_args is not None:
                ranks = packed(lanes, lengths, sequence_packing_args)
            elif dynamic_batching_args is not None:
                ranks = padded_alike(lanes, lengths, self["input_ids"].shape[1], dynamic_batching_args)
            else:
                return [SlicedDataDict(self.select_indices(list(lane)).data) for lane in lanes]
            parts, positions = [], []
            for micro_batches in ranks:
                own = [position for members, _ in micro_batches for position in members]
                ends = list(accumulate((len(members) for members, _ in micro_batches), initial=0))
                part = SlicedDataDict(self.select_indices(own).data)
                part.micro_batch_indices = [[list(span) for span in pairwise(ends)]]
                part.micro_batch_lengths = [[length for _, length in micro_batches]]
                if sequence_packing_args is not None:
                    part.elem_counts_per_gb = [size]
                parts.append(part)
                positions += own
            return parts, positions

    return Dealt(BatchedDataDict(batch).select_indices(list(order)).data)


MicroBatches = list[tuple[list[int], int]]
"""Positions in the batch, and NeMo-RL's length: tokens of a packed row, or of each padded row."""


def packed(lanes: Sequence[Sequence[int]], lengths: Sequence[int], packing: Mapping[str, Any]) -> list[MicroBatches]:
    """Each rank's sequences in packed rows by NeMo-RL's packer; as many rows for every rank.

    Args:
        lanes: positions, by rank.
        lengths: tokens of each sequence.
        packing: NeMo-RL's `sequence_packing_args`.
    """
    from nemo_rl.data.packing import get_packer

    multiple = packing["sequence_length_pad_multiple"]
    padded = [-(-length // multiple) * multiple for length in lengths]

    def pack(lane: Sequence[int], least: int) -> list[list[int]]:
        packer = get_packer(packing["algorithm"], packing["max_tokens_per_microbatch"], min_bin_count=least)
        return [[lane[i] for i in members] for members in packer.pack([padded[position] for position in lane])]

    count = max(len(pack(lane, 1)) for lane in lanes)
    return [[(members, sum(padded[i] for i in members)) for members in pack(lane, count)] for lane in lanes]


def padded_alike(
    lanes: Sequence[Sequence[int]], lengths: Sequence[int], width: int, batching: Mapping[str, Any]
) -> list[MicroBatches]:
    """Each rank's sequences, shortest first, in micro-batches of one shape on all ranks, which FSDP needs.

    Args:
        lanes: positions, by rank; as many for each.
        width: of the padded batch.
        batching: NeMo-RL's `dynamic_batching_args`.
    """
    multiple, budget = batching["sequence_length_round"], batching["max_tokens_per_microbatch"]
    by_length = [sorted(lane, key=lengths.__getitem__) for lane in lanes]
    cuts: list[tuple[list[int], int]] = []
    for place, positions in enumerate(zip(*by_length, strict=True)):
        longest = min(-(-max(lengths[position] for position in positions) // multiple) * multiple, width)
        if cuts and (len(cuts[-1][0]) + 1) * max(longest, cuts[-1][1]) <= budget:
            places, before = cuts.pop()
            cuts.append(([*places, place], max(longest, before)))
        else:
            cuts.append(([place], longest))
    return [[([lane[place] for place in places], length) for places, length in cuts] for lane in by_length]
