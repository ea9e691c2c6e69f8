"""The comparison as a table: rows for people (Markdown, HTML) and for programs (CSV)."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from mopd_nemo.analysis.compare.results import Comparison, Setting
from mopd_nemo.run.display import PHASES


def rows(comparison: Comparison) -> list[dict[str, float | str]]:
    """One row a setting. Accuracies are fractions; `/low` and `/high` are 95 % bootstrap bounds by problem."""
    n = comparison.num_samples
    baseline = comparison.baseline
    return [
        {"setting": setting.label, "seeds": len(setting.runs)}
        | _accuracy(setting, f"mean@{n}", None)
        | _accuracy(setting, f"pass@{n}", n)
        | {f"mean@{n}/all_evaluations": _mean_over_evaluations(setting, f"mean@{n}")}
        | {"ever_solved": setting.ever_solved()}
        | {f"seconds/{phase}": seconds for phase, seconds in setting.seconds().items()}
        | ({"step_time_over_sdpo": setting.seconds()["step"] / baseline.seconds()["step"] - 1.0} if baseline else {})
        for setting in comparison.settings
    ]


def _accuracy(setting: Setting, metric: str, k: int | None) -> dict[str, float]:
    mean, deviation = setting.over_seeds(metric)
    low, high = setting.interval(k)
    before, _ = setting.over_seeds(metric, row=0)
    return {
        f"{metric}/before": before,
        metric: mean,
        f"{metric}/std": deviation,
        f"{metric}/low": low,
        f"{metric}/high": high,
    }


def _mean_over_evaluations(setting: Setting, metric: str) -> float:
    """Mean of the curve after the start: high for a setting that learns early and stays."""
    values = [mean for _, mean, _ in setting.curve(metric, "evals")][1:]
    return sum(values) / len(values) if values else float("nan")


def write_csv(comparison: Comparison, file: Path) -> None:
    """Every number, unrounded."""
    table = rows(comparison)
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def accuracy_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heading and cells: what each setting reached."""
    n = comparison.num_samples
    heading = ["setting", "seeds", "before", f"mean@{n}", "95 % by problem", "over all evaluations"]
    heading += [f"pass@{n}", "95 % by problem", "ever solved"]
    body = []
    for row in rows(comparison):
        cells = [str(row["setting"]), str(row["seeds"]), _percent(row[f"mean@{n}/before"])]
        cells += [_spread(row, f"mean@{n}"), _bounds(row, f"mean@{n}"), _percent(row[f"mean@{n}/all_evaluations"])]
        cells += [_spread(row, f"pass@{n}"), _bounds(row, f"pass@{n}"), f"{float(row['ever_solved']):.0f}"]
        body.append(cells)
    return heading, body


def time_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heading and cells: seconds per phase and step."""
    heading = ["setting", *PHASES, "step"] + (["step time over sdpo"] if comparison.baseline else [])
    body = []
    for row in rows(comparison):
        cells = [str(row["setting"]), *(f"{float(row[f'seconds/{name}']):.2f}" for name in (*PHASES, "step"))]
        if comparison.baseline:
            cells.append(f"{100 * float(row['step_time_over_sdpo']):+.1f} %")
        body.append(cells)
    return heading, body


def _percent(value: float | str) -> str:
    return f"{100 * float(value):.1f}"


def _spread(row: dict[str, float | str], metric: str) -> str:
    deviation = float(row[f"{metric}/std"])
    return _percent(row[metric]) + ("" if math.isnan(deviation) else f" ± {100 * deviation:.1f}")


def _bounds(row: dict[str, float | str], metric: str) -> str:
    return f"{_percent(row[f'{metric}/low'])} to {_percent(row[f'{metric}/high'])}"
