"""`mopd preflight` as a person types it: measured, stopped, continued, refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mopd_nemo import engines
from mopd_nemo.cli import main
from mopd_nemo.config.load import load_config
from mopd_nemo.files import read_rows
from mopd_nemo.preflight.contexts import name_of
from tests.commands.test_cli import mopd
from tests.conftest import QUICKSTART
from tests.test_trainer import new_run

SMALL = ("preflight", "-c", str(QUICKSTART), "rollout.num_prompts_per_step=4", "rollout.batch_size=16")
ASKED = ("--contexts", "1s,1f", "--problems", "8", "--samples", "4")


def measured(directory: Path) -> dict[str, Any]:
    """The result without what depends on the machine."""
    result = json.loads((directory / "preflight.json").read_text())
    for cells in result["contexts"].values():
        cells.pop("teacher_seconds", None)
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("preflight") / "whole"
    text = mopd(*SMALL, *ASKED, "--output", str(directory))
    assert "no peers" in text and "preflight.html" in text
    return directory


def test_the_result_is_a_table_a_page_and_figures(whole: Path) -> None:
    result = measured(whole)
    assert result["num_problems"] == 8 and list(result["contexts"]) == ["none", "1s", "1f"]
    base = whole / "mine.yaml"
    base.write_text(f"defaults: [{QUICKSTART}, settings.yaml]\n")
    peers = load_config(base).peers
    assert name_of(peers) == result["recommendation"]["context"]
    assert result["contexts"]["1s"]["gap"]["num"] == 8 and result["contexts"]["1s"]["auc"]["mean"] is not None
    assert result["configured"] == "2s" and result["recommendation"]["sentences"]
    page = (whole / "preflight.html").read_text()
    assert "<svg" in page and result["recommendation"]["sentences"][0] in page.replace("&#39;", "'")
    assert len(read_rows(whole / "written.jsonl")) == 8 * 3


def test_a_measurement_that_was_killed_goes_on_and_gives_the_same(whole: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "rollouts.jsonl", "written.jsonl"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    sampled = (tmp_path / "rollouts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rollouts.jsonl").write_text("".join(sampled[:32]))  # one step of 4 problems × 8
    written = (tmp_path / "written.jsonl").read_bytes()
    (tmp_path / "written.jsonl").write_bytes(written[: len(written) // 3])  # in the middle of a line
    mopd(*SMALL, *ASKED, "--output", str(tmp_path))
    assert measured(tmp_path) == measured(whole)


def test_what_was_measured_with_other_settings_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, *SMALL, "--contexts", "1s", "--problems", "8", "--samples", "4", "--output", str(whole))
    assert "made with other values of contexts; choose another --output, or begin anew with --restart" in error


def test_the_groups_of_a_run_can_be_taken(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "train.num_steps=1", "rollout.num_rollouts_per_prompt=8")
    text = mopd(*SMALL, "--contexts", "1s", "--rollouts", str(run.rollouts_file(1)), "--output", str(tmp_path / "out"))
    assert "Cannot tell" in text  # four problems
    assert not (tmp_path / "out" / "rollouts.jsonl").exists()
    assert measured(tmp_path / "out")["num_groups"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "2x"], "context '2x': write successes and failures as in"),
        (["--contexts", "9s"], "context 9s needs 9 peers beside the target"),
        (["divergence.contrast=1", "peers.failures=1"], "set divergence.contrast=0"),
        (["method=grpo"], "method=grpo has no choice of peers to make"),
        (["context=[privileged]"], "context=[privileged]: preflight compares peers, and this context shows none"),
        (["method=sdpo"], "method=sdpo has no choice of peers to make"),
        (["teacher.kind=external", "teacher.path=x"], "set teacher.kind=live and model.path to it"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["--rollouts", "nowhere"], "nowhere: neither a rollouts file"),
        (["data.num_train=3"], "is more than the 3 problems"),
        (["peers.sucesses=1"], "did you mean peers.successes?"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "make_engine", lambda _: pytest.fail("a model was loaded"))
    assert message in refused(capsys, *SMALL, *arguments)


def test_a_file_without_the_peers_of_a_context_is_refused(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "make_engine", lambda _: pytest.fail("a model was loaded"))
    file = whole / "rollouts.jsonl"
    error = refused(capsys, *SMALL, "--contexts", "7s", "--rollouts", str(file), "--output", str(tmp_path))
    assert "has the peers of context 7s beside a target" in error and str(file) in error


def test_other_sources_of_the_context_are_measured_and_named(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ("context=[peers,privileged]", "--contexts", "1s", "--problems", "8", "--samples", "2")
    text = mopd(*SMALL, *told, "--output", str(tmp_path / "out"))
    assert "Each context also shows privileged" in " ".join(text.split())
    rows = read_rows(tmp_path / "out" / "written.jsonl")
    assert all(("This is known about the problem" in row["prompt"]) == (row["context"] == "1s") for row in rows)
    asked = (*told[:1], "--contexts", "1s", "--rollouts", str(whole / "rollouts.jsonl"), "--output", str(tmp_path))
    assert "rollouts.jsonl: its rows have no privileged text" in refused(capsys, *SMALL, *asked)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["mopd", *arguments])
        main()
    assert exit_.value.code == 2
    return capsys.readouterr().err
