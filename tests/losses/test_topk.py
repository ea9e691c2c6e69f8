"""The selection by blocks picks what a plain selection picks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopd_nemo.losses.dense import BLOCK, block_maxima, exact_topk


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(0, 2 * BLOCK), st.integers(0, 1000))
def test_same_values_as_topk(k: int, extra: int, seed: int) -> None:
    width = 4 * k * BLOCK + extra
    values = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    found, columns = exact_topk(values, k)
    torch.testing.assert_close(found.sort(-1, descending=True).values, values.topk(k).values)
    torch.testing.assert_close(values.gather(-1, columns), found)


@pytest.mark.parametrize("position", [0, 5 * BLOCK + 2])
def test_a_whole_top_in_one_block(position: int) -> None:
    values = torch.zeros(1, 40 * BLOCK + 7)
    values[0, position : position + 5] = torch.arange(1.0, 6.0)
    assert exact_topk(values, 5)[1].sort().values.tolist() == [list(range(position, position + 5))]


def test_equal_values_are_chosen_once_each() -> None:
    columns = exact_topk(torch.zeros(2, 40 * BLOCK + 3), 6)[1]
    assert all(len(set(row)) == 6 for row in columns.tolist())
    assert columns.max() < 40 * BLOCK + 3


def test_short_last_block() -> None:
    values = torch.arange(2 * BLOCK + 1.0)[None]
    assert block_maxima(values).tolist() == [[BLOCK - 1, 2 * BLOCK - 1, 2 * BLOCK]]
