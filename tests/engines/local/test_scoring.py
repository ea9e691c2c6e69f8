"""Prefix-shared scoring against one plain forward pass per pair."""

from collections.abc import Callable

import pytest
import torch

from mopd_nemo.config import UserError
from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.local.engine import LocalEngine, response_logprobs

Make = Callable[..., LocalEngine]
LONG, SHORT = tuple(range(20, 70)), (5, 6, 7)
PAIRS = [
    (LONG, (9, 8, 7, 6)),
    (SHORT, (1, 2, 3)),
    (LONG, (4,)),
    (LONG, (9, 8, 7, 6)),
    (SHORT, tuple(range(30, 50))),
    ((11,), (9, 8, 7, 6)),
]


def plain(engine: LocalEngine, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits = engine.student.module(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
    rows = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
    return rows.gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("max_tokens", [1, 120, 100_000])
def test_shared_prefixes_change_no_score(make: Make, max_tokens: int) -> None:
    engine = make()
    prompts, responses = zip(*PAIRS, strict=True)
    scores = response_logprobs(engine.student, prompts, responses, max_tokens=max_tokens)
    for (prompt, response), score in zip(PAIRS, scores, strict=True):
        torch.testing.assert_close(torch.tensor(score), plain(engine, prompt, response), atol=2e-5, rtol=1e-4)
    assert scores[0] == scores[3]


def test_each_distinct_prompt_is_read_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    read: list[int] = []
    forward = engine.student.module.base_model.forward

    def counting(*args: object, **kwargs: object) -> object:
        ids = kwargs["input_ids"]
        assert isinstance(ids, torch.Tensor)
        read.append(ids.numel())
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.student.module.base_model, "forward", counting)
    engine.response_logprobs([LONG] * 4, [(1, 2), (2, 3), (3, 4), (1, 2)])
    assert read == [len(LONG) + 3]  # and the first token of three distinct responses


def test_bfloat16_stays_near_and_progress_ends_at_one(make: Make) -> None:
    engine, exact = make("model.dtype=bfloat16"), make()
    seen: list[float] = []
    prompts, responses = zip(*PAIRS, strict=True)
    scores = engine.response_logprobs(prompts, responses, seen.append)
    for (prompt, response), score in zip(PAIRS, scores, strict=True):
        assert (torch.tensor(score) - plain(exact, prompt, response)).abs().max() < 0.2
    assert seen[-1] == 1.0


def test_agrees_with_what_the_sampler_recorded(make: Make) -> None:
    engine = make()
    prompts = [SHORT, LONG]
    groups = engine.generate(Request(prompts, 3, Sampling(9), "seed"))
    flat = [(prompt, rollout) for prompt, group in zip(prompts, groups, strict=True) for rollout in group]
    scores = engine.response_logprobs([p for p, _ in flat], [r.response_ids for _, r in flat])
    for (_, rollout), score in zip(flat, scores, strict=True):
        assert score == pytest.approx(rollout.logprobs, abs=1e-4)


def test_more_tokens_than_positions_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match="5002 tokens, the model 4096 positions"):
        make().response_logprobs([(1,) * 5000], [(1, 2)])
