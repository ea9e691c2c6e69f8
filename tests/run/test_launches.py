import sys
from pathlib import Path

import pytest

import mopd_nemo
from mopd_nemo.config import Config
from mopd_nemo.config.load import load_config
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.launches import record_launch, this_launch
from tests.conftest import QUICKSTART

REPOSITORY = QUICKSTART.parents[1]


def test_every_process_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mopd", "train", "name=a b"])
    run = RunDirectory(tmp_path)
    record_launch(run, Config(), 0)
    monkeypatch.setattr(sys, "argv", ["a_program_of_mine.py"])
    record_launch(run, Config(), 7)
    first, second = run.rows(run.launches_file)
    assert (first["step"], second["step"]) == (0, 7)
    assert first["command"] == "mopd train 'name=a b'" and second["command"] is None
    assert first["versions"]["mopd-nemo"] == mopd_nemo.__version__ and first["gpus"] == 0


def test_a_torn_row_is_healed(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    record_launch(run, Config(), 0)
    run.launches_file.write_bytes(run.launches_file.read_bytes() + b'{"step": 3, "sta')
    record_launch(run, Config(), 5)
    assert [row["step"] for row in run.rows(run.launches_file)] == [0, 5]


def test_a_checkout_of_something_else_is_not_our_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package may lie inside of another project's checkout."""
    (tmp_path / ".git").mkdir()
    site = tmp_path / "venv" / "mopd_nemo"
    monkeypatch.setattr(mopd_nemo, "__file__", str(site / "__init__.py"))
    assert this_launch(Config())["commit"] is None


def test_gpus_of_a_cluster_are_those_of_the_config() -> None:
    config = load_config(REPOSITORY / "configs/nemo/mopd-qwen3-4b-self-1n8g-megatron-tp2.yaml")
    launch = this_launch(config)
    assert launch["gpus"] == 8 and launch["hardware"] == "1 x 8 GPUs"
