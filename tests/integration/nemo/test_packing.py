"""A deal through NeMo-RL's own packer and sharding: each rank gets its rows, in as many micro-batches as the others."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from mopd_nemo.engines.nemo.dealing import deal_sequences, dealt, lanes
from tests.integration.nemo import cpu

PACKING = {
    "algorithm": "modified_first_fit_decreasing",
    "input_key": "input_ids",
    "input_lengths_key": "input_lengths",
    "sequence_length_pad_multiple": 8,
    "max_tokens_per_microbatch": 4096,
}
DYNAMIC = {
    "input_key": "input_ids",
    "input_lengths_key": "input_lengths",
    "sequence_length_round": 8,
    "max_tokens_per_microbatch": 4096,
}
WAYS: dict[str, Any] = {
    "packed": {"sequence_packing_args": PACKING},
    "dynamic": {"dynamic_batching_args": DYNAMIC},
    "padded": {},
}


@pytest.fixture(scope="module", autouse=True)
def importable() -> None:
    cpu.order_path()


def shards(lengths: list[int], rank_of: list[int], ranks: int, **way: Any) -> tuple[list[Any], list[int]]:
    """Each rank's part, and the numbers of its rows in this order; filler from `len(lengths)` on."""
    order = lanes(rank_of, ranks)
    tokens = [lengths[i] if i < len(lengths) else 2 for i in range(len(order))]
    batch = {
        "input_ids": torch.arange(len(order))[:, None].expand(-1, max(tokens)).contiguous(),
        "input_lengths": torch.tensor(tokens),
        "note": [str(number) for number in range(len(order))],
    }
    found = dealt(batch, order).shard_by_batch_size(ranks, batch_size=len(order), **way)
    parts, positions = found if way else (found, list(range(len(order))))
    return parts, [order[position] for position in positions]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "ranks"), [(3, 4), (64, 2), (100, 8)])
def test_each_rank_gets_its_own_rows_whole(rows: int, ranks: int, way: str) -> None:
    draw = random.Random(rows + ranks)
    lengths = [draw.randint(2, 900) for _ in range(rows)]
    rank_of = [draw.randrange(ranks) for _ in range(rows)]
    parts, numbers = shards(lengths, rank_of, ranks, **WAYS[way])
    size = len(numbers) // ranks
    for rank, part in enumerate(parts):
        own = numbers[rank * size : (rank + 1) * size]
        assert part["input_ids"][:, 0].tolist() == own == [int(note) for note in part["note"]]
        assert {i for i in own if i < rows} == {i for i in range(rows) if rank_of[i] == rank}
        assert part["input_ids"].untyped_storage().nbytes() == part["input_ids"].nbytes  # Ray pickles the storage
    if way != "padded":
        assert len({len(part.micro_batch_indices[0]) for part in parts}) == 1, "Megatron's ranks step together"
    for part in parts if way != "padded" else []:
        spans = part.micro_batch_indices[0]
        assert [row for start, end in spans for row in range(start, end)] == list(range(size))
        for (start, end), length in zip(spans, part.micro_batch_lengths[0], strict=True):
            own = part["input_lengths"][start:end].tolist()
            tokens = sum(-(-n // 8) * 8 for n in own) if way == "packed" else length * len(own)
            assert max(own) <= length and tokens <= 4096
            assert way == "dynamic" or tokens == length


def dealt_apart(lengths: list[int], ranks: int) -> list[int]:
    """Ranks of sequences with prompts of their own."""
    return deal_sequences([((n,), range(length - 1)) for n, length in enumerate(lengths)], ranks, packed=True)


@pytest.mark.parametrize("way", ["packed", "dynamic"])
def test_nemo_rl_reads_the_micro_batches(way: str) -> None:
    parts, _ = shards([700] * 9, dealt_apart([700] * 9, 2), 2, **WAYS[way])
    batch = parts[0].get_batch(0, 5)
    iterator = (
        batch.make_microbatch_iterator_for_packable_sequences()
        if way == "packed"
        else batch.make_microbatch_iterator_with_dynamic_shapes()
    )
    assert [note for micro_batch in iterator for note in micro_batch["note"]] == parts[0]["note"]


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("longest", [500, 4000])
def test_no_rank_waits_long_for_another(ranks: int, longest: int) -> None:
    draw = random.Random(ranks)
    lengths = [min(longest, 100 + int(draw.expovariate(3 / longest))) for _ in range(128)]
    parts, _ = shards(lengths, dealt_apart(lengths, ranks), ranks, **WAYS["packed"])
    tokens = [int(part["input_lengths"].sum()) for part in parts]
    assert max(tokens) * ranks / sum(tokens) < 1.05
