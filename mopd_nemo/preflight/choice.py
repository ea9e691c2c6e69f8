"""`peers.choose: measured`: a run measures which peers to show, before its first step and every so many after it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from mopd_nemo.config import Config, PeersConfig
from mopd_nemo.engines.base import Engine, Progress, seed_of
from mopd_nemo.preflight.contexts import PLAIN, check_group_size, name_of, parse_contexts, peers_of
from mopd_nemo.preflight.figures import figures
from mopd_nemo.preflight.measure import Plan, Survey, measure, sample_groups
from mopd_nemo.preflight.rule import Recommendation, recommend
from mopd_nemo.types import Problem
from mopd_nemo.verifiers.pool import VerifierPool

GROUPS_PER_PROBLEM = 6
"""Groups to look through at most, for each problem wanted; `mopd preflight` has the same default."""


def check_choice(config: Config) -> None:
    """Refuse a choice among contexts that do not exist, or that no group of the run can have.

    Raises:
        UserError: names the context.
    """
    if config.peers.choose == "fixed":
        return
    names = parse_contexts(",".join(config.peers.choose_from))
    check_group_size(names, config.rollout.num_rollouts_per_prompt, "peers.choose_from")


def due(config: Config, step: int) -> bool:
    """Whether a choice comes before the step after this one."""
    every = config.peers.choose_every
    if config.peers.choose == "fixed" or step >= config.train.num_steps:
        return False
    return step == 0 or (every > 0 and step % every == 0)


def choose(
    step: int,
    problems: list[Problem],
    engine: Engine,
    verifiers: VerifierPool,
    config: Config,
    on_progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Measure the contexts with the student's present weights, on rollouts that it samples for that.

    Every draw is a function of the config's seed and the step, so a run that was killed here measures the same again.

    Returns:
        the row of `choices.jsonl`: `step`, `context` (of the config, where there are too few problems to tell),
        `clear`, `sentences`, `cautions`, `metrics`, `figures`, `seconds`.
    """
    began = time.perf_counter()
    peers, size = config.peers, config.rollout.num_prompts_per_step
    name = f"choice/{config.seed}/{step}"
    plan = Plan(
        contexts=parse_contexts(",".join(peers.choose_from)),
        problems=peers.choose_problems,
        max_groups=min(GROUPS_PER_PROBLEM * peers.choose_problems, len(problems) // size * size),
        samples=config.rollout.num_rollouts_per_prompt,
        seed=name,
        order=seed_of(name),
        score=False,
    )
    found = Survey(plan, engine.chat, config)
    for _ in sample_groups(problems, engine, verifiers, config, plan, found):
        on_progress(0.5 * max(len(found.groups) / plan.max_groups, len(found.cases) / plan.problems))
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    total = len(found.cases) * len(plan.measured)
    for row in measure(found.cases, engine, verifiers, config, plan):
        rows[row["problem"], row["context"]] = row
        on_progress(0.5 + 0.5 * len(rows) / total)
    result = figures(found, rows, config, plan) | {"configured": None}  # the choice stands in its place
    recommendation = recommend(result)
    return {
        "step": step,
        "context": recommendation.context or name_of(peers),
        "clear": recommendation.clear,
        "sentences": list(recommendation.sentences),
        "cautions": list(recommendation.cautions),
        "metrics": _metrics(result, recommendation),
        "figures": result,
        "seconds": time.perf_counter() - began,
    }


def chosen_peers(row: Mapping[str, Any], peers: PeersConfig) -> PeersConfig:
    """The settings that a row of `choices.jsonl` stands for."""
    return peers_of(row["context"], peers)


def _metrics(result: Mapping[str, Any], recommendation: Recommendation) -> dict[str, float]:
    """`choice/CONTEXT/gain` with its interval, and what goes with it."""
    metrics = {"choice/problems": float(result["num_problems"]), "choice/clear": float(recommendation.clear)}
    for name, cells in result["contexts"].items():
        if cells["right"]["mean"] is None:
            continue
        metrics[f"choice/{name}/right"] = cells["right"]["mean"]
        if name != PLAIN and cells["gap"]["mean"] is not None:
            metrics |= {
                f"choice/{name}/gain": cells["gap"]["mean"],
                f"choice/{name}/gain/low": cells["gap"]["low"],
                f"choice/{name}/gain/high": cells["gap"]["high"],
                f"choice/{name}/chosen": float(name == recommendation.context),
            }
    return metrics
