from collections import Counter
from collections.abc import Callable

import pytest
import torch

from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.engines.local.sampler import draw
from tests.engines.local.test_model import naive_logprobs

Make = Callable[..., LocalEngine]
PROMPTS = [(5, 6, 7), (9, 8, 7, 6, 5, 4, 3), (11,), (12, 13)]


def test_draw_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniforms_B = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens_B, logprobs_B = draw(probabilities.log().expand(1000, -1), uniforms_B, Sampling(1))
    assert Counter(tokens_B.tolist()) == {0: 500, 2: 300, 3: 200}
    torch.testing.assert_close(logprobs_B.exp(), probabilities[tokens_B])


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 1e-16])
def test_draw_never_hits_an_impossible_token(uniform: float) -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    token_B, _ = draw(logits, torch.tensor([uniform], dtype=torch.float64), Sampling(1))
    assert token_B.item() in (1, 3)


def test_temperature_and_top_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(1000, -1)
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    nucleus, logprobs = draw(logits, uniforms, Sampling(1, top_p=0.8))
    assert Counter(nucleus.tolist()) == {0: 625, 1: 375}  # 0.5 / 0.8, 0.3 / 0.8
    assert logprobs.exp().max().item() == pytest.approx(0.625)
    sharp, _ = draw(logits, uniforms, Sampling(1, temperature=0.5))
    assert Counter(sharp.tolist())[0] == pytest.approx(1000 * 0.25 / 0.365, abs=1)


def test_rollouts_carry_the_model_s_own_logprobs(make: Make) -> None:
    engine = make()
    for prompt, rollouts in zip(PROMPTS, engine.generate(Request(PROMPTS, 2, Sampling(12), "s")), strict=True):
        for rollout in rollouts:
            expected = naive_logprobs(engine.student.module, prompt, rollout.response_ids)
            assert rollout.logprobs == pytest.approx(expected, abs=1e-4)


def test_batching_changes_nothing(make: Make) -> None:
    request = Request(PROMPTS, 4, Sampling(20), "s")
    together, apart = (make(f"rollout.batch_size={size}").generate(request) for size in (1000, 4))
    ids = [[[rollout.response_ids for rollout in group] for group in groups] for groups in (together, apart)]
    assert ids[0] == ids[1]


def test_seed_decides(make: Make) -> None:
    engine = make()
    first, again, other = (engine.generate(Request(PROMPTS, 2, Sampling(20), seed)) for seed in ("a", "a", "b"))
    assert first == again
    assert first != other


def test_responses_end_at_the_end_token_or_at_the_limit(make: Make) -> None:
    engine = make()
    eos = engine.chat.tokenizer.eos_token_id
    with torch.no_grad():  # make the end token likely enough to stop rows at different times
        engine.student.head.weight[eos] = engine.student.head.weight.mean(0) + 0.4
    rollouts = [r for group in engine.generate(Request(PROMPTS * 8, 4, Sampling(30), "s")) for r in group]
    lengths = {len(r.response_ids) for r in rollouts if r.finished}
    assert len(lengths) > 3, "rows should end at different times, so that the batch is compacted"
    for rollout in rollouts:
        assert eos not in rollout.response_ids[:-1]
        assert rollout.finished == (rollout.response_ids[-1] == eos)
        assert rollout.finished or len(rollout.response_ids) == 30
        assert len(rollout.logprobs) == len(rollout.response_ids)
        assert "<|im_end|>" not in rollout.text
