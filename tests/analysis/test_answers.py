"""The first screen of a report: what it says, and that every setting that it names exists."""

import re
from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.analysis.answers import UNKNOWN, cost, duration, trained, worked
from mopd_nemo.analysis.findings import _SHARES, Finding, findings, in_order
from mopd_nemo.analysis.records import Records
from mopd_nemo.analysis.report import summary_table
from mopd_nemo.config import Config
from mopd_nemo.config.load import flatten, load_config
from mopd_nemo.files import write_rows, write_text
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.display import PHASES
from tests.conftest import QUICKSTART

QUIET = {
    "success_rate": 0.5,
    "signal": 1.0,
    "student/entropy": 0.5,
    "grad_norm": 0.1,
    "ever_solved": 3.0,
    "tokens_per_second": 100.0,
    "score/tokens": 50,
    **{share.metric: 0.0 for share in _SHARES},
    **{f"seconds/{phase}": 1.0 for phase in PHASES},
    "seconds/step": float(len(PHASES)),
}
"""A row of a step that nothing is wrong with."""


def write_run(
    path: Path,
    steps: list[dict[str, Any]],
    right: dict[int, list[int]] | None = None,
    *overrides: str,
) -> Records:
    """A recorded run of these steps; by evaluated step, how many of 8 samples of each problem are right."""
    config = load_config(QUICKSTART, [f"run_dir={path}", f"train.num_steps={max(len(steps), 1)}", *overrides])
    run = RunDirectory(path)
    run.create(config)
    write_rows(run.metrics_file, [{"step": number, **QUIET, **row} for number, row in enumerate(steps, start=1)])
    evals = []
    for step, counts in (right or {}).items():
        mean = sum(counts) / (8 * len(counts))
        evals.append({"step": step, "mean@8": mean, "mean@8/low": mean - 0.1, "mean@8/high": mean + 0.1, "pass@8": 1.0})
        evals[-1] |= {"num_problems": float(len(counts)), "seconds": 2.0}
        samples = [
            {"step": step, "problem": f"p{i}", "rollout": r, "response": "", "reward": float(r < c), "outcome": "wrong"}
            | {"success": r < c}
            for i, c in enumerate(counts)
            for r in range(8)
        ]
        write_rows(run.rollouts_file(step, "eval"), samples)
    write_rows(run.eval_file, evals)
    return Records.read(run)


def settings_of(found: list[Finding]) -> list[str]:
    return [finding.setting for finding in found]


@pytest.mark.parametrize(
    ("before", "after", "headline", "tone"),
    [
        ([1, 2, 1, 2] * 4, [7, 8, 6, 8] * 4, "It worked: held-out mean@8 18.8 % → 90.6 %.", "good"),
        ([7, 8, 6, 8] * 4, [1, 2, 1, 2] * 4, "It got worse: held-out mean@8 90.6 % → 18.8 %.", "bad"),
        ([4, 3, 5, 4] * 4, [3, 4, 4, 5] * 4, "No clear change: held-out mean@8 50.0 % → 50.0 %.", ""),
    ],
)
def test_headline_follows_the_paired_interval(
    tmp_path: Path, before: list[int], after: list[int], headline: str, tone: str
) -> None:
    records = write_run(tmp_path, [{}] * 4, {0: before, 4: after})
    said = worked(records)
    assert said["headline"].replace("\u00a0", " ") == headline and said["tone"] == tone
    assert "The same 16 problems before and after" in " ".join(said["notes"])


@pytest.mark.parametrize(("before", "after"), [([0], [8]), ([2, 2], [6, 6]), ([8], [0])])
def test_a_few_problems_that_agree_have_no_interval(tmp_path: Path, before: list[int], after: list[int]) -> None:
    records = write_run(tmp_path, [{}] * 4, {0: before, 4: after})
    said = worked(records)
    assert said["headline"].startswith("Too few problems to say: held-out mean@8") and said["tone"] == ""
    assert said["notes"][1].endswith("points, too few problems for an interval.")
    assert any("say next to nothing" in finding.remedy for finding in findings(records))
    cells = summary_table({"run": records})["rows"][0]
    assert cells[4] == f"{'+' if after > before else '−'}{abs(after[0] - before[0]) * 12.5:.1f}"


WATCHED = {"guard/alarm": 0.0, "guard/success_error": 0.02, "guard/unfinished_error": 0.0}
RUIN = [WATCHED] * 6 + [WATCHED | {"success_rate": 0.1, "guard/alarm": alarm} for alarm in (0.0, 0.0, 1.0)]


@pytest.mark.parametrize(
    ("after", "headline", "tone"),
    [
        ([4, 3, 5, 4] * 4, "No clear change: held-out mean@8 50.0 % → 50.0 %.", "bad"),
        ([8, 8, 7, 8] * 4, "It worked: held-out mean@8 50.0 % → 96.9 %.", ""),
        (None, "Too early to say: held-out mean@8 50.0 % at step 0, nothing since.", "bad"),
    ],
)
def test_the_headline_tells_the_guard_s_signs(
    tmp_path: Path, after: list[int] | None, headline: str, tone: str
) -> None:
    evaluated = {0: [4, 4, 4, 4] * 4} | ({9: after} if after else {})
    records = write_run(tmp_path, RUIN, evaluated)
    said = worked(records)
    assert said["headline"].replace("\u00a0", " ") == f"{headline} The guard saw signs of ruin at step 9."
    assert said["tone"] == tone and "success of rollouts fell from 50%" in said["notes"][0]
    assert findings(records)[0].worry.startswith("From step 9 on this run looks ruined")


def test_change_is_that_of_the_common_problems(tmp_path: Path) -> None:
    change = write_run(tmp_path, [{}] * 2, {0: [0, 4, 8], 2: [8, 4]}).change(0, 2)
    assert change is not None
    assert (change.mean, change.num_problems) == (0.5, 2) and change.low == 0.0 and change.high == 1.0


def test_unknown_is_said_to_be_unknown(tmp_path: Path) -> None:
    nothing = write_run(tmp_path / "a", [{}], None, "train.eval_every=0")
    assert "unknown: nothing was held out" in worked(nothing)["headline"]
    assert "train.eval_every" in settings_of(findings(nothing))
    lines = dict(trained(nothing))
    assert lines["started"] == lines["code"] == lines["on"] == lines["command"] == UNKNOWN
    assert "an unknown number from arithmetic" in lines["problems"]
    assert dict(cost(nothing))["GPUs"] == UNKNOWN
    assert ("responses that speak of what only the teacher reads", "0 %") in in_order(nothing)
    early = write_run(tmp_path / "b", [{}], {0: [4, 4]})
    assert worked(early)["headline"].startswith("Too early to say")
    unpaired = write_run(tmp_path / "c", [{}] * 2, {0: [0, 0], 2: [8, 8]})
    unpaired.run.rollouts_file(0, "eval").unlink()
    said = worked(Records.read(unpaired.run))
    assert (
        said["tone"] == ""
        and "It worked" not in said["headline"]
        and "Not compared problem by problem" in said["notes"][1]
    )
    write_text(unpaired.run.rollouts_file(0, "eval"), "not what a run writes\n")
    assert worked(Records.read(unpaired.run)) == said, "a damaged file of old samples takes no report away"
    row = {name: value for name, value in QUIET.items() if name != "leak/rate"}
    write_rows(unpaired.run.metrics_file, [{"step": 1, **row}])
    assert ("responses that speak of what only the teacher reads", "not measured") in in_order(
        Records.read(unpaired.run)
    )


def test_cost_adds_up(tmp_path: Path) -> None:
    records = write_run(tmp_path, [{}] * 8, {0: [4, 4], 8: [4, 4]})
    lines = dict(cost(records))
    assert lines["time"].startswith("48.0 s in steps, 4.0 s in evaluations")
    assert lines["sampled"] == "1,024 responses, 4,800 tokens" and lines["teacher read"] == "400 tokens"
    launch = {"step": 0, "host": "h", "hardware": "8 GPUs", "gpus": 8, "started": "2026-01-01T00:00:00+00:00"}
    write_rows(records.run.launches_file, [launch])
    assert dict(cost(Records.read(records.run)))["GPUs"].startswith("8, 0.116 GPU hours")
    assert [duration(s) for s in (3.24, 61, 3725)] == ["3.2 s", "1 min 1 s", "1 h 2 min"]


@pytest.mark.parametrize("share", _SHARES, ids=lambda share: share.metric)
def test_a_share_is_a_worry_above_its_limit_only(tmp_path: Path, share: Any) -> None:
    good = write_run(tmp_path / "good", [{}] * 8)
    assert share.setting not in settings_of([f for f in findings(good) if f.worry])
    bad = write_run(tmp_path / "bad", [{}] * 4 + [{share.metric: share.limit + 0.5}] * 4)
    (found,) = [finding for finding in findings(bad) if finding.remedy == share.remedy]
    assert found.worry.lower().startswith(share.text.lower())


@pytest.mark.parametrize(
    ("rows", "setting", "said"),
    [
        ([{"signal": 0.2}] * 4, "rollout.num_rollouts_per_prompt", "Only 20 % of the rollouts"),
        ([{}] * 3 + [{"student/entropy": 0.1}], "optimizer.learning_rate", "narrower"),
        ([{}] * 3 + [{"student/entropy": 0.9}], "optimizer.learning_rate", "flatter"),
        ([{"grad_norm": 7.0}] * 4, "optimizer.max_grad_norm", "clipped to 1 in 100 %"),
        ([{"sampler/gap": 0.3}] * 4, "rollout.importance_clip", "0.3 nats"),
        ([{"seconds/reward": 4.0}] * 4, "verifier.workers", ""),
    ],
)  # fmt: skip
def test_other_rules(tmp_path: Path, rows: list[dict[str, Any]], setting: str, said: str) -> None:
    right = {0: [4, 4], len(rows): [4, 4]}
    (found,) = [finding for finding in findings(write_run(tmp_path, rows, right)) if finding.setting == setting]
    assert said in found.worry


def test_a_fall_after_the_best_evaluation(tmp_path: Path) -> None:
    records = write_run(tmp_path, [{}] * 8, {0: [2] * 16, 4: [8] * 16, 8: [4, 5] * 8})
    (found,) = [finding for finding in findings(records) if "clearly lower" in finding.worry]
    assert found.setting == "train.keep_best" and "100 % at step 4" in found.worry
    assert "picked afterwards, so it flatters" in " ".join(worked(records)["notes"])


def test_what_to_try_when_it_went_well(tmp_path: Path) -> None:
    records = write_run(tmp_path, [{}] * 8, {0: [2] * 16, 4: [4] * 16, 8: [7, 8] * 8})
    found = findings(records)
    assert not [finding.worry for finding in found if finding.worry]
    assert settings_of(found) == ["train.num_steps", "seed"] and "train.num_steps=16" in found[0].remedy


def test_every_setting_that_is_named_exists(tmp_path: Path) -> None:
    known = set(flatten(Config()))
    known |= {".".join(key.split(".")[:n]) for key in known for n in range(1, key.count(".") + 1)}
    rows = [{**{share.metric: 1.0 for share in _SHARES}, "signal": 0.1, "grad_norm": 9.0, "seconds/reward": 4.0}] * 4
    every = findings(write_run(tmp_path / "a", rows, {0: [8] * 8, 4: [1] * 8}))
    every += findings(write_run(tmp_path / "b", [{}] * 4, {0: [4, 4], 4: [4, 4]}))
    named = {finding.setting for finding in every if finding.setting}
    named |= {name for f in every for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=\w+)?`", f.remedy)}
    assert len(named) > 12 and named <= known
