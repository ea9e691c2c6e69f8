"""`mopd analyze` and `mopd report` as a person types them."""

import json
import sys
from pathlib import Path

import pytest

from mopd_nemo.cli import main
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.files import read_rows
from mopd_nemo.run.checkpoints import checkpoints
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.token_signal import read_token_signal
from tests.commands.test_cli import mopd
from tests.conftest import QUICKSTART
from tests.test_trainer import new_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    path = tmp_path_factory.mktemp("analyze")
    return {
        "a": new_run(path / "a", "train.num_steps=2", "eval.num_samples=4"),
        "b": new_run(path / "b", "train.num_steps=2", "eval.num_samples=4", "peers.failures=1"),
    }


def test_help_explains_every_analysis() -> None:
    text = mopd("analyze", "--help")
    for command in ("teacher-signal", "tokens", "branches", "recovery", "diversity", "cases"):
        assert command in text and "Usage" in mopd("analyze", command, "--help")


def test_teacher_signal_of_a_run_then_its_report(runs: dict[str, RunDirectory]) -> None:
    run = runs["a"]
    text = mopd("analyze", "teacher-signal", "--rollouts", str(run.path))
    assert "2 successes + 1 failure" in text and "biserial" in text
    result = json.loads((run.path / "teacher_signal" / "teacher_signal.json").read_text())
    assert result["about"] == {"rollouts": "eval_000002.jsonl", "scored by": "embedded:arithmetic"}
    assert result["num_prompts"] == 4 and result["all_prompts"]["none"]["num_prompts"] == 4
    assert "all scores are there already" in mopd("analyze", "teacher-signal", "--rollouts", str(run.path))
    mopd("report", str(run.path))
    assert "Teacher-signal quality" in run.report_file.read_text()


def test_tokens_of_a_recorded_step(runs: dict[str, RunDirectory], tmp_path: Path) -> None:
    run, page = runs["a"], tmp_path / "page.html"
    rows = read_rows(run.rollouts_file(2))
    shown = next(row for row in rows if row["teacher_prompt"])
    command = ("analyze", "tokens", str(run.path), "--problem", shown["problem"], "--contexts", "1s,1f,all")
    text = mopd(*command, "--rollout", str(shown["rollout"]), "--output", str(page))
    assert "before training" in text and "objects" in text
    assert "Rollout " in page.read_text() and "step 2" in page.read_text()
    assert "\x1b[" not in text
    checkpoint = str(checkpoints(run.checkpoints)[-1])
    assert "step_000002" in mopd(*command, "--checkpoint", checkpoint) and list(run.path.glob("tokens/*.html"))


def test_recorded_token_signal_is_that_of_the_weights_it_was_learned_with(tmp_path: Path) -> None:
    run = new_run(
        tmp_path / "run", "train.num_steps=2", "train.checkpoint_every=1", "logging.save_token_signal_every=1"
    )
    told = read_token_signal(run.signal_file(2))
    rows = {(row["problem"], row["rollout"]): row for row in read_rows(run.rollouts_file(2))}
    taught = {key for key, row in rows.items() if row["teacher_prompt"] is not None}
    assert taught and {(own.problem, own.rollout) for own in told} == taught
    for own in told:
        row = rows[own.problem, own.rollout]
        assert len(own.texts) == len(own.signal.student) == row["response_tokens"]
        assert "".join(own.texts).startswith(row["response"])
        for sampled, likeliest in (
            (own.signal.teacher, own.signal.teacher_top),
            (own.signal.student, own.signal.student_top),
        ):
            assert (sampled <= likeliest[:, 0] + 1e-5).all(), "nothing is likelier than the likeliest"
        assert (own.signal.divergence >= -1e-6).all()
    text = mopd("inspect", str(run.path), "--step", "2", "--problem", told[0].problem, "--tokens")
    assert "bars: divergence" in text and f"rollout {told[0].rollout}" in text
    run.forget_after(1)
    assert run.signal_file(1).exists() and not run.signal_file(2).exists()


@pytest.mark.parametrize(
    "settings",
    [
        ["method=grpo"],
        ["engine=nemo", "nemo.backend=dtensor"],
        ["engine=nemo", "divergence.support=teacher_topk"],
        ["engine=nemo", "train.num_updates_per_step=2"],
    ],
)
def test_token_signal_is_refused_by_name_where_there_is_none(settings: list[str]) -> None:
    with pytest.raises(UserError, match=r"logging\.save_token_signal_every=2"):
        load_config(QUICKSTART, [*settings, "logging.save_token_signal_every=2"])
    load_config(QUICKSTART, ["engine=nemo", "logging.save_token_signal_every=2"])


def test_recovery_answers_every_condition_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file, out = tmp_path / "base.jsonl", tmp_path / "out"
    mopd("eval", "-c", str(QUICKSTART), "data.num_eval=6", "eval.num_samples=8", "--rollouts", str(file))
    command = (
        "analyze", "recovery", "--rollouts", str(file), "--config", str(QUICKSTART), "--samples", "3",
        "--output", str(out), "rollout.num_prompts_per_step=3", "rollout.batch_size=6",
    )  # fmt: skip
    text = mopd(*command)
    assert "control: other problems' peers" in text and "no peers" in text
    result = json.loads((out / "recovery.json").read_text())
    assert 0 < result["num_problems"] <= 6 and len(result["conditions"]) == 10
    assert all(0 <= cells["right"]["mean"] <= 1 for cells in result["conditions"].values())
    written = (out / "written.jsonl").read_bytes()
    (out / "written.jsonl").write_bytes(written[: len(written) // 2])
    mopd(*command)
    assert json.loads((out / "recovery.json").read_text()) == result


def test_branches_of_a_run_go_on_where_they_stopped(runs: dict[str, RunDirectory], tmp_path: Path) -> None:
    run, out = runs["a"], tmp_path / "out"
    file = run.rollouts_file(2)
    command = ("analyze", "branches", "--rollouts", str(file), "--contexts", "1s,1f", "--output", str(out))
    text = mopd(*command)
    assert "1 failure, of other problems" in text.replace("\n", " ") or "of other" in text
    result = json.loads((out / "branches.json").read_text())
    assert "no peers" not in text and result["speaking"], "a model that reads what it wrote after says nothing"
    assert result["about"]["student"] == "embedded:arithmetic", "the weights before step 2 are not kept"
    facts, tables = result["points"]["tokens"], result["near"]["tokens"]["log_ratio"]
    assert set(tables) == {"5", "1"} and 0 < facts["common"] <= facts["with_point"] <= facts["failures"]
    for cells in tables["1"]["common"].values():
        assert 0 <= cells["near"]["low"] <= cells["near"]["mean"] <= cells["near"]["high"] <= 1
    signals = (out / "signals.jsonl").read_bytes()
    (out / "signals.jsonl").write_bytes(signals[: len(signals) // 2])
    mopd(*command)
    again = json.loads((out / "branches.json").read_text())
    assert again["points"] == result["points"] and again["near"]["tokens"].keys() == result["near"]["tokens"].keys()
    for name, cells in tables["5"]["common"].items():
        there = again["near"]["tokens"]["log_ratio"]["5"]["common"][name]["near"]["mean"]
        assert there == pytest.approx(cells["near"]["mean"], abs=1e-4)
    mopd("analyze", "branches", "--rollouts", str(run.path), "--contexts", "1s")
    newest = json.loads((run.path / "branches" / "branches.json").read_text())
    assert newest["about"]["student"] == checkpoints(run.checkpoints)[-1].name


def test_rollouts_of_eval_can_be_analysed(tmp_path: Path) -> None:
    file = tmp_path / "base.jsonl"
    mopd("eval", "-c", str(QUICKSTART), "data.num_eval=3", "eval.num_samples=4", "--rollouts", str(file))
    text = mopd(
        "analyze", "teacher-signal", "--rollouts", str(file), "--config", str(QUICKSTART), "--num-prompts", "2",
        "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert "no peers" in text
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["peers"]["max_context_tokens"] == 1024


def test_diversity_and_cases_and_comparison(runs: dict[str, RunDirectory], tmp_path: Path) -> None:
    a, b = (str(run.path) for run in runs.values())
    assert "self-BLEU-4" in mopd("analyze", "diversity", f"a={a}", f"b={b}", "--output", str(tmp_path / "d"))
    mopd("analyze", "cases", f"a={a}", f"b={b}", "--output", str(tmp_path / "c"), "--pattern", "seven=7")
    assert "seven" in (tmp_path / "c" / "cases.html").read_text()
    mopd("report", a, b, "--output", str(tmp_path / "both.html"))
    assert "peers.failures" in (tmp_path / "both.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze", "teacher-signal", "--rollouts", "nowhere"], "nowhere: neither a rollouts file"),
        (["analyze", "teacher-signal", "--rollouts", "{file}"], "is a file: say where the results go with --output"),
        (["analyze", "teacher-signal", "--rollouts", "{file}", "--output", "{tmp}", "peers.order=random"],
         "add --config"),
        (["analyze", "teacher-signal", "--rollouts", "{config}", "--output", "{tmp}"], "not JSON Lines"),
        (["analyze", "recovery", "--rollouts", "{file}"], "is a file: say where the results go with --output"),
        (["analyze", "branches", "--rollouts", "{file}"], "is a file: say where the results go with --output"),
        (["analyze", "branches", "--rollouts", "{file}", "--contexts", "2x"], "context '2x': write successes"),
        (["analyze", "diversity", "{file}", "--output", "{tmp}"], "write it as LABEL=PATH"),
        (["analyze", "diversity", "a={file}", "a={file}", "--output", "{tmp}"], "stands for two paths"),
        (["analyze", "cases", "a={tmp}", "b={tmp}", "--output", "{tmp}"], "not a run directory"),
        (["analyze", "cases", "a={run}", "--output", "{tmp}"], "compares two runs"),
        (["analyze", "cases", "a={run}", "b={run}", "--output", "{tmp}", "--pattern", "x=("], "not a regular expr"),
        (["analyze", "cases", "a={run}", "b={run}", "--output", "{tmp}", "--pattern", "x"], "NAME=REGEX"),
        (["report", "nowhere"], "nowhere: not a run directory"),
    ],
)  # fmt: skip
def test_bad_input_is_named(
    arguments: list[str],
    message: str,
    runs: dict[str, RunDirectory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = runs["a"]
    file = tmp_path / "rollouts" / "r.jsonl"
    file.parent.mkdir()
    file.write_bytes(run.rollouts_file(2, "eval").read_bytes())
    places = {"file": file, "tmp": tmp_path / "out", "run": run.path, "config": QUICKSTART}
    filled = [argument.format(**places) if "{" in argument else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["mopd", *filled])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
