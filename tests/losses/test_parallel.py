"""Vocabulary and sequences spread over processes: real gloo groups."""

import pytest
import torch

from mopd_nemo.losses.context_parallel import positions, response_rows
from mopd_nemo.losses.vocab import Vocab
from tests.losses.ranks import everything
from tests.ranks import spawn


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_and_cuts_change_nothing(ranks: int) -> None:
    spawn(ranks, everything)


def test_ranks_hold_the_pieces_that_megatron_gives_them() -> None:
    assert positions(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert positions(8, 1, 2).tolist() == [2, 3, 4, 5]
    assert positions(5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="6 positions cannot be cut over 2 ranks: pad to 4·n"):
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


def test_a_rank_of_padding_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="would hold 0"):
        Vocab(size=0).shard(4)
