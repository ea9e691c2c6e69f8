"""Keep the small files of finished runs: `python -m recipes.real_model.collect SWEEP_DIR OUTPUT_DIR`.

Of each run its settings, metrics and evaluations as they are, and two summaries of its rollouts, which are too large to
keep: `problems.jsonl` (right samples by evaluation and problem) and `targets.jsonl` (what teachers read, step by step).
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from mopd_nemo.commands.sweep import is_complete
from mopd_nemo.config import Config
from mopd_nemo.files import read_rows
from mopd_nemo.run.directory import RunDirectory
from recipes.real_model.building import building, say

Row = Mapping[str, Any]


def main(
    sweep: Annotated[Path, typer.Argument(help="Directory of `mopd sweep`.")],
    output: Annotated[Path, typer.Argument(help="One directory a run is written into it; those that are there stay.")],
) -> None:
    for path in sorted(file.parent for file in sweep.glob("*/config.yaml")):
        run = RunDirectory(path)
        if not is_complete(run):
            continue
        config = run.read_config()
        kept = output / f"{arm(config)}-seed{config.seed}"
        if not kept.exists():
            keep(run, config, kept)
            say(f"kept {kept.name}")


def arm(config: Config) -> str:
    """The context of a run in the paper's words: 2S+1F."""
    shown = [(config.peers.successes, "S"), (config.peers.failures, "F")]
    return "+".join(f"{count}{letter}" for count, letter in shown if count)


def keep(run: RunDirectory, config: Config, output: Path) -> None:
    """Write a run's small files."""
    with building(output) as new:
        for file in (run.config_file, run.metrics_file, run.eval_file):
            shutil.copyfile(file, new / file.name)
        evaluated = (row for file in sorted(run.rollouts.glob("eval_*.jsonl")) for row in read_rows(file))
        _write(new / "problems.jsonl", by_problem(evaluated))
        trained = (row for file in sorted(run.rollouts.glob("step_*.jsonl")) for row in read_rows(file))
        _write(new / "targets.jsonl", by_step(trained, config))


def by_problem(rows: Iterable[Row]) -> Iterable[Row]:
    """Right and unfinished samples of every held-out problem in every evaluation."""
    for (step, problem), group in groupby(rows, key=lambda row: (row["step"], row["problem"])):
        samples = list(group)
        yield {
            "step": step,
            "problem": problem,
            "samples": len(samples),
            "right": sum(row["outcome"] == "correct" for row in samples),
            "unfinished": sum(not row["finished"] for row in samples),
            "outcomes": _outcomes(samples),
        }


def by_step(rows: Iterable[Row], config: Config) -> Iterable[Row]:
    """Rollouts of every step, how many were taught, how many teachers read all that the context asks for."""
    for step, group in groupby(rows, key=lambda row: row["step"]):
        targets = list(group)
        taught = [row["peers"] for row in targets if row["teacher_prompt"] is not None]
        complete = [
            len(peers["successes"]) == config.peers.successes and len(peers["failures"]) == config.peers.failures
            for peers in taught
        ]
        yield {
            "step": step,
            "rollouts": len(targets),
            "taught": len(taught),
            "complete": sum(complete),
            "shown_failure": sum(bool(peers["failures"]) for peers in taught),
            "outcomes": _outcomes(targets),
        }


def _outcomes(rows: Iterable[Row]) -> dict[str, int]:
    return dict(sorted(Counter(row["outcome"] for row in rows).items()))


def _write(file: Path, rows: Iterable[Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    typer.run(main)
