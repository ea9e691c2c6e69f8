"""The loop as a user runs it: killed, interrupted, continued and made longer."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from mopd_nemo import trainer as trainer_module
from mopd_nemo.analysis.report import write_report
from mopd_nemo.commands.train import HALTED, run_training
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.evaluation import check_votes
from mopd_nemo.files import read_rows
from mopd_nemo.preflight import choice as preflight_choice
from mopd_nemo.run.checkpoints import best_checkpoint, checkpoints, fault
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.guard import Signs
from mopd_nemo.run.stop import StopRequest
from mopd_nemo.trainer import Trainer
from mopd_nemo.types import Problem
from tests.conftest import QUICKSTART

SMALL = [
    "rollout.num_prompts_per_step=4",
    "rollout.num_rollouts_per_prompt=4",
    "data.num_train=16",
    "data.num_eval=4",
    "eval.num_samples=2",
    "peers.order=random",
    "train.num_steps=6",
    "train.eval_every=2",
    "train.checkpoint_every=2",
]


def new_run(path: Path, *overrides: str) -> RunDirectory:
    """A whole run in this process."""
    trainer = Trainer.new(load_config(QUICKSTART, [f"run_dir={path}", *SMALL, *overrides]), Console(file=io.StringIO()))
    assert trainer.fit()
    return trainer.run


def start(*arguments: str) -> subprocess.Popen[str]:
    """A run in a process of its own, to be disturbed."""
    return subprocess.Popen(
        [sys.executable, "-m", "mopd_nemo", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )


def start_new(path: Path, like: RunDirectory) -> subprocess.Popen[str]:
    return start("--config", str(QUICKSTART), f"run_dir={path}", *SMALL, lag_of(like))


def lag_of(run: RunDirectory) -> str:
    return f"rollout.lag={run.read_config().rollout.lag}"


def resume(run: RunDirectory, *overrides: str) -> None:
    assert Trainer.resumed(run, overrides, Console(file=io.StringIO())).fit()


def wait_for_step(process: subprocess.Popen[str], run: RunDirectory, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if run.metrics_file.exists() and len(read_rows(run.metrics_file)) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


def finish_through_kills(process: subprocess.Popen[str], run: RunDirectory, kills: Mapping[int, str]) -> None:
    """Kill a run once it has these steps, and go on each time with this setting, to its end."""
    for step, setting in kills.items():
        wait_for_step(process, run, step)
        process.kill()
        process.communicate()
        process = start("--resume", str(run.path), *([setting] if setting else []))
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per_second"))} for row in rows]


def assert_same_run(a: RunDirectory, b: RunDirectory) -> None:
    for name in ("metrics_file", "eval_file"):
        assert without_times(a.rows(getattr(a, name))) == without_times(b.rows(getattr(b, name)))
    assert [f.name for f in sorted(a.rollouts.iterdir())] == [f.name for f in sorted(b.rollouts.iterdir())]
    for file in a.rollouts.iterdir():
        assert read_rows(file) == read_rows(b.rollouts / file.name)
    last_a, last_b = checkpoints(a.checkpoints)[-1], checkpoints(b.checkpoints)[-1]
    assert last_a.name == last_b.name
    for weights in ("model.safetensors", "teacher/model.safetensors"):
        tensors_a, tensors_b = load_file(last_a / weights), load_file(last_b / weights)
        assert all(torch.equal(tensors_a[name], tensors_b[name]) for name in tensors_a)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that nobody disturbed."""
    return new_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def lagging_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The same one step off, so that rollouts are in flight at every moment."""
    return new_run(tmp_path_factory.mktemp("lagging") / "run", "rollout.lag=1")


@pytest.fixture(params=["whole_run", "lagging_run"])
def undisturbed(request: pytest.FixtureRequest) -> RunDirectory:
    return request.getfixturevalue(request.param)


def test_run_directory_is_complete(whole_run: RunDirectory) -> None:
    metrics = read_rows(whole_run.metrics_file)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in read_rows(whole_run.eval_file)] == [0, 2, 4, 6]
    assert all(0 < row["signal"] <= 1 and row["loss"] > 0 and row["sampler/gap"] < 1e-4 for row in metrics)
    row = read_rows(whole_run.rollouts_file(1))[0]
    assert {"prompt", "response", "reward", "outcome", "peers", "teacher_prompt"} <= row.keys()
    assert [c.name for c in checkpoints(whole_run.checkpoints)] == ["step_000004", "step_000006"]
    assert whole_run.read_config().train.num_steps == 6


def test_warm_up_ends_at_its_step_and_starts_above_zero(whole_run: RunDirectory) -> None:
    config = whole_run.read_config().optimizer
    rates = [row["learning_rate"] for row in read_rows(whole_run.metrics_file)]
    assert rates == pytest.approx([config.learning_rate * min(1, s / config.warmup_steps) for s in range(1, 7)])


def test_ever_solved_counts_problems_once(whole_run: RunDirectory) -> None:
    solved: set[str] = set()
    for row in read_rows(whole_run.metrics_file):
        rollouts = read_rows(whole_run.rollouts_file(row["step"]))
        solved |= {rollout["problem"] for rollout in rollouts if rollout["outcome"] == "correct"}
        assert row["ever_solved"] == len(solved)


def test_run_killed_at_any_moment_equals_an_undisturbed_one(undisturbed: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    moments = (1, 3, 5)  # before the first checkpoint, between two, and right after an evaluation
    finish_through_kills(start_new(run.path, undisturbed), run, dict.fromkeys(moments, ""))
    assert_same_run(undisturbed, run)


def test_interrupt_saves_and_the_run_goes_on_from_there(undisturbed: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    process = start_new(run.path, undisturbed)
    wait_for_step(process, run, 1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert f"mopd train --resume {run.path}" in output
    assert "<svg" in run.report_file.read_text()
    done = len(read_rows(run.metrics_file))
    assert done < 6 and checkpoints(run.checkpoints)[-1].name == f"step_{done:06d}"
    resume(run)
    assert_same_run(undisturbed, run)


def test_run_with_a_deadline_stops_before_the_step_that_would_miss_it(
    undisturbed: RunDirectory, tmp_path: Path
) -> None:
    """On a clock by which a step takes ten seconds, and nothing else any time."""
    config = load_config(QUICKSTART, [f"run_dir={tmp_path / 'run'}", *SMALL, lag_of(undisturbed)])
    screen = io.StringIO()
    trainer = Trainer.new(config, Console(file=screen))
    trainer.stop = StopRequest(39.0, 0.0, trainer.display.notice, clock=lambda: 10.0 * trainer.step)
    assert not trainer.fit()
    assert checkpoints(trainer.run.checkpoints)[-1].name == "step_000003"
    assert trainer.stop.reason is signal.SIGUSR1 and "train.checkpoint_must_save_by" in screen.getvalue()
    resume(trainer.run)
    assert_same_run(undisturbed, trainer.run)


def test_deadline_ends_the_command_like_the_signal_of_a_batch_system(tmp_path: Path) -> None:
    process = start(
        "--config", str(QUICKSTART), f"run_dir={tmp_path / 'run'}", *SMALL, "train.checkpoint_must_save_by=00:00:00:00"
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGUSR1, output
    assert f"mopd train --resume {tmp_path / 'run'}" in output and "Traceback" not in output
    assert (tmp_path / "run" / "checkpoints" / "step_000000" / "trainer.json").is_file()


def test_half_written_checkpoint_is_never_picked(whole_run: RunDirectory, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "train.num_steps=4")
    partial = run.checkpoints / ".partial-000006"
    partial.mkdir()
    (partial / "trainer.json").write_text('{"step": 6')
    resume(run, "train.num_steps=6")  # and a run can be made longer
    assert_same_run(whole_run, run)
    assert not partial.exists()


def test_run_directory_in_use_is_refused(whole_run: RunDirectory) -> None:
    with pytest.raises(UserError, match="holds a run already; continue it with `mopd train --resume"):
        new_run(whole_run.path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.num_prompts_per_step=17", "more than the 16 problems of data.train=arithmetic"),
        ("data.max_prompt_tokens=10", "has a prompt of .* tokens, over data.max_prompt_tokens=10"),
        ("data.train=missing.jsonl", "data.train=missing.jsonl: no such file"),
        ("model.path=embedded:nothing", "embedded models: embedded:arithmetic"),
    ],
)
def test_bad_input_leaves_no_run_directory(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        new_run(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_real_gsm8k_rows_train_a_random_model(shared_data: Path, random_model: Path, tmp_path: Path) -> None:
    """One step on real problems through any model directory."""
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:6]]
    problems = tmp_path / "gsm8k.jsonl"
    with problems.open("w") as out:
        for number, row in enumerate(rows):
            answer = row["answer"].rsplit("####", 1)[1].strip()
            prompt = f"{row['question']}\nEnd with \\boxed{{answer}}."
            out.write(json.dumps({"id": number, "prompt": prompt, "answer": answer, "task": "math"}) + "\n")
    run = new_run(
        tmp_path / "run",
        f"data.train={problems}",
        f"data.eval={problems}",
        f"model.path={random_model}",
        "data.max_prompt_tokens=1000",
        "peers.max_context_tokens=2000",
        "peers.failures=1",
        "peers.when_no_success=failure_only",
        "train.num_steps=1",
    )
    (row,) = read_rows(run.metrics_file)
    assert row["loss"] > 0 and row["signal"] == 1.0 and row["grad_norm"] > 0


MEASURED = ("peers.choose=measured", "peers.choose_every=3", "peers.choose_problems=8", "peers.choose_from=[1s,1s+1f]")


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that measures its peers before steps 1 and 4, between checkpoints too."""
    return new_run(tmp_path_factory.mktemp("measured") / "run", *MEASURED)


def test_measured_peers_are_recorded_and_shown(measured_run: RunDirectory) -> None:
    rows = read_rows(measured_run.choices_file)
    assert [row["step"] for row in rows] == [0, 3]
    for row in rows:
        shown = {
            tuple(sorted(peer["kind"] for peer in rollout["peers"]))
            for rollout in read_rows(measured_run.rollouts_file(row["step"] + 1))
        }
        most = {"1s": ("success",), "1s+1f": ("failure", "success")}.get(
            row["context"], ("failure", "success", "success")
        )
        assert max(shown, key=len) == most
    write_report([measured_run])
    page = measured_run.report_file.read_text()
    assert "Choice of peers" in page and "peers: measured" in page


def test_peers_are_measured_while_rollouts_are_in_flight(tmp_path: Path, measured_run: RunDirectory) -> None:
    """By the student's present weights, not by those that draw: the first choice is that of a run without a lag."""
    run = new_run(tmp_path / "run", *MEASURED, "rollout.lag=1")
    choices = [without_times(read_rows(each.choices_file)) for each in (run, measured_run)]
    assert [row["step"] for row in choices[0]] == [0, 3] and choices[0][0] == choices[1][0]
    assert [row["rollout/lag"] for row in read_rows(run.metrics_file)] == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("choice", [1, 2])
def test_run_killed_during_a_measurement_equals_an_undisturbed_one(
    choice: int, measured_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    started, whole = [], preflight_choice.measure

    def killed(*arguments: Any) -> Any:
        started.append(1)
        for number, row in enumerate(whole(*arguments)):
            if len(started) == choice and number == 5:
                raise KilledError
            yield row

    path = tmp_path / "run"
    settings = load_config(QUICKSTART, [f"run_dir={path}", *SMALL, *MEASURED])
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(preflight_choice, "measure", killed)
        Trainer.new(settings, Console(file=io.StringIO())).fit()
    run = RunDirectory.open(path)
    resume(run)
    assert_same_run(measured_run, run)
    assert without_times(read_rows(run.choices_file)) == without_times(read_rows(measured_run.choices_file))


def test_the_guard_stops_at_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ruined_from_4(rows: Any, _evaluations: Any) -> Signs:
        step = rows[-1]["step"] if rows else 0
        return Signs({"guard/alarm": float(step >= 5)}, ("success fell",) if step >= 3 else (), step >= 5, 2)

    monkeypatch.setattr(trainer_module, "signs", ruined_from_4)
    overrides = [f"run_dir={tmp_path / 'run'}", *SMALL, "train.keep_checkpoints=1", "guard.action=stop"]
    config = tmp_path / "config.yaml"
    config.write_text(f"defaults: {QUICKSTART}\n")
    assert run_training(config, None, overrides) == HALTED
    run = RunDirectory.open(tmp_path / "run")
    assert [row["step"] for row in read_rows(run.metrics_file)] == [1, 2, 3, 4, 5]
    assert [c.name for c in checkpoints(run.checkpoints)] == ["step_000002", "step_000004"]
    text = " ".join(capsys.readouterr().out.split())
    assert "WARNING, step 5: success fell" in text and "step_000002" in text and "guard.action=warn" in text


RATES = {0: 0.9, 2: 0.3, 4: 0.5, 5: 0.5, 6: 0.4}
"""Held-out accuracy by step, for tests of the best checkpoint: the model before training beats all others."""
BEST = ["train.keep_best=mean@2", "train.keep_checkpoints=1", "train.checkpoint_every=3"]


@pytest.fixture
def rated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations give `RATES`."""
    write = Trainer._write

    def rate(trainer: Trainer, name: str, file: Path, row: dict[str, Any]) -> None:
        write(trainer, name, file, row | ({"mean@2": RATES[row["step"]]} if name == "evaluations" else {}))

    monkeypatch.setattr(Trainer, "_write", rate)


@pytest.mark.parametrize("moment", [("save_checkpoint", 4), ("prune", 4), ("prune", 6), ("evaluate", 6)])
def test_the_best_checkpoint_survives_pruning_and_kills(
    moment: tuple[str, int], rated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    undisturbed = new_run(tmp_path / "undisturbed", *BEST)
    name, step = moment
    module = trainer_module if name == "evaluate" else trainer_module.saved
    trainer = Trainer.new(
        load_config(QUICKSTART, [f"run_dir={tmp_path / 'run'}", *SMALL, *BEST]), Console(file=io.StringIO())
    )
    whole = getattr(module, name)

    def killed(*arguments: Any, **more: Any) -> Any:
        if trainer.step == step:
            raise KilledError
        return whole(*arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(module, name, killed)
        trainer.fit()
    run = RunDirectory.open(tmp_path / "run")
    resume(run)
    assert_same_run(undisturbed, run)
    for each in (undisturbed, run):
        assert [path.name for path in checkpoints(each.checkpoints)] == ["step_000004", "step_000006"]
        path, row = best_checkpoint(each)
        assert path.name == "step_000004" and row["mean@2"] == 0.5 and fault(path) == ""
        assert load_file(path / "model.safetensors").keys()
    write_report([run])
    assert "best checkpoint by mean@2: step_000004" in run.report_file.read_text()


def test_an_equal_evaluation_replaces_no_best_checkpoint(rated: None, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", *BEST, "train.num_steps=5")
    assert best_checkpoint(run)[0].name == "step_000004"
    assert [path.name for path in checkpoints(run.checkpoints)] == ["step_000004", "step_000005"]


def test_a_damaged_best_checkpoint_is_named(rated: None, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", *BEST, "train.num_steps=5")
    (run.checkpoints / "step_000004" / "trainer.json").unlink()
    with pytest.raises(UserError, match=r"step_000004: the best checkpoint by mean@2 is not intact: trainer.json"):
        best_checkpoint(run)
    (run.checkpoints / "step_000005").rename(tmp_path / "aside")
    run.eval_file.write_text("")
    with pytest.raises(UserError, match=r"no evaluation after step 0 has a checkpoint yet \(train.keep_best=mean@2\)"):
        best_checkpoint(run)
    with pytest.raises(UserError, match=r"keeps no best checkpoint; set train.keep_best"):
        best_checkpoint(new_run(tmp_path / "without", "train.num_steps=1", "train.eval_every=0"))


def test_a_vote_that_nobody_takes_is_no_measure_of_the_best() -> None:
    config = load_config(QUICKSTART, ["train.keep_best=maj@2", "eval.num_samples=2"])
    program = Problem("p", ({"role": "user", "content": "write it"},), {}, "code")
    with pytest.raises(UserError, match=r"train.keep_best=maj@2: no task of data.eval=.* choose mean@2"):
        check_votes(config, [program])


def test_a_healthy_run_is_not_warned_of(whole_run: RunDirectory) -> None:
    assert all(row["guard/alarm"] == 0.0 for row in read_rows(whole_run.metrics_file))


def said_on_resume(run: RunDirectory, *overrides: str) -> str:
    console = Console(file=io.StringIO(), width=300)
    assert Trainer.resumed(run, overrides, console).fit()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_resume_says_what_has_changed_and_what_is_missing(tmp_path: Path) -> None:
    data = tmp_path / "problems.jsonl"
    rows = [{"id": f"p{n}", "prompt": f"{n}+1?", "answer": str(n + 1), "task": "arithmetic"} for n in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = new_run(tmp_path / "run", f"data.train={data}", "train.num_steps=2")
    assert "WARNING" not in said_on_resume(run) and "changed" not in said_on_resume(run)
    data.write_text("".join(json.dumps(row) + "\n" for row in [{**rows[0], "answer": "2"}, *rows[2:]]))
    run.metrics_file.unlink()
    run.eval_file.write_text("".join(run.eval_file.read_text().splitlines(keepends=True)[1:]))
    said = said_on_resume(run, "seed=1", "train.num_steps=3")
    assert "changed since the run began: seed: 0 → 1" in said and "train.num_steps: 2 → 3" in said
    assert "the problems of data.train are not those of this run so far: 1 gone, 1 changed" in said
    assert "metrics.jsonl lacks rows of steps 1 to 2;" in said and "eval.jsonl lacks rows of steps 0;" in said


def test_a_run_without_any_signal_says_so(tmp_path: Path) -> None:
    data = tmp_path / "impossible.jsonl"
    rows = [{"id": f"p{n}", "prompt": f"{n}+1?", "answer": "no digit", "task": "arithmetic"} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"run_dir={tmp_path / 'run'}", *SMALL, f"data.train={data}", "train.eval_every=0"]
    console = Console(file=io.StringIO(), width=300)
    assert Trainer.new(load_config(QUICKSTART, settings), console).fit()
    assert isinstance(console.file, io.StringIO)
    assert "WARNING, step 5: nothing was learned in the last 5 steps: no rollout succeeds" in console.file.getvalue()
