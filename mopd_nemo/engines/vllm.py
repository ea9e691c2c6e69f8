"""Sampling with vLLM, for both engines. Rollouts leave it one by one, so that verifiers need not wait for the longest.

NeMo-RL's own `generate` gives one response a row, all at the end, at a temperature that is fixed for the run; training
and evaluation differ in that. So `sample_on_worker` runs inside NeMo-RL's workers, by Ray's `__ray_call__`. This module
imports nothing that NeMo-RL's environments lack.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from mopd_nemo.engines.base import seed_of

Sample = tuple[list[int], list[float], bool]
"""Token ids, their log-probabilities as sampled, and whether the model ended the response itself."""

Numbered = tuple[int, int, Sample]
"""Number of the prompt, number of the response, the response."""


def sample(
    llm: Any,
    prompts: list[tuple[int, list[int]]],
    num_samples: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    stop_ids: list[int],
    seed: str | None,
    on_samples: Callable[[list[Numbered]], None],
) -> None:
    """Draw `num_samples` responses for each prompt.

    Args:
        llm: a `vllm.LLM`.
        prompts: (number in the whole batch, token ids). The number is part of the seed, so that a prompt's responses do
            not depend on the worker that draws them.
        seed: None uses the engine's own generator for all rows. vLLM launches a kernel for each row with a seed.
        on_samples: is given responses as soon as they are finished, each once.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    waiting: dict[str, tuple[int, int]] = {}
    try:
        for (number, ids), index in product(prompts, range(num_samples)):
            # One request for n responses would answer when all are finished. vLLM makes n of it, with seeds in a row.
            sampling = SamplingParams(
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                logprobs=0,
                stop_token_ids=stop_ids,
                seed=None if seed is None else seed_of(f"{seed}/{number}") + index,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            waiting[f"{number}/{index}"] = number, index
            engine.add_request(f"{number}/{index}", TokensPrompt(prompt_token_ids=ids), sampling)
        while waiting:
            outputs = [output for output in engine.step() if output.finished]
            if outputs:
                on_samples([(*waiting.pop(output.request_id), _sample(output.outputs[0])) for output in outputs])
    finally:
        if waiting:  # somebody has given up
            engine.abort_request(list(waiting))


def sample_on_worker(worker: Any, reports: Any, **settings: Any) -> None:
    """`sample` with the `llm` of a worker.

    Args:
        reports: a Ray queue for the responses.
    """
    sample(worker.llm, on_samples=reports.put_nowait_batch, **settings)


def _sample(choice: Any) -> Sample:
    ids = list(choice.token_ids)
    logprobs = [position[token].logprob for position, token in zip(choice.logprobs, ids, strict=True)]
    return ids, logprobs, choice.finish_reason == "stop"
