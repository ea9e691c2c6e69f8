"""How often a model answers correctly after the teacher prompt of each condition.

    python bench/answer_recovery.py ROLLOUTS.jsonl [MODEL]

This explains a teacher's signal but does not measure it: a model can copy an answer without judging an attempt.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mopd_nemo.analysis.teacher_signal.conditions import LABELS, condition_contexts
from mopd_nemo.config.load import load_config
from mopd_nemo.engines.base import Sampling
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.run.rollouts import read_groups, to_rollout_group
from mopd_nemo.types import Outcome
from mopd_nemo.verifiers.pool import PendingVerdicts, VerifierPool

PROBLEMS, BLOCK, SAMPLES = 128, 16, 8


def main(rollouts: Path, model: str) -> None:
    config = load_config("configs/quickstart.yaml", [f"model.path={model}", "teacher.kind=live"])
    engine = LocalEngine(config)
    groups = [to_rollout_group(group, engine.chat, rollouts) for group in read_groups(rollouts)[:PROBLEMS]]
    prompts: dict[str, list[tuple[int, tuple[int, ...]]]] = {name: [] for name in LABELS}
    for start in range(0, len(groups), BLOCK):
        block = groups[start : start + BLOCK]
        for name, members in condition_contexts(block, engine.chat, config.peers, f"0/{start}").items():
            for g, items in enumerate(members, start):
                if items[-1].complete and items[-1].context.prompt_ids is not None:
                    prompts[name].append((g, items[-1].context.prompt_ids))
    sampling = Sampling(config.rollout.max_response_tokens)
    pool = VerifierPool(config.verifier, {group.problem.task for group in groups})
    for name, chosen in prompts.items():
        samples = engine.generate([prompt for _, prompt in chosen], SAMPLES, sampling, "recovery")
        found = PendingVerdicts(pool, None).collect([groups[g].problem for g, _ in chosen], samples)
        outcomes = [verdict.outcome for verdicts in found for verdict in verdicts]
        print(f"{LABELS[name]:32} {outcomes.count(Outcome.CORRECT) / max(len(outcomes), 1):6.1%} of {len(outcomes)}")
    pool.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "embedded:arithmetic")
