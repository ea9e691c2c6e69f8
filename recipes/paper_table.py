"""A table of the paper, from submission to the comparison: `recipes/table-N.sh DIR` calls this.

    recipes/table-3.sh DIR --dry-run    print what would be submitted
    recipes/table-3.sh DIR              submit every run of table 3 that DIR does not hold yet
    recipes/table-3.sh DIR              (again, later) compare the runs, and print the paper's numbers beside ours
    recipes/table-3.sh DIR --compare    compare the runs that exist already

A run is `DIR/CONFIG/seed=SEED`, so tables share their runs when they share DIR. The runs and the paper's numbers are in
configs/paper/values.yaml. Run it with the Python in which `mopd` is installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "paper"
WARM_UP_STEPS = 5
"""Left out of timings, as in the paper's appendix E."""
PHASES = {"generate": ("generate",), "reward": ("reward",), "update": ("score", "update"), "step": ("step",)}
"""The paper's phases in ours: its update reads the teacher, too."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of a table on one task."""

    row: str
    task: str
    config: str
    """Name of a file in configs/paper."""
    paper: dict[str, float | None]
    """Metric to the paper's number; None where its text has none."""
    name: str
    """Of the run's directory."""
    step: int | None = None
    """The evaluation that counts; None: the last one."""
    problems: str = ""
    """How the ids of the problems begin that count."""
    evaluate: tuple[str, ...] = ()
    """Overrides of an evaluation that takes the place of training."""

    @classmethod
    def read(cls, row: dict[str, Any]) -> Cell:
        """A cell of values.yaml."""
        row = dict(row)
        config = row.pop("run")
        return cls(config=config, name=row.pop("name", config), evaluate=tuple(row.pop("evaluate", ())), **row)

    def directory(self, runs: Path, seed: int) -> Path:
        """Where the run is."""
        return runs / self.name / f"seed={seed}"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the paper."""

    number: str
    title: str
    cells: list[Cell]
    seeds: tuple[int, ...]
    analysis: str | None = None
    """`teacher-signal` or `diversity`, where the numbers are an analysis of rollouts."""
    model: str | None = None
    """What scores, in a teacher-signal analysis."""

    @classmethod
    def read(cls, number: str) -> Table:
        """A table of values.yaml."""
        row = yaml.safe_load((CONFIGS / "values.yaml").read_text())["tables"][number]
        cells = [Cell.read(cell) for cell in row["cells"]]
        return cls(number, row["title"], cells, tuple(row.get("seeds", (0,))), row.get("analysis"), row.get("model"))

    def submissions(self, runs: Path, seeds: Iterable[int]) -> dict[Path, list[str]]:
        """Run directories, each with the arguments of `mopd` that submit its run."""
        return {
            cell.directory(runs, seed): [
                *("submit", "--config", str(CONFIGS / f"{cell.config}.yaml")),
                *("--output", str(cell.directory(runs, seed))),
                *(("--task", "eval") if cell.evaluate else ()),
                *(f"seed={seed}", *cell.evaluate),
            ]
            for cell in self.cells
            for seed in seeds
        }


def main() -> int:
    """Submit the missing runs, or compare."""
    parser = argparse.ArgumentParser(description="Submit the runs of a table of the paper, or compare them.")
    parser.add_argument("table", help="Number of the table.")
    parser.add_argument("runs", type=Path, help="Directory of the runs, on storage that all nodes mount.")
    parser.add_argument("--dry-run", action="store_true", help="Print the jobs that are missing; submit nothing.")
    parser.add_argument("--compare", action="store_true", help="Compare the runs that are there; submit nothing.")
    parser.add_argument("--seeds", help="Instead of the table's, for example 0,1,2.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Settings of every run.")
    options = parser.parse_intermixed_args()
    table, runs = Table.read(options.table), options.runs.absolute()
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else table.seeds
    print(f"Table {table.number}: {table.title}")
    submissions = table.submissions(runs, seeds)
    missing = {path: arguments for path, arguments in submissions.items() if not (path / "job" / "job.sbatch").exists()}
    if options.dry_run:
        return max((mopd(*arguments, *options.overrides, "--dry-run") for arguments in missing.values()), default=0)
    if missing and not options.compare:
        return submit(missing, options.overrides)
    if table.analysis:
        ours = analyze(table, runs, seeds[0])
    else:
        compare(table, runs, seeds)
        ours = [
            {name: results(cell, runs, seeds, name) for metric in cell.paper for name in _both(metric)}
            for cell in table.cells
        ]
    print(beside(table, ours))
    return 0


def submit(submissions: dict[Path, list[str]], overrides: Sequence[str]) -> int:
    """Submit every run, also after one that is refused. The exit code is 1 if one was."""
    refused = []
    for path, arguments in submissions.items():
        print(f"\n{path}", flush=True)
        if mopd(*arguments, *overrides) != 0:
            refused.append(path)
    print(f"\n{len(submissions) - len(refused)} of {len(submissions)} runs submitted.", end=" ")
    print("The same command submits the others." if refused else "The same command compares them when they have run.")
    return int(bool(refused))


def compare(table: Table, runs: Path, seeds: Sequence[int]) -> None:
    """`mopd compare` of the runs of each task."""
    tasks: dict[str, dict[Path, None]] = {}
    for cell in table.cells:
        held = {
            cell.directory(runs, seed): None
            for seed in seeds
            if (cell.directory(runs, seed) / "metrics.jsonl").exists()
        }
        tasks.setdefault("mathematics" if cell.problems else cell.task, {}).update(held)
    for task, directories in tasks.items():
        if directories:
            output = runs / f"table-{table.number}" / task.replace(" ", "-")
            print(f"\n{task}")
            mopd("compare", *map(str, directories), "--output", str(output))


def analyze(table: Table, runs: Path, seed: int) -> list[dict[str, list[float]]]:
    """Run the analysis of the table; per cell, our value of each metric."""
    output = runs / f"table-{table.number}"
    if table.analysis == "teacher-signal":
        first = table.cells[0]
        config = str(CONFIGS / f"{first.config}.yaml")
        rollouts = str(rollouts_file(first.directory(runs, seed), first.step))
        code = mopd(
            *("analyze", "teacher-signal", "--rollouts", rollouts, "--model", str(table.model)),
            *("--config", config, "--output", str(output), "engine=local"),
        )
        found = {} if code else json.loads((output / "teacher_signal.json").read_text())["own_prompts"]
        rows = [found.get(cell.task, {}) for cell in table.cells]
    else:
        files = [f"{cell.row}={rollouts_file(cell.directory(runs, seed), cell.step)}" for cell in table.cells]
        code = mopd("analyze", "diversity", *files, "--output", str(output))
        found = {} if code else json.loads((output / "diversity.json").read_text())["readings"]["all"]["methods"]
        rows = [found.get(cell.row, {}) for cell in table.cells]
    return [
        {metric: [row[metric]["mean"]] if metric in row else [] for metric in cell.paper}
        for cell, row in zip(table.cells, rows, strict=True)
    ]


def results(cell: Cell, runs: Path, seeds: Iterable[int], metric: str) -> list[float]:
    """Our values of a cell, one for each seed that has a result: percent, or seconds for a phase."""
    values = [result(cell, cell.directory(runs, seed), metric) for seed in seeds]
    return [value for value in values if value is not None]


def result(cell: Cell, run: Path, metric: str) -> float | None:
    """Our value of one run. None: it has no result yet."""
    if metric in PHASES:
        rows = read_rows(run / "metrics.jsonl")[WARM_UP_STEPS:]
        return fmean(sum(row[f"seconds/{name}"] for name in PHASES[metric]) for row in rows) if rows else None
    if cell.evaluate:
        file = run / "eval.json"
        return _percent(json.loads(file.read_text()), metric) if file.exists() else None
    evaluations = [row for row in read_rows(run / "eval.jsonl") if cell.step in (None, row["step"])]
    if not evaluations:
        return None
    if not cell.problems:
        return _percent(evaluations[-1], metric)
    return 100 * on_some_problems(rollouts_file(run, evaluations[-1]["step"]), cell.problems, metric)


def _both(metric: str) -> tuple[str, ...]:
    """An accuracy's names: ours, and that of what the paper's code counts."""
    return (metric, f"paper/{metric}") if metric.startswith(("mean@", "pass@")) else (metric,)


def _percent(evaluation: dict[str, Any], metric: str) -> float | None:
    """None: `paper/...` of a run without `eval.paper_metrics`."""
    return 100 * evaluation[metric] if metric in evaluation else None


def on_some_problems(rollouts: Path, beginning: str, metric: str) -> float:
    """mean@n, or pass@n of all n samples, over the problems whose ids begin so; `paper/...` as the paper counts.

    Raises:
        ValueError: there is no such problem.
    """
    from mopd_nemo.evaluation import best_with_replacement

    solved: dict[str, list[bool]] = {}
    for row in read_rows(rollouts):
        if row["problem"].startswith(beginning):
            solved.setdefault(row["problem"], []).append(row["outcome"] == "correct")
    if not solved:
        raise ValueError(f"{rollouts}: no problem's id begins with {beginning!r}; see docs/reproduction.md, Data")
    if metric.startswith("paper/pass@"):
        return fmean(best_with_replacement(outcomes, len(outcomes)) for outcomes in solved.values())
    over = any if metric.startswith("pass@") else fmean
    return fmean(over(outcomes) for outcomes in solved.values())


def beside(table: Table, ours: Sequence[dict[str, list[float]]]) -> str:
    """The table with the paper's numbers and ours, as Markdown.

    Accuracies have two columns of ours: strict and unbiased, and counted as the paper's code counts (`paper/...`).
    """
    twice = any(f"paper/{metric}" in values for values in ours for metric in ("mean@8", "pass@8"))
    columns = [
        "row",
        "task",
        "metric",
        "paper",
        *(("ours, counted so", "ours, strict") if twice else ("ours",)),
        "seeds",
    ]
    lines = ["", f"| {' | '.join(columns)} |", f"|---|---|---|{'---:|' * (len(columns) - 3)}"]
    digits = 2 if table.analysis is None else 4
    for cell, values in zip(table.cells, ours, strict=True):
        for metric, number in cell.paper.items():
            said = "–" if number is None else f"{number:.{digits}f}"
            names = (f"paper/{metric}", metric) if twice else (metric,)
            mine = " | ".join(_over_seeds(values[name], digits) for name in names)
            lines.append(f"| {cell.row} | {cell.task} | {metric} | {said} | {mine} | {len(values[metric])} |")
    return "\n".join(lines)


def _over_seeds(values: Sequence[float], digits: int) -> str:
    if not values:
        return "not there yet"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def rollouts_file(run: Path, step: int | None) -> Path:
    """The samples of an evaluation."""
    return run / "rollouts" / f"eval_{step or 0:06d}.jsonl"


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file. Empty: there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def mopd(*arguments: str) -> int:
    """Run the command in the checkout, where the data paths of the configs start. Returns its exit code."""
    return subprocess.run([sys.executable, "-m", "mopd_nemo", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
