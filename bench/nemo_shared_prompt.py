"""Responses scored with their common prompt read once, and row by row, by NeMo-RL's real Megatron worker.

The embedded Qwen3 in float32 on one CPU thread; both sides pack their rows and compute the logits of response rows
alone. Prints for each size the positions that go through the layers, the time, the largest difference of
log-probabilities, and as a control the same with another prompt. In the environment of `make test-nemo`, with its
NEMO_RL_SOURCE:

    python bench/nemo_shared_prompt.py [GROUPS RESPONSES PROMPT RESPONSE]
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from mopd_nemo.engines.nemo.batches import score_batch
from tests.integration.nemo.ranks import cut, dealt, nemo_config, run_ranks, start

SIZES = ((1, 7, 512, 64), (1, 7, 1024, 512), (4, 4, 512, 128), (8, 1, 512, 64))
"""Groups, responses of each, tokens of a prompt and of a response."""
REPEATS = 5
TOKENS = 16384
"""Of a packed row, at most."""


def main() -> None:
    sizes = [tuple(map(int, sys.argv[1:5]))] if len(sys.argv) > 1 else SIZES
    (found,) = run_ranks(compare, 1, sizes)
    print("| groups × responses × tokens after prompt | positions | time, s | | largest difference | another prompt |")
    print("|---|---|---|---|---|---|")
    for (groups, count, prompt, response), one in zip(sizes, found, strict=True):
        positions, seconds = one["positions"], one["seconds"]
        print(
            f"| {groups} × {count} × {response} after {prompt} | {positions[0]:,} → {positions[1]:,} "
            f"({positions[0] / positions[1]:.1f} ×) | {seconds[0]:.2f} → {seconds[1]:.2f} "
            f"| {seconds[0] / seconds[1]:.1f} × | {one['difference']:.1e} | {one['control']:.1f} |"
        )


def compare(sizes: list[tuple[int, int, int, int]]) -> list[dict[str, Any]]:
    worker = start(nemo_config(train={"tokens_per_micro_batch": TOKENS}, nemo=cut(1, packed=True)), trains=False)
    worker.prepare_for_lp_inference()
    return [compared(worker, *size) for size in sizes]


def compared(worker: Any, groups: int, count: int, prompt: int, response: int) -> dict[str, Any]:
    from mopd_nemo.engines.nemo.workers import megatron

    draw = torch.Generator().manual_seed(0)
    prompts, others = (torch.randint(3, 428, (groups, prompt), generator=draw).tolist() for _ in range(2))
    responses = torch.randint(3, 428, (groups * count, response), generator=draw).tolist()
    alone = mock.patch.object(megatron, "row_by_row", lambda _: "to compare")
    with alone:
        expected, before = score(worker, prompts, responses)  # and warm up
    found, after = score(worker, prompts, responses)
    wrong, _ = score(worker, others, responses)
    seconds: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        with alone:
            seconds[0].append(timed(worker, prompts, responses))
        seconds[1].append(timed(worker, prompts, responses))
    return {
        "positions": (before, after),
        "seconds": [statistics.median(times) for times in seconds],
        "difference": float((found - expected).abs().max()),
        "control": float((wrong - expected).abs().max()),
    }


def timed(worker: Any, prompts: list[list[int]], responses: list[list[int]]) -> float:
    started = time.perf_counter()
    score(worker, prompts, responses)
    return time.perf_counter() - started


def score(worker: Any, prompts: list[list[int]], responses: list[list[int]]) -> tuple[Tensor, int]:
    """Log-probabilities of the response tokens, and the positions that were computed."""
    count = len(responses) // len(prompts)
    pairs = [(prompts[n // count], response) for n, response in enumerate(responses)]
    sampled = [torch.tensor(response)[:, None] for response in responses]
    data, order = dealt(worker, score_batch(pairs, sampled, pad_id=0, length_multiple=1), TOKENS)
    scores = worker.score_responses(data=data, k=1, vocab_size=428, self_teacher=False, dtype="float32")
    by_row = torch.from_numpy(scores["logprobs"]).view(len(responses), -1)
    return by_row[torch.tensor(order).argsort()], int(scores["counts"][0])


if __name__ == "__main__":
    main()
