"""Score every response in every condition. A few prompts at a time are saved, so that a stop loses little.

manifest.json    inputs and settings of the scores; a rerun with others is refused
scores.jsonl     one row per prompt and condition
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mopd_nemo.analysis.teacher_signal.conditions import CONDITIONS, ConditionContext, condition_contexts
from mopd_nemo.config import Config
from mopd_nemo.engines.base import Engine
from mopd_nemo.run.resumable import RowStore, file_fingerprint, model_fingerprint
from mopd_nemo.run.rollouts import RecordedGroup, to_rollout_group
from mopd_nemo.types import RolloutGroup

PROMPTS_AT_ONCE = 8
"""Prompts whose scores are saved together."""


class ScoreStore(RowStore):
    """Scores on disk by prompt and condition."""

    def __init__(self, directory: Path, manifest: dict[str, Any], restart: bool = False) -> None:
        super().__init__(directory, "scores", ("prompt", "condition"), manifest, restart)


def manifest_of(rollouts: Path, num_prompts: int, config: Config) -> dict[str, Any]:
    """Inputs and settings of the scores: rollouts, weights, and every setting that shapes a teacher prompt.

    The number of prompts is one of them, because it decides which problems share a block.
    """
    return {
        "number of prompts": num_prompts,
        "rollouts": file_fingerprint(rollouts),
        "model": model_fingerprint(config.model.path),
        "model.dtype": config.model.dtype,
        "model.chat_template_kwargs": config.model.chat_template_kwargs,
        "peers": config.peers.model_dump(mode="json"),
        "rollout.num_prompts_per_step": config.rollout.num_prompts_per_step,
        "seed": config.seed,
        "conditions": list(CONDITIONS),
    }


def score_rollouts(
    groups: Sequence[RecordedGroup],
    source: Path,
    engine: Engine,
    config: Config,
    store: ScoreStore,
    on_progress: Callable[[float], None] = lambda _: None,
) -> None:
    """Score all responses that the store lacks.

    Problems are taken in blocks of about `rollout.num_prompts_per_step`, as in training: the `unrelated_prompt` control
    draws from the other problems of its block.
    """
    done = 0
    for number, block in enumerate(blocks(groups, config.rollout.num_prompts_per_step)):
        if not all((group.key, name) in store for group in block for name in CONDITIONS):
            rebuilt = [to_rollout_group(group, engine.chat, source) for group in block]
            contexts = condition_contexts(rebuilt, engine.chat, config.peers, f"{config.seed}/{number}")
            for start in range(0, len(block), PROMPTS_AT_ONCE):
                part = range(start, min(start + PROMPTS_AT_ONCE, len(block)))
                _score_part(part, block, rebuilt, contexts, engine, store)
                on_progress((done + part.stop) / len(groups))
        done += len(block)
        on_progress(done / len(groups))


def _score_part(
    part: range,
    block: Sequence[RecordedGroup],
    groups: Sequence[RolloutGroup],
    contexts: dict[str, list[list[ConditionContext]]],
    engine: Engine,
    store: ScoreStore,
) -> None:
    """Score some prompts of a block. The engine computes equal teacher prompts once."""
    todo = [(g, name) for g in part for name in CONDITIONS if (block[g].key, name) not in store]
    prompts = {
        (g, name, i): item.context.prompt_ids
        for g, name in todo
        for i, item in enumerate(contexts[name][g])
        if item.context.prompt_ids is not None
    }
    responses = [groups[g].rollouts[i].response_ids for g, _, i in prompts]
    logprobs = engine.response_logprobs(list(prompts.values()), responses)
    means = {key: fmean(tokens) for key, tokens in zip(prompts, logprobs, strict=True)}
    for g, name in todo:
        members = contexts[name][g]
        scores = [means.get((g, name, i)) for i in range(len(members))]
        store.add(
            {
                "prompt": block[g].key,
                "condition": name,
                "scores": [score if score is None or math.isfinite(score) else None for score in scores],
                "not_finite": sum(score is not None and not math.isfinite(score) for score in scores),
                "complete": [item.complete for item in members],
                "context_tokens": [len(item.context.prompt_ids or ()) for item in members],
                "cut": [item.context.num_truncated > 0 for item in members],
            }
        )


def blocks(groups: Sequence[RecordedGroup], size: int) -> Iterator[Sequence[RecordedGroup]]:
    """Blocks of about `size`, whose lengths differ by at most one."""
    count = max(round(len(groups) / size), 1)
    for number in range(count):
        yield groups[number * len(groups) // count : (number + 1) * len(groups) // count]
