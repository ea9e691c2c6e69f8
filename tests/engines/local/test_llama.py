"""Attention to shared prompts, and caches that finished sequences leave. `test_decoding.py` has whole decoding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mopd_nemo.engines.local.llama import SharedPrompts, compact_order, move_rows

LENGTHS = [7, 3, 1, 5]
HEADS, GROUP, SIZE = 2, 3, 8


def alone(cache_2KPD: Tensor, length: int, queries_KGD: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = cache_2KPD[:, :, :length].double()
    scores_KGP = queries_KGD.double() @ keys.mT
    return scores_KGP.softmax(-1) @ values, scores_KGP.logsumexp(-1)


@pytest.mark.parametrize("num_samples", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_each_sequence_attends_to_its_own_prompt_alone(num_samples: int, scale: float) -> None:
    """While sequences leave, prompts with them; also where all scores but one vanish beside the largest."""
    torch.manual_seed(0)
    cache = torch.randn(2, 2, len(LENGTHS), HEADS, max(LENGTHS), SIZE)
    shared = SharedPrompts(cache.clone(), torch.tensor(LENGTHS), num_samples)
    prompts = [number for number in range(len(LENGTHS)) for _ in range(num_samples)]
    while prompts:
        for layer in range(2):
            queries_BKGD = scale * torch.randn(len(prompts), HEADS, GROUP, SIZE)
            attended_BKGD, mass_BKG = shared.attend(layer, queries_BKGD)
            for row, prompt in enumerate(prompts):
                attended, mass = alone(cache[layer, :, prompt], LENGTHS[prompt], queries_BKGD[row])
                torch.testing.assert_close(
                    attended_BKGD[row].double(), attended, atol=2e-3 if scale > 1 else 1e-5, rtol=0
                )
                torch.testing.assert_close(mass_BKG[row].double(), mass, atol=1e-5 * scale, rtol=1e-5)
        order = torch.randperm(len(prompts))[:-1]
        prompts = [prompts[i] for i in order]
        if prompts:
            shared.keep(order)


def test_prompts_are_not_copied_for_their_sequences() -> None:
    cache = torch.randn(1, 2, len(LENGTHS), HEADS, max(LENGTHS), SIZE)
    shared = SharedPrompts(cache, torch.tensor(LENGTHS), 8)
    queries_BKGD = torch.randn(len(LENGTHS) * 8, HEADS, GROUP, SIZE)
    before, _ = shared.attend(0, queries_BKGD)
    cache[0, 1].mul_(2)  # the values that were handed over are those that are read
    after, _ = shared.attend(0, queries_BKGD)
    torch.testing.assert_close(after, 2 * before)


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
