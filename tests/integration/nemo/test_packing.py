"""Rows dealt by NeMo-RL's own packer and sharding."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from mopd_nemo.engines.nemo.batches import even_budget
from tests.integration.nemo import cpu

PACKING = {
    "algorithm": "modified_first_fit_decreasing",
    "input_key": "input_ids",
    "input_lengths_key": "input_lengths",
    "sequence_length_pad_multiple": 8,
}


@pytest.fixture(scope="module", autouse=True)
def importable() -> None:
    cpu.order_path()


def dealt(lengths: list[int], ranks: int, budget: int) -> list[int]:
    """Tokens of each rank."""
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    data: Any = BatchedDataDict(
        {"input_ids": torch.zeros(len(lengths), max(lengths)), "input_lengths": torch.tensor(lengths)}
    )
    arguments: Any = PACKING | {"max_tokens_per_microbatch": budget}
    shards, _ = data.shard_by_batch_size(ranks, batch_size=len(lengths), sequence_packing_args=arguments)
    return [int(shard["input_lengths"].sum()) for shard in shards]


def skew(tokens: list[int]) -> float:
    """The busiest rank's tokens over an even share."""
    return max(tokens) * len(tokens) / sum(tokens)


def test_short_rows_that_fit_one_row_of_the_budget_are_dealt_evenly() -> None:
    lengths = [200 + n % 50 for n in range(64)]
    budget = even_budget(lengths, 16384, 4, PACKING)
    assert skew(dealt(lengths, 4, 16384)) > 3
    assert skew(dealt(lengths, 4, budget)) < 1.05


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("rows", [64, 128, 256])
@pytest.mark.parametrize("longest", [500, 4000])
def test_no_rank_waits_long_for_another(rows: int, ranks: int, longest: int) -> None:
    draw = random.Random(rows + ranks)
    lengths = [min(longest, 100 + int(draw.expovariate(3 / longest))) for _ in range(rows)]
    budget = even_budget(lengths, 16384, ranks, PACKING)
    before, after = (skew(dealt(lengths, ranks, tokens)) for tokens in (16384, budget))
    assert after <= before and after < 1.2


def test_the_longest_sequence_always_fits_and_the_budget_is_kept() -> None:
    assert even_budget([900, 8, 8, 8], 1024, 4, PACKING) >= 904
    assert even_budget([1000] * 64, 1024, 4, PACKING) <= 1024
    assert even_budget([5], 64, 1, PACKING) == 64
