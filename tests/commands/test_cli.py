"""The `mopd` command as a person types it."""

import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mopd_nemo.cli import app, main
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.files import read_rows
from mopd_nemo.run.directory import RunDirectory
from tests.conftest import QUICKSTART
from tests.test_trainer import new_run

runner = CliRunner()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return new_run(tmp_path_factory.mktemp("cli") / "run", "train.num_steps=1")


def mopd(*arguments: str) -> str:
    result = runner.invoke(app, arguments, env={"COLUMNS": "160"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_help_explains_every_command() -> None:
    text = mopd("--help")
    for command in ("train", "eval", "inspect", "report", "doctor"):
        assert re.search(rf"{command}\s+\w", text)
        assert "Usage" in mopd(command, "--help")


def test_inspect_lists_problems_then_shows_what_the_teacher_read(run: RunDirectory) -> None:
    listing = mopd("inspect", str(run.path))
    command = shlex.split(listing.strip().splitlines()[-1])
    text = mopd(*command[1:])
    assert "student prompt" in text and "what the teachers read" in text
    assert "A correct solution of this problem" in text


def test_commands_to_copy_are_quoted_for_the_shell(run: RunDirectory, tmp_path: Path) -> None:
    odd = tmp_path / "it's <b>a</b> & [red]run"
    shutil.copytree(run.path, odd)
    listing = mopd("inspect", str(odd))
    assert shlex.split(listing.strip().splitlines()[-1])[:3] == ["mopd", "inspect", str(odd)]
    mopd("report", str(odd))
    said = html.unescape((odd / "report.html").read_text())
    assert f"<code>mopd inspect {shlex.quote(str(odd))}</code>" in said
    assert f"<code>mopd inspect {odd}" not in said
    with pytest.raises(UserError) as refused:
        RunDirectory(odd).check_unused()
    assert f"mopd train --resume {shlex.quote(str(odd))}`" in str(refused.value)


@pytest.mark.parametrize("kept", [0, 100])
def test_a_damaged_file_of_token_signal_is_named(run: RunDirectory, tmp_path: Path, kept: int) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    file = RunDirectory(tmp_path / "run").signal_file(1)
    file.write_bytes(b"PK\3\4".ljust(kept, b"x")[:kept])
    result = runner.invoke(app, ["report", str(tmp_path / "run")])
    assert isinstance(result.exception, UserError) and f"{file}: damaged" in str(result.exception)


def test_eval_prints_and_writes_metrics(run: RunDirectory, tmp_path: Path) -> None:
    output = tmp_path / "out" / "metrics.json"
    checkpoint = run.checkpoints / "step_000001"
    text = mopd(
        "eval", "-c", str(QUICKSTART), "data.num_eval=2", "eval.num_samples=2",
        "--checkpoint", str(checkpoint), "--output", str(output),
    )  # fmt: skip
    metrics = json.loads(output.read_text())
    assert "mean@2" in text and 0 <= metrics["mean@2"] <= 1 and metrics["num_problems"] == 2


def test_export_takes_the_model_alone_out_of_a_run(run: RunDirectory, tmp_path: Path) -> None:
    output = tmp_path / "model"
    assert str(output) in mopd("export", str(run.path), "-o", str(output))
    checkpoint = run.checkpoints / "step_000001"
    weights = "model.safetensors"
    assert (output / weights).read_bytes() == (checkpoint / weights).read_bytes()
    beside = {path.name for path in checkpoint.iterdir()} - {path.name for path in output.iterdir()}
    assert beside == {"manifest.json", "trainer.json", "optimizer.pt", "teacher"}
    assert (output / "tokenizer.json").is_file()


def test_report_can_be_written_again(run: RunDirectory) -> None:
    run.report_file.unlink(missing_ok=True)
    assert str(run.report_file) in mopd("report", str(run.path))
    assert run.report_file.exists()


def test_doctor_names_every_part() -> None:
    text = mopd("doctor")
    for part in (
        "torch", "GPU", "transformers", "ray", "nemo_rl", "megatron-core", "transformer-engine", "apex", "vllm",
        "wandb", "Slurm", "sandbox",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "give either --config"),
        (["train", "-c", "no.yaml"], "no.yaml: no such config file"),
        (["train", "-c", str(QUICKSTART), "teacher.knd=ema"], "did you mean teacher.kind"),
        (["train", "--resume", "nowhere"], "nowhere: not a run directory"),
        (["inspect", "nowhere"], "nowhere: not a run directory"),
        (["eval", "-c", str(QUICKSTART), "--checkpoint", "nowhere"], "no config.json in it"),
        (["export", "nowhere", "-o", "model"], "nowhere: no config.json and no policy/config.yaml in it; name a run"),
        (["export", "nowhere", "-o", str(QUICKSTART)], "exists; choose a directory that does not"),
    ],
)
def test_bad_input_ends_with_its_message_and_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mopd", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_eval_takes_the_best_checkpoint_of_a_run(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["eval", "-c", str(QUICKSTART), "--checkpoint", str(run.path)]
    monkeypatch.setattr(sys, "argv", ["mopd", *config])
    with pytest.raises(SystemExit):
        main()
    assert "keeps no best checkpoint; set train.keep_best, or name a checkpoint" in capsys.readouterr().err


def test_inspect_names_what_there_is(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, message in ((["--step", "9"], "recorded: 1"), (["--problem", "x"], "that step has: arithmetic/")):
        monkeypatch.setattr(sys, "argv", ["mopd", "inspect", str(run.path), *arguments])
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "message"),
    [("mopd", "train with logging.save_token_signal_every=1"), ("grpo", "method=grpo has no teacher")],
)
def test_inspect_says_how_tokens_can_be_seen(
    method: str,
    message: str,
    run: RunDirectory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "run")))
    run.write_config(load_config(QUICKSTART, [f"method={method}"]))
    problem = read_rows(run.rollouts_file(1))[0]["problem"]
    monkeypatch.setattr(sys, "argv", ["mopd", "inspect", str(run.path), "--problem", problem, "--tokens"])
    with pytest.raises(SystemExit):
        main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_importing_the_package_is_cheap() -> None:
    code = """
import sys, time
started = time.perf_counter()
import mopd_nemo
print(time.perf_counter() - started, "torch" in sys.modules)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch = answer.stdout.split()
    assert float(seconds) < 0.2 and torch == "False"


@pytest.mark.parametrize(
    ("set_by_user", "spins"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_do_not_wait_without_end_unless_the_user_says_how(
    set_by_user: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["mopd", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
    os.environ.pop("GOMP_SPINCOUNT", None)
