"""Where response rows lie, against cutting the sequences themselves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mopd_nemo.engines.nemo.workers.rows import ResponseHead, packed_rows, padded_rows, positions, response_rows

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5)


def zigzag(row_S: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What a context-parallel rank holds of a sequence: chunks rank and 2·size - 1 - rank."""
    chunks = row_S.chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


@given(LENGTHS)
def test_padded_rows_predict_the_response(pairs: list[tuple[int, int]]) -> None:
    lengths = [prompt + response for prompt, response in pairs]
    rows = padded_rows([prompt for prompt, _ in pairs], lengths)
    expected = [
        (number, position - 1)
        for number, (prompt, _) in enumerate(pairs)
        for position in range(prompt, lengths[number])
    ]
    assert list(zip(rows.sequence_R.tolist(), rows.position_R.tolist(), strict=True)) == expected
    assert rows.number_R.tolist() == list(range(rows.total)) and rows.total == sum(response for _, response in pairs)


@given(LENGTHS, st.sampled_from([1, 2, 4]))
def test_packed_rows_on_all_ranks_are_the_response_once_each(pairs: list[tuple[int, int]], cp_size: int) -> None:
    """Every token is labelled by (sequence, position); ranks must find exactly the labels before response tokens."""
    multiple = 2 * cp_size
    padded = [-(-(prompt + response) // multiple) * multiple for prompt, response in pairs]
    starts = [sum(padded[:n]) for n in range(len(padded) + 1)]
    labels = [torch.arange(size) + 1000 * number for number, size in enumerate(padded)]
    expected = torch.cat([labels[n][prompt - 1 : prompt + response - 1] for n, (prompt, response) in enumerate(pairs)])
    found = torch.full_like(expected, -1)
    lengths = [prompt + response for prompt, response in pairs]
    for rank in range(cp_size):
        held = torch.cat([zigzag(label, rank, cp_size) if cp_size > 1 else label for label in labels])
        rows = packed_rows([prompt for prompt, _ in pairs], lengths, starts, rank, cp_size)
        assert rows.total == len(expected) and not (found[rows.number_R] >= 0).any()
        found[rows.number_R] = held[rows.position_R]
    assert torch.equal(found, expected)


def test_head_computes_chosen_rows_and_restores_the_layer() -> None:
    layer = torch.nn.Linear(4, 6, bias=False)
    layer.sequence_parallel = False  # type: ignore[assignment]
    hidden_SBH = torch.randn(5, 2, 4)
    rows = padded_rows([2, 1], [4, 3])
    with ResponseHead(layer) as head:
        head.rows = rows
        answer = layer(hidden_SBH)
    torch.testing.assert_close(answer[:, 0], layer(hidden_SBH)[rows.position_R, rows.sequence_R])
    assert answer.shape == (4, 1, 6) and layer(hidden_SBH).shape == (5, 2, 6)
    with ResponseHead(None):
        pass


def test_ranks_hold_the_pieces_that_megatron_gives_them() -> None:
    assert positions(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert positions(8, 1, 2).tolist() == [2, 3, 4, 5]
    assert positions(5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="6 positions cannot be split over 2 ranks: pad to 4·n"):
        positions(6, 0, 2)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_response_token_is_predicted_once(ranks: int) -> None:
    is_response = torch.rand(4, 24, generator=torch.Generator().manual_seed(ranks)) < 0.5
    found = []
    for rank in range(ranks):
        rows, tokens = response_rows(is_response, rank, ranks)
        held = positions(24, rank, ranks)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            sequence, place = divmod(row, len(held))
            assert (sequence, held[place] + 1) == divmod(token, 24)
            found.append(token)
    wanted = is_response.clone()
    wanted[:, 0] = False
    assert sorted(found) == wanted.flatten().nonzero().flatten().tolist()
