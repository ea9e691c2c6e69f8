"""Vocabulary and sequences spread over processes: real gloo groups."""

import pytest

from mopd_nemo.losses.vocab import Vocab
from tests.losses.ranks import everything
from tests.ranks import spawn


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_and_cuts_change_nothing(ranks: int) -> None:
    spawn(ranks, everything)


def test_a_rank_of_padding_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="would hold 0"):
        Vocab(size=0).shard(4)
