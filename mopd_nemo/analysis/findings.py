"""What to worry about in a run and what to try next: rules on its records, each naming the setting that it is about."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mopd_nemo.analysis.plots import mean_name
from mopd_nemo.analysis.records import Records, mean
from mopd_nemo.config.plugins import recorded_method
from mopd_nemo.evaluation import has_interval
from mopd_nemo.run.checkpoints import checkpoints, step_of
from mopd_nemo.run.guard import MORE_ENTROPY, missing_steps, signs

LESS_ENTROPY = 0.5
"""Times that of the first quarter: below, the student has become narrow."""
FEW_TAUGHT = 0.5
"""Share of rollouts below which most of a step's work teaches nothing."""
_LEAKS = "leak/rate"
MOSTLY = 0.9
"""Share of steps that counts as nearly all."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in the records, and what would help."""

    worry: str
    """Empty: nothing is wrong, something could be better."""
    setting: str = ""
    remedy: str = ""
    serious: bool = False
    """The run is probably ruined."""


@dataclass(frozen=True, slots=True)
class _Share:
    """A metric of `metrics.jsonl` that should be small."""

    text: str
    metric: str
    limit: float
    setting: str
    remedy: str
    whole: bool = False
    """Over all steps, else over the last quarter."""


_SHARES = (
    _Share(
        *("responses cut at the limit", "response/unfinished", 0.05, "rollout.max_response_tokens"),
        "raise it, or look whether the model ends its turns (`model.end_tokens`)",
    ),
    _Share(
        *("rollouts that the verifier could not judge", "outcome/verifier_error", 0.0, "verifier"),
        "`mopd inspect` shows the errors; such rollouts are neither successes nor failures",
        whole=True,
    ),
    _Share(
        *("answers that could not be compared in time", "outcome/undecided", 0.01, "verifier.math.seconds_per_answer"),
        "raise it; they count as wrong",
        whole=True,
    ),
    _Share(
        *("programs that ran out of time", "outcome/timeout", 0.1, "verifier.code.seconds_per_test"),
        "raise it if right programs are among them",
    ),
    _Share(
        *("responses without an answer in the expected form", "outcome/bad_format", 0.2, "data.prompt_suffix"),
        "say in the prompt how the answer is to be given",
    ),
    _Share(
        *("groups in which every rollout failed", "group/all_failed", 0.5, "data.train"),
        "easier problems or a stronger model; more rollouts a problem (`rollout.num_rollouts_per_prompt`) find more "
        "successes; `peers.when_no_success` says what such a group teaches",
    ),
    _Share(
        *("groups in which every rollout was right", "group/all_succeeded", 0.5, "data.train"),
        "harder problems: these have little left to teach",
    ),
    _Share(
        *("successes that say nothing outside their thinking", "success_without_text", 0.5, "data.prompt_suffix"),
        "ask for the solution after the thinking, or keep it with `peers.strip_thinking_successes=false`",
    ),
    _Share(
        *("teacher prompts with a peer that lost its middle", "context/cut", 0.1, "peers.max_peer_tokens"),
        "raise it, and `peers.max_context_tokens`",
    ),
    _Share(
        *("rollouts whose peers did not fit into the teacher's prompt", "context/overflow", 0.02),
        *("peers.max_context_tokens", "raise it"),
    ),
    _Share(
        *("skipped updates", "update/skipped", 0.0, "optimizer.learning_rate"),
        "lower it if gradients were not finite; where no rollout had a signal, see the groups",
        whole=True,
    ),
    _Share(
        *("responses that speak of what only the teacher reads", _LEAKS, 0.01, "leak.action"),
        "set it to `no_peer` or `mask`; docs/contexts.md says what counts as a leak",
    ),
)


def findings(records: Records) -> list[Finding]:
    """What holds, most serious first."""
    rules = (_ruined, _fell, _incomplete, _shares, _untaught, _entropy, _optimiser, _sampler, _record, _next_time)
    return [finding for rule in rules for finding in rule(records)]


def in_order(records: Records) -> list[tuple[str, str]]:
    """The shares that were looked at and are small, with their values; that of leaks also where it is unknown."""
    lines = []
    for share in _SHARES:
        value = _value(records, share)
        if value is not None and value <= share.limit:
            lines.append((share.text, _percent(value)))
        elif value is None and share.metric == _LEAKS:
            lines.append((share.text, "not measured"))
    return lines


def _ruined(records: Records) -> Iterator[Finding]:
    if found := alarm(records):
        yield Finding(
            f"From step {found['step']} on this run looks ruined: {'; '.join(found['reasons'])}.",
            *("peers.choose", "start again from a checkpoint before that; `measured` shows what clearly helps"),
            serious=True,
        )


def alarm(records: Records) -> dict[str, Any] | None:
    """The first step at which the guard found the run ruined, and why."""
    metrics, evals = records.metrics, records.evals
    for number, row in enumerate(metrics, start=1):
        if row.get("guard/alarm"):
            known = [evaluation for evaluation in evals if evaluation["step"] < row["step"]]
            return {"step": row["step"], "reasons": signs(metrics[:number], known).reasons}
    last = signs(metrics, evals)
    return {"step": metrics[-1]["step"], "reasons": last.reasons} if metrics and last.alarm else None


def _fell(records: Records) -> Iterator[Finding]:
    best, last = records.best, records.evals[-1] if records.evals else None
    if best is None or last is None or best is last:
        return
    change = records.change(best["step"], last["step"])
    if change is None or change.high >= 0:
        return
    name = mean_name(best)
    kept = {step_of(path): path.name for path in checkpoints(records.run.checkpoints)}
    remedy = f"set it to {name}: the checkpoint of the best evaluation then stays"
    if best["step"] in kept:
        remedy = f"take checkpoint {kept[best['step']]} of this run; {name} here would keep the best one always"
    yield Finding(
        f"Held-out {name} is {_percent(best[name])} at step {best['step']} and {_percent(last[name])} at step "
        f"{last['step']}, clearly lower.",
        *("train.keep_best", remedy),
    )


def _incomplete(records: Records) -> Iterator[Finding]:
    train = records.config.train
    if records.metrics and not records.complete:
        yield Finding(
            f"{records.step} of {train.num_steps} steps are recorded: the run goes on, or was stopped.",
            *("train.num_steps", f"if it was stopped, `{_resume(records)}` goes on"),
        )


def _shares(records: Records) -> Iterator[Finding]:
    for share in _SHARES:
        value = _value(records, share)
        if value is not None and value > share.limit:
            of = "of all steps" if share.whole else "in the last quarter of the steps"
            early = None if share.whole or len(records.metrics) < 4 else records.early(share.metric)
            before = "" if early is None else f", {_percent(early)} in the first"
            text = share.text[0].upper() + share.text[1:]
            yield Finding(f"{text}: {_percent(value)} {of}{before}.", share.setting, share.remedy)


def _value(records: Records, share: _Share) -> float | None:
    return mean(records.metrics, share.metric) if share.whole else records.late(share.metric)


def _untaught(records: Records) -> Iterator[Finding]:
    taught = records.late("signal")
    if taught is not None and taught < FEW_TAUGHT:
        yield Finding(
            f"Only {_percent(taught)} of the rollouts of the last quarter of the steps are learned from; the others "
            "had neither a teacher nor an advantage.",
            *("rollout.num_rollouts_per_prompt", "more rollouts a problem make mixed groups likelier"),
        )


def _entropy(records: Records) -> Iterator[Finding]:
    early, late = records.early("student/entropy"), records.late("student/entropy")
    if not early or late is None or len(records.metrics) < 4:
        return
    times = late / early
    if not LESS_ENTROPY < times < MORE_ENTROPY:
        what = "narrower: little is left to explore" if times <= LESS_ENTROPY else "flatter: it may be coming apart"
        yield Finding(
            f"The student's entropy went from {early:.3g} to {late:.3g} nats a token (first and last quarter): {what}.",
            *("optimizer.learning_rate", "lower it, or stop earlier"),
        )


def _optimiser(records: Records) -> Iterator[Finding]:
    limit = records.config.optimizer.max_grad_norm
    norms = [row["grad_norm"] for row in records.metrics if "grad_norm" in row]
    clipped = sum(norm > limit for norm in norms) / len(norms) if norms else 0.0
    if clipped >= MOSTLY:
        yield Finding(
            f"The gradient was clipped to {limit:g} in {_percent(clipped)} of the steps: its size no longer counts.",
            *("optimizer.max_grad_norm", "raise it, or lower `optimizer.learning_rate` if the loss jumps"),
        )


def _sampler(records: Records) -> Iterator[Finding]:
    rollout, gap = records.config.rollout, records.late("sampler/gap")
    if gap is not None and gap > 0.05 and rollout.temperature == 1.0 and rollout.lag == 0:
        yield Finding(
            f"Sampler and learner differ by {gap:.2g} nats a token, more than rounding explains.",
            *("rollout.importance_clip", "keep it on, and look at the sampler's precision (`model.dtype`)"),
        )


def _record(records: Records) -> Iterator[Finding]:
    if missing := missing_steps(records.metrics, range(1, records.step + 1)):
        yield Finding(f"metrics.jsonl lacks steps {missing}; what is said here leaves them out.")
    for what in ("commit", "versions"):
        if len({str(row.get(what)) for row in records.launches}) > 1:
            yield Finding(f"Parts of this run were made with different code ({what} differ: launches.jsonl).")


def _next_time(records: Records) -> Iterator[Finding]:
    """What is not wrong, but could be better."""
    config, evals = records.config, records.evals
    if not config.train.eval_every:
        yield Finding("", "train.eval_every", "hold problems out (`data.eval`), or nobody knows whether it works")
    if len(evals) < 2:
        return
    change = records.change(evals[0]["step"], evals[-1]["step"])
    recent = records.change(evals[-2]["step"], evals[-1]["step"])
    if change is None:
        return
    if not has_interval(change.low, change.high, change.num_problems):
        yield Finding("", "data.num_eval", f"more held-out problems: {change.num_problems} say next to nothing")
    elif change.low <= 0 <= change.high:
        width = 100 * (change.high - change.low) / 2
        yield Finding(
            *("", "data.num_eval"),
            f"more held-out problems: with {change.num_problems} a change below about {width:.0f} points stays unseen",
        )
        if recorded_method(config.method).reads_peers and config.peers.choose == "fixed":
            yield Finding("", "peers.choose", "`measured`, or `mopd preflight`: what do these peers tell this model?")
    if change.low > 0 and records.complete:
        if recent is not None and recent.low > 0:
            steps = 2 * config.train.num_steps
            yield Finding(
                *("", "train.num_steps"),
                f"accuracy was still rising: `{_resume(records)} train.num_steps={steps}`",
            )
        yield Finding("", "seed", "`mopd sweep` with seed=0,1,2, and another `method` beside it, before you believe it")
    waiting = _waits(records.metrics[-1]) if records.metrics else 0.0
    if waiting > 0.3:
        yield Finding("", "verifier.workers", f"judging keeps a step waiting for {_percent(waiting)} of its time")


def _waits(row: Mapping[str, Any]) -> float:
    return row["seconds/reward"] / row["seconds/step"] if row.get("seconds/step") else 0.0


def _percent(share: float) -> str:
    """Two digits where a share is small, so that a few do not read as none."""
    return f"{100 * share:.2g} %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _resume(records: Records) -> str:
    return shlex.join(["mopd", "train", "--resume", str(records.run.path)])
