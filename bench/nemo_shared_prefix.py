"""N responses scored after one shared teacher prompt: as whole rows, and with the prompt read once.

The `GPTModel` of NeMo-RL's real Megatron worker (the embedded Qwen3) on one CPU thread; the prompt's keys and values
come from Megatron's static inference context. Both sides compute the logits of the response rows alone. Prints the
largest difference of log-probabilities, the same with the wrong prompt as a control, and the ratio of times. In the
environment of `make test-nemo`, with its NEMO_RL_SOURCE:

    python bench/nemo_shared_prefix.py [N PROMPT RESPONSE]
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from mopd_nemo.engines.nemo.workers.rows import ResponseHead, padded_rows
from tests.integration.nemo.ranks import nemo_config, run_ranks, start

REPEATS = 5


def main() -> None:
    run_ranks(compare, 1, *map(int, sys.argv[1:4] or (7, 512, 64)))


def compare(count: int, prompt: int, response: int) -> None:
    model = start(nemo_config(), trains=False).model.eval()
    draw = torch.Generator().manual_seed(0)
    prompt_ids, other_ids = (torch.randint(3, 428, (1, prompt), generator=draw) for _ in range(2))
    response_ids = torch.randint(3, 428, (count, response), generator=draw)
    sides = {"whole rows": whole_rows, "shared": shared}
    found = {name: side(model, prompt_ids, response_ids) for name, side in sides.items()}  # and warm up
    wrong = shared(model, other_ids, response_ids)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(REPEATS):
        for name, side in sides.items():
            started = time.perf_counter()
            side(model, prompt_ids, response_ids)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{count} responses of {response} tokens after {prompt}; median of {REPEATS}")
    print(f"largest difference {(found['shared'] - found['whole rows']).abs().max():.1e}, ", end="")
    print(f"with the wrong prompt {(wrong - found['whole rows']).abs().max():.1e}")
    print(f"tokens through the layers {count * (prompt + response) / (prompt + count * response):.2f} x fewer")
    whole, once = medians.values()
    print(f"time {whole:.3f} s / {once:.3f} s = {whole / once:.2f}", flush=True)


@torch.no_grad()
def whole_rows(model: Any, prompt_ids: Tensor, response_ids: Tensor) -> Tensor:
    """Log-probabilities after each response token, [N, R, V]."""
    count, size = response_ids.shape
    prompt = prompt_ids.shape[1]
    length = prompt + size
    ids = torch.cat([prompt_ids.expand(count, -1), response_ids], dim=1)
    with ResponseHead(model.output_layer) as head:
        head.rows = padded_rows([prompt + 1] * count, [length + 1] * count)
        logits = model(ids, torch.arange(length).expand(count, -1), causal(length, length))
    return logits.view(count, size, -1).log_softmax(-1)


@torch.no_grad()
def shared(model: Any, prompt_ids: Tensor, response_ids: Tensor) -> Tensor:
    """The same with one pass over the prompt, whose keys and values are then given to every response."""
    from megatron.core.inference.contexts import StaticInferenceContext

    count, size = response_ids.shape
    prompt = prompt_ids.shape[1]
    context = StaticInferenceContext(count, prompt + size)
    inference = {"inference_context": context, "runtime_gather_output": True}
    model(prompt_ids, torch.arange(prompt)[None], causal(prompt, prompt), **inference)
    for keys, values in context.key_value_memory_dict.values():
        keys[:prompt, 1:], values[:prompt, 1:] = keys[:prompt, :1], values[:prompt, :1]
    context.sequence_len_offset = prompt
    context.materialize_only_last_token_logits = False
    positions = torch.arange(prompt, prompt + size).expand(count, -1)
    return model(response_ids, positions, causal(size, prompt + size), **inference).log_softmax(-1)


def causal(queries: int, keys: int) -> Tensor:
    """[1, 1, Q, K], True where the last Q of K positions must not attend."""
    return (torch.arange(keys) > torch.arange(keys - queries, keys)[:, None])[None, None]


if __name__ == "__main__":
    main()
