"""Weights that a whole update fixes, whatever the micro-batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopd_nemo.losses.objectives import token_weights

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(LENGTHS, st.sampled_from(["token_mean", "sequence_mean"]))
def test_weights_sum_to_one_over_tokens(lengths: list[int], aggregation) -> None:
    weights = token_weights(lengths, aggregation)
    assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(1.0)


def test_empty_responses_are_refused() -> None:
    assert token_weights([], "token_mean") == []
    with pytest.raises(ValueError, match="empty response"):
        token_weights([3, 0], "token_mean")
