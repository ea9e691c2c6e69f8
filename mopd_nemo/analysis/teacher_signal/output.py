"""The result of a teacher-signal analysis as files: JSON for programs, Markdown and figures for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mopd_nemo.analysis.page import markdown_table
from mopd_nemo.analysis.plots import metric_grid, save_figure, to_svg
from mopd_nemo.analysis.teacher_signal import RESULT_FILE, metrics
from mopd_nemo.analysis.teacher_signal.conditions import CONDITIONS, CONTROLLED, CONTROLS, LABELS
from mopd_nemo.analysis.teacher_signal.metrics import (
    BUCKETS,
    CLASSES,
    READINGS,
    by_difficulty,
    one_class_fraction,
    scored_prompt,
    signal_table,
)
from mopd_nemo.analysis.teacher_signal.scoring import ScoreStore
from mopd_nemo.files import write_json, write_text
from mopd_nemo.run.rollouts import RecordedGroup

HEADINGS = {
    "common": "The same responses in every condition",
    "all_prompts": "All prompts, undefined counts 0 (the paper's text)",
    "own_prompts": "Each condition on its own prompts, undefined counts 0 (the authors' published scripts)",
}
EXPLANATIONS = {
    "common": "Only responses for which every condition has all its peers, on prompts where every metric is defined. "
    "Compare conditions here: nothing but the context differs. Mean over prompts with its 95 % interval.",
    "all_prompts": "Every prompt and response, with the peers there are. A prompt without a success or without a "
    "failure counts 0 in five of the metrics, so these means mix signal with the difficulty of the problems.",
    "own_prompts": "A condition counts only the responses that have all its peers, on prompts with at least two of "
    "them. Not comparable: conditions that need a success drop the prompts without one, which count 0 elsewhere, and "
    "where a group has just the successes that a condition shows, they lack peers themselves and the prompt counts 0.",
}
SHIFT_NOTE = (
    "Log-probability of a whole response (nats), minus that without peers, on the same responses as the first table. "
    "The six metrics see ranks inside a prompt; a student also learns from the size of the difference."
)


def collect(groups: Sequence[RecordedGroup], store: ScoreStore, about: Mapping[str, str]) -> dict[str, Any]:
    """The whole result. `about`: the model and the rollouts."""
    rows = [{name: store[group.key, name] for name in CONDITIONS} for group in groups]
    prompts = [scored_prompt(group, row) for group, row in zip(groups, rows, strict=True)]
    without_success, without_failure = one_class_fraction(prompts)
    return {
        "about": dict(about),
        "num_prompts": len(groups),
        "num_responses": sum(len(group.rows) for group in groups),
        "success_rate": fmean(won for prompt in prompts for won in prompt.success),
        "without_success": without_success,
        "without_failure": without_failure,
        "contexts": {name: _context_facts([row[name] for row in rows]) for name in CONDITIONS},
        **signal_table(prompts),
        "difficulty": by_difficulty(prompts),
    }


def write_result(result: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write JSON, Markdown and figures. Returns their paths, those for people first."""
    markdown = directory / "teacher_signal.md"
    write_text(markdown, to_markdown(result))
    write_json(directory / RESULT_FILE, result)
    written = [markdown]
    for reading in READINGS:
        figure = metric_grid(
            result[reading], metrics.LABELS, LABELS, metrics.CHANCE, CONTROLS, HEADINGS[reading].split(",")[0]
        )
        if figure is not None:
            written += save_figure(figure, directory / f"teacher_signal_{reading}")
    for bucket, tables in result["difficulty"].items():
        title = f"{bucket}: {BUCKETS[bucket]}"
        figure = metric_grid(tables["own_prompts"], metrics.LABELS, LABELS, metrics.CHANCE, CONTROLS, title)
        if figure is not None:
            written += save_figure(figure, directory / f"teacher_signal_{bucket}")
    return [*written, directory / RESULT_FILE]


def to_markdown(result: Mapping[str, Any]) -> str:
    """All tables, each with an explanation."""
    about = ", ".join(f"{name} {value}" for name, value in result["about"].items())
    parts = [
        "# Teacher-signal quality",
        f"{about}. {result['num_prompts']} prompts, {result['num_responses']} responses, {result['success_rate']:.1%} "
        f"of them right; {result['without_success']:.1%} of the prompts have no success, "
        f"{result['without_failure']:.1%} no failure. Score: mean token log-probability of the response under "
        "the teacher's prompt. Higher is better, except Brier.",
    ]
    for reading in READINGS:
        parts += [f"## {HEADINGS[reading]}", EXPLANATIONS[reading], _metric_table(result[reading], reading == "common")]
    parts += [
        "## By difficulty, as in the paper's Figure 4",
        "Each condition on its own prompts, undefined counts 0. On hard prompts, which have no success, only the Brier "
        "score is defined.",
        *(
            text
            for bucket, tables in result["difficulty"].items()
            for text in (
                f"### {bucket}: {BUCKETS[bucket]}; {tables['num_prompts']} prompts",
                _metric_table(tables["own_prompts"], False),
            )
        ),
        "## Differences, prompt by prompt",
        "Success AUC of a condition minus that of another, on the prompts of the first table.",
        _difference_table(result["common"]),
        "## How far the peers move the score",
        SHIFT_NOTE,
        _shift_table(result["common"]),
        "## The teachers' contexts",
        "`complete`: responses for which the group has all the peers that the condition asks for. `cut`: contexts in "
        "which a peer lost its middle to the token budget. `unscored`: no context fitted, or the score was not finite.",
        _context_table(result["contexts"]),
    ]
    return "\n\n".join(parts) + "\n"


def _context_facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    tokens = [count for row in rows for count in row["context_tokens"] if count]
    return {
        "mean_tokens": fmean(tokens) if tokens else 0.0,
        "complete": fmean(flag for row in rows for flag in row["complete"]),
        "cut": fmean(flag for row in rows for flag in row["cut"]),
        "unscored": sum(score is None for row in rows for score in row["scores"]),
        "not_finite": sum(row["not_finite"] for row in rows),
    }


def _metric_table(reading: Mapping[str, Any], with_intervals: bool) -> str:
    head = ["condition", *metrics.LABELS.values(), "prompts", "responses"]
    body = []
    for name in CONDITIONS:
        row = reading[name]
        cells = [_value(row[metric], with_intervals) for metric in metrics.METRICS]
        body.append([LABELS[name], *cells, str(row["num_prompts"]), str(row["num_responses"])])
    return markdown_table(head, body)


def _difference_table(common: Mapping[str, Any]) -> str:
    head = ["condition", f"minus {LABELS['none']}", f"minus {LABELS[CONTROLLED]}"]
    body = [
        [LABELS[name], *(_value(common[name]["minus"][other]["auc"], True, "+") for other in ("none", CONTROLLED))]
        for name in CONDITIONS
    ]
    return markdown_table(head, body)


def _shift_table(common: Mapping[str, Any]) -> str:
    body = [
        [LABELS[name], *(_value(common[name]["shift"][kind], True, "+") for kind in CLASSES)] for name in CONDITIONS
    ]
    return markdown_table(["condition", "successes", "failures"], body)


def _context_table(contexts: Mapping[str, Mapping[str, float]]) -> str:
    body = [
        [
            LABELS[name],
            f"{facts['mean_tokens']:.0f}",
            f"{facts['complete']:.1%}",
            f"{facts['cut']:.1%}",
            str(facts["unscored"]),
        ]
        for name, facts in contexts.items()
    ]
    return markdown_table(["condition", "mean prompt tokens", "complete", "cut", "unscored"], body)


def _value(cell: Mapping[str, float | None], with_interval: bool, sign: str = "") -> str:
    if cell["mean"] is None:
        return "–"
    text = f"{cell['mean']:{sign}.3f}"
    return f"{text} ({cell['low']:{sign}.3f} to {cell['high']:{sign}.3f})" if with_interval else text


def page_values(file: Path) -> dict[str, Any]:
    """A result file as the report's template needs it."""
    result = json.loads(file.read_text())
    figure = metric_grid(result["common"], metrics.LABELS, LABELS, metrics.CHANCE, CONTROLS, "")
    return {
        "result": result,
        "readings": READINGS,
        "headings": HEADINGS,
        "explanations": EXPLANATIONS,
        "metrics": metrics.LABELS,
        "conditions": LABELS,
        "first_control": CONTROLS[0],
        "best": _best_cells(result),
        "figure": to_svg(figure) if figure else None,
    }


def _best_cells(result: Mapping[str, Any]) -> set[tuple[str, str, str]]:
    """(reading, metric, condition) of the best mean of each column."""
    best = set()
    for reading in READINGS:
        for metric in metrics.METRICS:
            means = {name: result[reading][name][metric]["mean"] for name in CONDITIONS}
            if any(mean is None for mean in means.values()):
                continue
            choose = min if metric in metrics.LOWER_IS_BETTER else max
            best |= {(reading, metric, name) for name, mean in means.items() if mean == choose(means.values())}
    return best
