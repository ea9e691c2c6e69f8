import torch
from hypothesis import given
from hypothesis import strategies as st

from mopd_nemo.engines.local.model import micro_batches
from mopd_nemo.engines.local.prefix_tree import build_tree, tree_batches


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_every_row_once_and_within_budget(lengths: list[int], limit: int) -> None:
    batches = micro_batches(lengths, limit)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= limit for b in batches)
    longest = [max(lengths[i] for i in b) for b in batches]
    assert longest == sorted(longest, reverse=True)


@given(st.lists(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=2), max_size=20))
def test_units_stay_together_in_trees_within_budget(units: list[list[list[int]]]) -> None:
    batches = tree_batches(units, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(len(units)))
    for batch in batches:
        assert len(batch) == 1 or len(_tree(units, batch)) <= 64 + 16 * sum(len(units[i]) for i in batch)


def test_a_batch_ends_between_what_has_little_in_common() -> None:
    families = [[start] * 100 + [9] * n for start in (1, 2, 3) for n in (20, 21, 22, 23)]
    batches = tree_batches([[sequence] for sequence in families], 300)
    assert sorted(map(sorted, batches)) == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11]]
    assert sum(len(_tree([[s] for s in families], batch)) for batch in batches) == 3 * 123


def _tree(units: list[list[list[int]]], batch: list[int]) -> torch.Tensor:
    return build_tree([sequence for i in batch for sequence in units[i]], torch.device("cpu")).ids_S
