"""Weights that a whole step fixes, whatever the batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopd_nemo.losses import step_lengths, step_weights, token_weights

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)
STEPS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=8)


@given(LENGTHS, st.sampled_from(["token_mean", "sequence_mean"]))
def test_weights_sum_to_one_over_tokens(lengths: list[int], aggregation) -> None:
    weights = token_weights(lengths, aggregation)
    assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(1.0)


@given(STEPS)
def test_every_step_counts_the_same(steps: list[list[int]]) -> None:
    weights = step_weights(steps)
    assert [len(w) for w in weights] == [sum(s) for s in steps]
    num_steps = sum(map(len, steps))
    for lengths, per_token in zip(steps, weights, strict=True):
        for i, length in enumerate(lengths):
            start = sum(lengths[:i])
            assert sum(per_token[start : start + length]) == pytest.approx(1 / num_steps)


@given(LENGTHS)
def test_one_step_a_response_is_the_sequence_mean(lengths: list[int]) -> None:
    assert [w[0] for w in step_weights([[n] for n in lengths])] == pytest.approx(
        token_weights(lengths, "sequence_mean")
    )


def test_empty_responses_are_refused() -> None:
    assert token_weights([], "token_mean") == []
    with pytest.raises(ValueError, match="empty response"):
        token_weights([3, 0], "token_mean")
    with pytest.raises(ValueError, match="without steps"):
        step_weights([[2], []])


@pytest.mark.parametrize(
    ("pieces", "lengths"),
    [
        (["a", " b", "\n\n", "c"], [3, 1]),
        (["a.\n", "\nb", "c"], [2, 1]),  # the break is inside two tokens
        (["a", "\n\n\n", "\n", "b"], [2, 2]),
        (["\n\n", "a"], [2]),
        (["a\n\n", "\n\n"], [2]),
        (["\n"], [1]),
        ([], []),
    ],
)
def test_steps_are_paragraphs(pieces: list[str], lengths: list[int]) -> None:
    assert step_lengths(pieces) == lengths


@given(st.lists(st.text("ab\n ", max_size=4), max_size=30))
def test_every_token_belongs_to_one_step(pieces: list[str]) -> None:
    lengths = step_lengths(pieces)
    assert sum(lengths) == len(pieces)
    assert all(n > 0 for n in lengths)
