"""A real Megatron-Core GPTModel, cut by tensors and by layers, trained through Megatron's schedule on our loss."""

import importlib.util
from functools import partial

import pytest

from tests.ranks import spawn

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed: pip install -e '.[parallel]'"
)


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_gradients_and_weights_equal_those_of_one_process(ranks: int) -> None:
    """Two processes: TP=2 and PP=2; four: TP=2 x PP=2."""
    spawn(ranks, partial(_work, ranks))


def _work(ranks: int) -> None:
    from tests.integration.megatron import ranks as work  # imports Megatron, in a process of its own

    (work.two_processes if ranks == 2 else work.four_processes)()
