"""The recorded training rollouts of a run over its steps, read one file at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.rollouts import num_successes, read_groups


@dataclass
class History:
    """What happened to each training problem."""

    visits: dict[str, list[int]] = field(default_factory=dict)
    """By problem, the recorded steps in which it was sampled."""
    first_solved: dict[str, int] = field(default_factory=dict)
    """By problem, the first step with a success."""
    pattern_rows: list[dict[str, Any]] = field(default_factory=list)
    """Per step, the share of rollouts whose response matches each pattern."""


def read_history(run: RunDirectory, patterns: Mapping[str, str]) -> History:
    """Scan all recorded training steps.

    Args:
        patterns: name -> regular expression, searched in each response (`.` crosses lines).
    """
    history = History()
    compiled = {name: re.compile(pattern, re.DOTALL) for name, pattern in patterns.items()}
    for step, file in run.rollout_files().items():
        groups = read_groups(file)
        for group in groups:
            history.visits.setdefault(group.problem, []).append(step)
            if num_successes(group.rows) > 0:
                history.first_solved.setdefault(group.problem, step)
        responses = [row["response"] for group in groups for row in group.rows]
        shares = {
            name: sum(bool(regex.search(text)) for text in responses) / len(responses)
            for name, regex in compiled.items()
        }
        history.pattern_rows.append({"step": step, **shares})
    return history
