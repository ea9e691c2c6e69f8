"""Attention to prompts that are kept once is attention to each sequence's own prompt."""

import pytest
import torch
from torch import Tensor

from mopd_nemo.engines.local.fast_decode.prompts import SharedPrompts

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
