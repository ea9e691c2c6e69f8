"""Keep the small files of finished runs: `python -m recipes.real_model.collect SWEEP_DIR OUTPUT_DIR`.

Each run keeps its settings, metrics and evaluations, and two summaries of its rollouts, which are too large to keep:
`problems.jsonl` (correct samples by evaluation and problem) and `targets.jsonl` (contexts of the teachers by step).
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
import yaml

from mopd_nemo.config.load import flatten, load_config
from mopd_nemo.files import read_rows
from mopd_nemo.run.directory import RunDirectory
from recipes.real_model.building import building, say

CONFIG = Path(__file__).resolve().parents[2] / "configs/real/smollm2.yaml"
_ASKED = {"success": "successes", "failure": "failures"}
_NOT_TRIED = (
    *("run_dir", "name", "seed", "method", "peers.successes", "peers.failures", "model.", "data.", "verifier."),
    *("generation.", "train.checkpoint", "train.keep", "nemo.", "cluster."),
)
"""Beginnings of keys that a name tells otherwise, or not at all."""
Row = Mapping[str, Any]
Settings = Mapping[str, Any]
"""A run's config.yaml as it was written: a run of another version may have keys that this one refuses."""


def main(
    sweep: Annotated[Path, typer.Argument(help="Directory of `mopd sweep`.")],
    output: Annotated[Path, typer.Argument(help="One directory a run is written into it; those that are there stay.")],
) -> None:
    for path in sorted(file.parent for file in sweep.glob("*/config.yaml")):
        run = RunDirectory(path)
        settings = yaml.safe_load(run.config_file.read_text())
        kept = output / f"{arm(settings)}-seed{settings['seed']}"
        if is_finished(run, settings) and not kept.exists():
            keep(run, settings, kept)
            say(f"kept {kept.name}")


def is_finished(run: RunDirectory, settings: Settings) -> bool:
    """Whether the run has its last step and the evaluation after it."""
    files = (run.metrics_file, run.eval_file)
    last = settings["train"]["num_steps"]
    return all(file.exists() and any(row["step"] == last for row in read_rows(file)) for file in files)


def arm(settings: Settings) -> str:
    """What a run tries: its context in the paper's words (2S+1F) or its method, and where else it is not the recipe."""
    peers, method = settings["peers"], settings["method"]
    shown = [f"{peers[kind]}{letter}" for kind, letter in (("successes", "S"), ("failures", "F")) if peers[kind]]
    recipe = flatten(load_config(CONFIG))
    passed_over = _NOT_TRIED if method == "mopd" else (*_NOT_TRIED, "peers.", "teacher.", "context", "feedback.")
    found = {
        key: _setting(settings, key, default) for key, default in recipe.items() if not key.startswith(passed_over)
    }
    other = [f"{key}={value}" for key, value in found.items() if value != recipe[key]]
    return ",".join(["+".join(shown) if method == "mopd" else method, *other]).replace("/", "_")


def _setting(settings: Settings, key: str, default: Any) -> Any:
    """Of a dotted key; the default where another version knew no such key."""
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


def keep(run: RunDirectory, settings: Settings, output: Path) -> None:
    """Write a run's small files."""
    with building(output) as new:
        for file in (run.config_file, run.metrics_file, run.eval_file):
            shutil.copyfile(file, new / file.name)
        evaluated = (row for file in sorted(run.rollouts.glob("eval_*.jsonl")) for row in read_rows(file))
        _write(new / "problems.jsonl", by_problem(evaluated))
        trained = (row for file in sorted(run.rollouts.glob("step_*.jsonl")) for row in read_rows(file))
        _write(new / "targets.jsonl", by_step(trained, settings))


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


def by_step(rows: Iterable[Row], settings: Settings) -> Iterable[Row]:
    """Number of rollouts of every step, of those with a teacher, and of those with a complete context."""
    asked = settings["peers"]
    for step, group in groupby(rows, key=lambda row: row["step"]):
        targets = list(group)
        taught = [row["peers"] for row in targets if row["teacher_prompt"] is not None]
        complete = [all(_enough(shown[kind], asked[_ASKED[kind]]) for kind in shown) for shown in map(_count, taught)]
        yield {
            "step": step,
            "rollouts": len(targets),
            "taught": len(taught),
            "complete": sum(complete),
            "shown_failure": sum(bool(_count(peers)["failure"]) for peers in taught),
            "outcomes": _outcomes(targets),
        }


def _count(peers: Any) -> dict[str, int]:
    """Successes and failures that a teacher read. Runs of earlier versions list them under their kinds."""
    if isinstance(peers, dict):
        return {"success": len(peers["successes"]), "failure": len(peers["failures"])}
    return {kind: sum(peer["kind"] == kind for peer in peers) for kind in ("success", "failure")}


def _enough(shown: int, asked: int | str) -> bool:
    return shown > 0 if asked == "all" else shown == asked


def _outcomes(rows: Iterable[Row]) -> dict[str, int]:
    return dict(sorted(Counter(row["outcome"] for row in rows).items()))


def _write(file: Path, rows: Iterable[Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    typer.run(main)
