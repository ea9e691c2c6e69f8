"""Single runs over each other: what each reached, and what differs in their settings. Over seeds: `compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from mopd_nemo.analysis.plots import Runs, mean_name
from mopd_nemo.config import Config
from mopd_nemo.config.load import flatten
from mopd_nemo.run.directory import RunDirectory

_NOT_COMPARED = ("name", "run_dir")


def label_runs(runs: Sequence[RunDirectory]) -> dict[str, RunDirectory]:
    """Runs by directory name; by their whole path where names are equal."""
    names = [run.path.resolve().name for run in runs]
    return {name if names.count(name) == 1 else str(run.path): run for name, run in zip(names, runs, strict=True)}


def summary_table(metrics: Runs, evals: Runs) -> dict[str, Any]:
    """`head` and `rows`: one row per run."""
    sizes = {mean_name(rows[0]).removeprefix("mean@") for rows in evals.values() if rows}
    n = sizes.pop() if len(sizes) == 1 else "n"
    head = ["run", "steps", f"held-out mean@{n}, %", "95 % interval", f"pass@{n}, %", "ever solved", "seconds a step"]
    return {"head": head, "rows": [[label, *_row(metrics[label], evals[label])] for label in metrics]}


def setting_differences(configs: Mapping[str, Config]) -> list[list[str]]:
    """One row per setting that is not the same in all runs: key, then its value in each."""
    flat = [flatten(config) for config in configs.values()]
    keys = dict.fromkeys(key for values in flat for key in values)
    return [
        [key, *(str(values.get(key, "–")) for values in flat)]
        for key in keys
        if key not in _NOT_COMPARED and len({str(values.get(key, "–")) for values in flat}) > 1
    ]


def _row(metrics: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [str(metrics[-1]["step"]) if metrics else "0"]
    if evals:
        first, last = evals[0], evals[-1]
        mean = mean_name(first)
        best = mean.replace("mean", "pass")
        cells += [f"{100 * first[name]:.1f} → {100 * last[name]:.1f}" for name in (mean,)]
        cells += [f"{100 * last[f'{mean}/low']:.1f} to {100 * last[f'{mean}/high']:.1f}"]
        cells += [f"{100 * first[best]:.1f} → {100 * last[best]:.1f}"]
    else:
        cells += ["–"] * 3
    cells.append(f"{metrics[-1]['ever_solved']:.0f}" if metrics and "ever_solved" in metrics[-1] else "–")
    cells.append(f"{fmean(row['seconds/step'] for row in metrics):.2f}" if metrics else "–")
    return cells
