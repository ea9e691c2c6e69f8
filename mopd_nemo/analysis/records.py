"""What a run has recorded, read for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from mopd_nemo.config import Config, UserError
from mopd_nemo.config.load import flatten
from mopd_nemo.data.load import recorded_fingerprints
from mopd_nemo.evaluation import bootstrap_interval
from mopd_nemo.files import DamagedError
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.guard import best_evaluation
from mopd_nemo.run.rollouts import read_groups, solved_fraction

NOT_COMPARED = ("name", "run_dir")
"""Settings that say nothing about what a run does."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Change:
    """Of the share of right samples between two evaluations, problem by problem, with its 95 % interval."""

    mean: float
    low: float
    high: float
    num_problems: int


@dataclass(frozen=True, slots=True)
class Records:
    """Rows of a run's files, oldest first; empty where a file is missing."""

    run: RunDirectory
    config: Config
    metrics: Rows
    evals: Rows
    launches: Rows
    """Processes that trained here; none are known of runs before 0.3."""
    _solved: dict[int, dict[str, float] | None] = field(default_factory=dict)

    @classmethod
    def read(cls, run: RunDirectory) -> Records:
        """The records of a run, which may still be going on.

        Raises:
            DamagedError: a file is not what the run wrote.
        """
        metrics, evals, launches = (run.rows(f) for f in (run.metrics_file, run.eval_file, run.launches_file))
        return cls(run, run.read_config(), metrics, evals, launches)

    @property
    def step(self) -> int:
        """The last recorded one."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def complete(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.config.train.num_steps

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The evaluation with the highest mean accuracy; of equal ones the first."""
        return best_evaluation(self.evals)

    def early(self, name: str) -> float | None:
        """Mean of a metric over the first quarter of the steps."""
        return mean(self.metrics[: _quarter(self.metrics)], name)

    def late(self, name: str) -> float | None:
        """Mean of a metric over the last quarter of the steps."""
        return mean(self.metrics[-_quarter(self.metrics) :], name)

    def num_problems(self) -> dict[str, int]:
        """By split, the problems that the run used, where it has recorded them."""
        file = self.run.problems_file
        try:
            return {split: len(problems) for split, problems in recorded_fingerprints(file).items()}
        except (OSError, ValueError):  # of an older version, or damaged: a report has more to say
            return {}

    def change(self, before: int, after: int) -> Change | None:
        """Between the evaluations of two steps. None: samples are lacking or damaged, or share no problem."""
        old, new = self._solved_at(before), self._solved_at(after)
        common = [problem for problem in new or () if problem in (old or {})]
        if old is None or new is None or not common:
            return None
        changes = [new[problem] - old[problem] for problem in common]
        return Change(fmean(changes), *bootstrap_interval(changes), len(common))

    def _solved_at(self, step: int) -> dict[str, float] | None:
        if step not in self._solved:
            try:
                groups = read_groups(self.run.rollouts_file(step, "eval"))
            except (FileNotFoundError, DamagedError, UserError):
                self._solved[step] = None
            else:
                self._solved[step] = {group.problem_id: solved_fraction(group.rows) for group in groups}
        return self._solved[step]


def mean(rows: Rows, name: str) -> float | None:
    """Of a metric over the rows that have it; None: no row does."""
    values = [row[name] for row in rows if name in row]
    return fmean(values) if values else None


def shared_settings(configs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Settings that are equal in all runs and not the defaults: key and value.

    Args:
        configs: of each run, values by dotted key.
    """
    usual = flatten(Config())
    return [
        [key, str(value)]
        for key, value in configs[0].items()
        if key not in NOT_COMPARED and value != usual.get(key) and all(other.get(key) == value for other in configs)
    ]


def _quarter(rows: Rows) -> int:
    return max(len(rows) // 4, 1)
