"""The first screen of a report: what was trained, whether it worked, what it cost. Only what is recorded is said."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from mopd_nemo.analysis.findings import alarm
from mopd_nemo.analysis.plots import mean_name
from mopd_nemo.analysis.records import Change, Records
from mopd_nemo.config.checks import uses
from mopd_nemo.config.plugins import recorded_method
from mopd_nemo.evaluation import has_interval
from mopd_nemo.run.checkpoints import best_saved
from mopd_nemo.run.display import PHASES, WARM_UP_STEPS

UNKNOWN = "not recorded"
Lines = list[tuple[str, str]]
"""Names and what stands beside them."""


def trained(records: Records) -> Lines:
    """What was trained, with what, when and where."""
    config, count = records.config, records.num_problems()
    train, rollout = config.train, config.rollout
    sizes = {split: f"{count[split]:,}" if count.get(split) else "an unknown number" for split in ("train", "eval")}
    held_out = f"; held out: {sizes['eval']} from {config.data.eval}" if train.eval_every else "; none held out"
    first, last = (records.launches[0], records.launches[-1]) if records.launches else ({}, {})
    versions = last.get("versions", {})
    code = [f"{name} {version}" for name, version in versions.items()]
    if last.get("commit"):
        code.insert(1, f"commit {last['commit']}")
    again = len(records.launches) - 1
    continued = f", continued {again} time{'s' * (again > 1)}, last {_moment(last)}" if again > 0 else ""
    where = dict.fromkeys(f"{row['host']}: {row['hardware']}" for row in records.launches)
    return [
        ("model", f"{config.model.path} ({config.model.dtype})"),
        ("problems", f"{sizes['train']} from {config.data.train}{held_out}"),
        ("method", describe_method(records)),
        (
            "steps",
            f"{records.step} of {train.num_steps}, each {rollout.num_prompts_per_step} problems × "
            f"{rollout.num_rollouts_per_prompt} rollouts of up to {rollout.max_response_tokens:,} tokens; learning "
            f"rate {config.optimizer.learning_rate:g}",
        ),
        ("started", f"{_moment(first)}{continued}" if first else UNKNOWN),
        ("on", "; ".join(where) or UNKNOWN),
        ("code", ", ".join(code) or UNKNOWN),
        ("command", first.get("command") or UNKNOWN),
    ]


def describe_method(records: Records) -> str:
    """Method, teacher, what it reads and how they are compared, in one line."""
    config = records.config
    peers = config.peers
    parts = [config.method]
    if config.teachers:
        parts.append(f"teachers {', '.join(config.teachers)}")
    elif config.teacher.kind != "none":
        rate = f" (rate {config.teacher.ema_rate:g})" if config.teacher.kind == "ema" else ""
        parts.append(f"teacher {config.teacher.kind}{rate}")
    if uses(config.method, "context"):
        chosen = records.run.rows(records.run.choices_file)
        measured = f"measured, {chosen[-1]['context']} since step {chosen[-1]['step'] + 1}" if chosen else "measured"
        parts.append(f"reads {config.teacher_reads}" if peers.choose == "fixed" else f"peers: {measured}")
        if peers.control != "none":
            parts.append(f"control {peers.control}")
    if uses(config.method, "divergence.kind"):
        support = {
            "full": "the whole vocabulary",
            "student_topk": f"the student's {config.divergence.k} likeliest tokens",
            "teacher_topk": f"the teacher's {config.divergence.k} likeliest tokens",
            "sampled": "the sampled token",
        }
        parts.append(f"{config.divergence.kind} on {support[config.divergence.support]}")
    return " · ".join([*parts, f"seed {config.seed}"])


def worked(records: Records) -> dict[str, Any]:
    """`headline`, its `tone` (good, bad or empty) and `notes`: whether held-out accuracy has changed.

    Where the guard has found the run ruined, the headline says so too, and is never good.
    """
    said = _worked(records)
    if found := alarm(records):
        said["headline"] += f" The guard saw signs of ruin at step {found['step']}."
        said["tone"] = "" if said["tone"] == "good" else "bad"
        said["notes"] = [f"Signs of ruin: {'; '.join(found['reasons'])}.", *said["notes"]]
    return said


def _worked(records: Records) -> dict[str, Any]:
    evals = records.evals
    if not evals:
        unknown = "nothing was held out" if not records.config.train.eval_every else "no evaluation is done yet"
        return {"headline": f"Whether it works is unknown: {unknown}.", "tone": "", "notes": []}
    first, last = evals[0], evals[-1]
    name = mean_name(first)
    if len(evals) == 1:
        headline = f"Too early to say: held-out {name} {_rate(first, name)} at step {first['step']}, nothing since."
        return {"headline": headline, "tone": "", "notes": []}
    change = records.change(first["step"], last["step"])
    so_far = "" if records.complete else " so far"
    moved = f"held-out {name} {_rate(first, name)} → {_rate(last, name)}"
    interval = (
        f"95 % interval {_rate(last, f'{name}/low')} to {_rate(last, f'{name}/high')}, over other problems of this kind"
    )
    if not has_interval(last[f"{name}/low"], last[f"{name}/high"], last.get("num_problems", 0)):
        interval = "too few problems for an interval"
    notes = [f"Steps {first['step']} → {last['step']}. At the end: {interval}."]
    if change is None:
        notes.append(
            "Not compared problem by problem: the samples of one of the two evaluations are not there, or damaged."
        )
        return {"headline": f"{moved[0].upper()}{moved[1:]}{so_far}.", "tone": "", "notes": notes}
    found, tone = _finding(change)
    interval = f"95 % interval {signed(change.low)} to {signed(change.high)}"
    if not has_interval(change.low, change.high, change.num_problems):
        interval = "too few problems for an interval"
    notes.append(
        f"The same {change.num_problems:,} problems before and after: {signed(change.mean)} points, {interval}."
    )
    notes += _best(records, name)
    notes.append("This is one seed; other seeds may give other results.")
    return {"headline": f"{found}{so_far}: {moved}.", "tone": tone, "notes": notes}


def cards(records: Records) -> Lines:
    """The few numbers below the headline: (value, label)."""
    items: Lines = []
    if records.evals:
        first, last = records.evals[0], records.evals[-1]
        n = mean_name(first).removeprefix("mean@")
        for name in (name for name in (f"mean@{n}", f"pass@{n}", f"maj@{n}") if name in first):
            value = _rate(last, name) if first is last else f"{100 * first[name]:.1f} → {_rate(last, name)}"
            items.append((value, f"held-out {name}"))
    early, late = records.early("success_rate"), records.late("success_rate")
    if early is not None and late is not None:
        items.append(
            (f"{100 * early:.0f} → {100 * late:.0f}\u00a0%", "training rollouts right, first and last quarter")
        )
    if records.metrics and "ever_solved" in records.metrics[-1]:
        items.append((f"{records.metrics[-1]['ever_solved']:,.0f}", "training problems solved at least once"))
    metric = records.config.train.keep_best
    if metric and (best := best_saved(records.run.checkpoints, records.evals, metric)):
        items.append((_rate(best[1], metric), f"best checkpoint by {metric}: {best[0].name}"))
    return items


def cost(records: Records) -> Lines:
    """Time, tokens and GPUs."""
    rows = records.metrics
    if not rows:
        return [("so far", "no step is recorded")]
    steps = sum(row["seconds/step"] for row in rows)
    evaluations = sum(row.get("seconds", 0.0) for row in records.evals)
    lines = [
        ("time", f"{duration(steps)} in steps, {duration(evaluations)} in evaluations; loading, saving not counted")
    ]
    counted = rows[WARM_UP_STEPS:] or rows
    shares = {phase: fmean(row[f"seconds/{phase}"] / row["seconds/step"] for row in counted) for phase in PHASES}
    most = sorted(shares, key=lambda phase: -shares[phase])[:3]
    a_step = duration(fmean(row["seconds/step"] for row in counted))
    lines.append(("a step", f"{a_step}: {', '.join(f'{phase} {shares[phase]:.0%}' for phase in most)}"))
    rollout = records.config.rollout
    written = [row["tokens_per_second"] * row["seconds/step"] for row in rows if "tokens_per_second" in row]
    responses = len(rows) * rollout.num_prompts_per_step * rollout.num_rollouts_per_prompt
    if recorded_method(records.config.method).samples:
        tokens = f", {sum(written):,.0f} tokens" if written else ""
        lines.append(("sampled", f"{responses:,} responses{tokens}"))
    if (read := sum(row.get("score/tokens", 0.0) for row in rows)) > 0:
        lines.append(("teacher read", f"{read:,.0f} tokens"))
    lines.append(("GPUs", _gpu_hours(records, steps + evaluations)))
    return lines


def _gpu_hours(records: Records, seconds: float) -> str:
    counts = {row["gpus"] for row in records.launches}
    if not counts:
        return UNKNOWN
    if counts == {0}:
        return "none"
    if len(counts) > 1:
        return f"{' and '.join(map(str, sorted(counts)))}, in different processes of this run"
    (count,) = counts
    return f"{count}, {count * seconds / 3600:.3g} GPU hours in steps and evaluations"


def _finding(change: Change) -> tuple[str, str]:
    if not has_interval(change.low, change.high, change.num_problems):
        return "Too few problems to say", ""
    if change.low > 0:
        return "It worked", "good"
    if change.high < 0:
        return "It got worse", "bad"
    return "No clear change", ""


def _best(records: Records, name: str) -> list[str]:
    best, last = records.best, records.evals[-1]
    if best is None or best is last or len(records.evals) < 3 or best[name] <= last[name]:
        return []
    return [
        f"The best of {len(records.evals)} evaluations is step {best['step']} with {_rate(best, name)}; picked "
        "afterwards, so it flatters."
    ]


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def signed(value: float) -> str:
    """A difference of shares, in points."""
    return f"{100 * value:+.1f}".replace("-", "−")


def _rate(row: Mapping[str, Any], name: str) -> str:
    return f"{100 * row[name]:.1f}\u00a0%"


def _moment(launch: Mapping[str, Any]) -> str:
    return launch["started"].replace("T", " ").replace("+00:00", " UTC")
