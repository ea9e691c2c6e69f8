"""Sampling with vLLM, for both engines: one request gives several responses, so a prompt is read once.

NeMo-RL's own `generate` gives one response a row, at a temperature that is fixed for the run; training and evaluation
differ in both. So `sample_on_worker` runs inside NeMo-RL's workers, by Ray's `__ray_call__`. This module imports
nothing that NeMo-RL's environments lack.
"""

from __future__ import annotations

from typing import Any

from mopd_nemo.engines.base import seed_of

Sample = tuple[list[int], list[float], bool]
"""Token ids, their log-probabilities as sampled, and whether the model ended the response itself."""


def sample(
    llm: Any,
    prompts: list[tuple[int, list[int]]],
    num_samples: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    stop_ids: list[int],
    seed: str | None,
) -> list[list[Sample]]:
    """`num_samples` responses for each prompt.

    Args:
        llm: a `vllm.LLM`.
        prompts: (number in the whole batch, token ids). The number is part of the seed, so that a prompt's responses do
            not depend on the worker that draws them.
        seed: None uses the engine's own generator for all rows. vLLM launches a kernel for each row with a seed.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    requests = [TokensPrompt(prompt_token_ids=ids) for _, ids in prompts]
    sampling = [
        SamplingParams(
            n=num_samples,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            logprobs=0,
            stop_token_ids=stop_ids,
            seed=None if seed is None else seed_of(f"{seed}/{number}"),
            detokenize=False,
        )
        for number, _ in prompts
    ]
    outputs = llm.generate(requests, sampling, use_tqdm=False)
    return [[_sample(choice) for choice in sorted(output.outputs, key=lambda c: c.index)] for output in outputs]


def sample_on_worker(worker: Any, *arguments: Any, **settings: Any) -> list[list[Sample]]:
    """`sample` with the `llm` of a worker."""
    return sample(worker.llm, *arguments, **settings)


def _sample(choice: Any) -> Sample:
    ids = list(choice.token_ids)
    logprobs = [position[token].logprob for position, token in zip(choice.logprobs, ids, strict=True)]
    return ids, logprobs, choice.finish_reason == "stop"
