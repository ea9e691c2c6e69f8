import torch
from hypothesis import given
from hypothesis import strategies as st

from mopd_nemo.engines.local.batching import compact_order, move_rows


@given(st.lists(st.booleans(), max_size=40))
def test_the_last_rows_take_the_places_of_those_that_ended(ended: list[bool]) -> None:
    order = compact_order(torch.tensor(ended, dtype=torch.bool)).tolist()
    assert sorted(order) == [i for i, has_ended in enumerate(ended) if not has_ended]
    assert all(order[i] == i for i in range(len(order)) if not ended[i])


@given(st.lists(st.booleans(), max_size=40))
def test_a_cache_follows_its_rows(ended: list[bool]) -> None:
    cache = torch.arange(4 * len(ended)).view(2, 2, len(ended), 1, 1, 1)
    order = compact_order(torch.tensor(ended, dtype=torch.bool))
    expected = cache[:, :, order]
    move_rows(cache, order)
    assert cache[:, :, : len(order)].equal(expected)
