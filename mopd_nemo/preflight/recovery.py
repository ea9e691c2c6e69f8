"""What a model writes after each condition of a teacher-signal analysis, on recorded rollouts: answer recovery.

It is not a measure of a teacher's signal: a model can copy an answer without judging an attempt. It explains one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mopd_nemo.analysis.teacher_signal.conditions import CONDITIONS, LABELS, condition_contexts
from mopd_nemo.analysis.teacher_signal.scoring import blocks
from mopd_nemo.chat import Chat
from mopd_nemo.config import Config
from mopd_nemo.preflight.contexts import PLAIN, Case
from mopd_nemo.preflight.figures import cell, difference, share_right
from mopd_nemo.preflight.measure import Plan, Row
from mopd_nemo.run.rollouts import RecordedGroup, to_rollout_group


def recovery_plan(samples: int, config: Config) -> Plan:
    """All conditions, on whatever problems there are."""
    names = tuple(name for name in CONDITIONS if name != PLAIN)
    return Plan(names, problems=0, max_groups=0, samples=samples, seed=f"recovery/{config.seed}", order=0, score=False)


def recovery_cases(groups: Sequence[RecordedGroup], source: Path, chat: Chat, config: Config) -> list[Case]:
    """The problems of which a target has all the peers of every condition, with what is read for the first such target.

    Problems are taken in blocks, as a teacher-signal analysis takes them: one control draws from others of its block.
    """
    cases = []
    for number, block in enumerate(blocks(groups, config.rollout.num_prompts_per_step)):
        rebuilt = [to_rollout_group(group, chat, source) for group in block]
        contexts = condition_contexts(rebuilt, chat, config.peers, f"{config.seed}/{number}")
        for g, group in enumerate(rebuilt):
            own = {name: contexts[name][g] for name in CONDITIONS}
            targets = tuple(
                i
                for i in group.judged
                if all(members[i].complete and members[i].context.prompt_ids for members in own.values())
            )
            if targets:
                cases.append(
                    Case(group, targets, {name: tuple(m[i].context for i in targets) for name, m in own.items()})
                )
    return cases


def recovery_figures(cases: Sequence[Case], rows: Mapping[tuple[str, str], Row], num_groups: int) -> dict[str, Any]:
    """Per condition, the share of right answers and the difference to no peers, with 95 % intervals over problems."""
    problems = [case.group.problem.id for case in cases]
    table = {name: [{"right": share_right(rows[problem, name])} for problem in problems] for name in CONDITIONS}
    return {
        "num_problems": len(problems),
        "num_groups": num_groups,
        "conditions": {
            name: {
                "label": LABELS[name],
                "right": cell([values["right"] for values in table[name]]),
                "gain": difference(table, name, PLAIN),
            }
            for name in CONDITIONS
        },
    }
