"""Teacher-signal scoring with shared prefixes computed once, compared with every prompt and response on its own.

    python bench/prefix_sharing.py ROLLOUTS.jsonl [MODEL]

Both sides score the same pairs (16 problems, ten conditions) in this process, in turn, three times. The fastest counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch

from mopd_nemo.analysis.teacher_signal.conditions import condition_contexts
from mopd_nemo.config.load import load_config
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.engines.local.model import micro_batches
from mopd_nemo.run.rollouts import read_groups, to_rollout_group

PROBLEMS, REPEATS = 16, 3
Ids = tuple[int, ...]


def main(rollouts: Path, model: str) -> None:
    config = load_config("configs/quickstart.yaml", [f"model.path={model}", "teacher.kind=live"])
    engine = LocalEngine(config)
    groups = [to_rollout_group(group, engine.chat, rollouts) for group in read_groups(rollouts)[:PROBLEMS]]
    contexts = condition_contexts(groups, engine.chat, config.peers, "bench")
    pairs = [
        (item.context.prompt_ids, rollout.response_ids)
        for members in contexts.values()
        for items, group in zip(members, groups, strict=True)
        for item, rollout in zip(items, group.rollouts, strict=True)
        if item.context.prompt_ids is not None
    ]
    prompts, responses = [prompt for prompt, _ in pairs], [response for _, response in pairs]
    print(
        f"{len(pairs)} pairs, {len(set(prompts))} distinct prompts of {fmean(map(len, prompts)):.0f} tokens on average"
    )
    seconds: dict[str, float] = {}
    found: dict[str, list[tuple[float, ...]]] = {}
    sides: dict[str, Callable[[], list[tuple[float, ...]]]] = {
        "plain": lambda: plain(engine, prompts, responses, config.train.tokens_per_micro_batch),
        "shared": lambda: engine.response_logprobs(prompts, responses),
    }
    for _ in range(REPEATS):
        for name, side in sides.items():
            started = time.perf_counter()
            found[name] = side()
            seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - started)
    worst = max(abs(a - b) for x, y in zip(*found.values(), strict=True) for a, b in zip(x, y, strict=True))
    print(
        f"plain {seconds['plain']:.2f} s, shared {seconds['shared']:.2f} s: {seconds['plain'] / seconds['shared']:.1f}×"
    )
    print(f"largest difference of a token's log-probability: {worst:.1e} nats")


@torch.inference_mode()
def plain(engine: LocalEngine, prompts: list[Ids], responses: list[Ids], max_tokens: int) -> list[tuple[float, ...]]:
    """Every pair on its own, in micro-batches of similar length."""
    scores: list[tuple[float, ...]] = [()] * len(prompts)
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    engine.student.reads_trees = False
    for batch in micro_batches(lengths, max_tokens):
        chosen = [responses[i] for i in batch]
        hidden_TH = engine.student.response_hidden_TH([prompts[i] for i in batch], chosen)
        ids_T = torch.tensor([token for response in chosen for token in response])
        logprobs_T = engine.student.head(hidden_TH).float().log_softmax(-1).gather(-1, ids_T.unsqueeze(-1)).squeeze(-1)
        for i, part in zip(batch, logprobs_T.split([len(response) for response in chosen]), strict=True):
            scores[i] = tuple(part.tolist())
    engine.student.reads_trees = True
    return scores


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "embedded:arithmetic")
