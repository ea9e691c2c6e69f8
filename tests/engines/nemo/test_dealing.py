"""Which rank works on which row. NeMo-RL's own packing of a rank's rows: tests/integration/nemo/test_packing.py."""

from __future__ import annotations

import random

import pytest

from mopd_nemo.engines.nemo.dealing import EVEN, deal, deal_sequences, lanes, padded_alike
from mopd_nemo.losses.objectives import Divergence
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import TrainExample


def step(groups: int, size: int, longest: int = 400, seed: int = 0) -> TrainBatch:
    """Rows of some problems, most of which read one teacher prompt and the first another."""
    draw = random.Random(seed)
    rows = []
    for group in range(groups):
        prompt = tuple(range(draw.randint(10, 60)))
        context = prompt * 8
        for number in range(size):
            response = tuple(range(draw.randint(1, longest)))
            rows.append(TrainExample(group, number, prompt, response, (), (number == 0, *context)))
    return TrainBatch(rows, [LossTerm(Divergence(), tuple(range(len(rows))))])


def work(rows: list[TrainExample], rank_of: list[int], ranks: int) -> list[int]:
    """Tokens of the update, by rank."""
    tokens = [0] * ranks
    for row, rank in zip(rows, rank_of, strict=True):
        tokens[rank] += len(row.prompt_ids) + len(row.response_ids)
    return tokens


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("updates", [1, 2, 4])
def test_every_update_is_even_and_keeps_problems_whole(updates: int, ranks: int) -> None:
    batch = step(groups=64, size=8)
    rank_of = deal(batch.examples, batch.updates(updates), ranks, packed=True)
    for terms in batch.updates(updates):
        part = [i for term in terms for i in term.examples]
        tokens = work([batch.examples[i] for i in part], [rank_of[i] for i in part], ranks)
        assert max(tokens) * ranks / sum(tokens) < 1.15
    placed = {(row.group_index, rank) for row, rank in zip(batch.examples, rank_of, strict=True)}
    assert len(placed) == 64


def test_rows_with_one_teacher_prompt_stay_together_where_problems_would_be_uneven() -> None:
    batch = step(groups=3, size=8, longest=20)
    rank_of = deal(batch.examples, batch.updates(1), 2, packed=True)
    assert max(work(batch.examples, rank_of, 2)) < EVEN * sum(work(batch.examples, rank_of, 2)) / 2
    alone = deal(batch.examples, batch.updates(1), 16, packed=True)
    assert set(alone) == set(range(16)), "a rank without rows would wait for the others"


def test_padded_rows_are_dealt_by_number() -> None:
    batch = step(groups=8, size=4)
    rank_of = deal(batch.examples, batch.updates(1), 4, packed=False)
    assert [rank_of.count(rank) for rank in range(4)] == [8] * 4


def test_rows_of_no_update_are_dealt_too_and_the_same_step_is_dealt_the_same_way() -> None:
    rows = step(groups=4, size=2).examples
    batch = TrainBatch(rows, [LossTerm(Divergence(), (0, 1, 2, 3))])
    first, again = (deal(rows, batch.updates(2), 2, packed=True) for _ in range(2))
    assert first == again and len(first) == 8 and set(first[4:]) == {0, 1}
    assert deal([], [], 2, packed=True) == []


def test_single_sequences_are_dealt_evenly() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 4000) for _ in range(128)]
    rank_of = deal_sequences([((n,), range(size - 1)) for n, size in enumerate(lengths)], 4, packed=True)
    tokens = [sum(size for size, rank in zip(lengths, rank_of, strict=True) if rank == lane) for lane in range(4)]
    assert max(tokens) < 1.02 * sum(lengths) / 4


def test_sequences_with_one_prompt_stay_together_unless_ranks_would_idle() -> None:
    prompts = [(n, *range(500)) for n in range(8)]
    sequences = [(prompt, range(60)) for _ in range(4) for prompt in prompts]
    for ranks in (2, 8):
        rank_of = deal_sequences(sequences, ranks, packed=True)
        assert len({(prompt, rank) for (prompt, _), rank in zip(sequences, rank_of, strict=True)}) == 8
    assert set(deal_sequences(sequences, 32, packed=True)) == set(range(32))
    assert deal_sequences([], 2, packed=True) == []


def test_work_on_a_prompt_that_rows_share_is_shared_between_them() -> None:
    """Two problems with long teacher prompts weigh as much as two with long responses."""
    long, short = tuple(range(4000)), tuple(range(10))
    rows = [TrainExample(group, n, (1,), short, (), (group, *long)) for group in (0, 1) for n in range(8)]
    rows += [TrainExample(group, n, (1,), (*short, *range(100)), (), (group,)) for group in (2, 3) for n in range(8)]
    rank_of = deal(rows, [[LossTerm(Divergence(), tuple(range(32)))]], 2, packed=True)
    assert sorted(rank_of[group * 8] for group in (0, 1)) == sorted(rank_of[group * 8] for group in (2, 3)) == [0, 1]


def test_lanes_have_filler_where_a_rank_has_fewer_rows() -> None:
    assert lanes([1, 0, 1, 1], 2) == [1, 4, 5, 0, 2, 3]
    assert lanes([0, 0], 3) == [0, 1, 2, 3, 4, 5]


def test_micro_batches_of_padded_rows_have_one_shape_on_all_ranks() -> None:
    ranks = padded_alike(
        [[0, 1, 2], [3, 4, 5]], [9, 2, 3, 4, 4, 4], 16, {"sequence_length_round": 4, "max_tokens_per_microbatch": 16}
    )
    assert ranks == [[([1, 2], 4), ([0], 12)], [([3, 4], 4), ([5], 12)]]
