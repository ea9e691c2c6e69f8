from pathlib import Path

import pytest

from mopd_nemo.config import Config, UserError
from mopd_nemo.files import read_rows, write_rows
from mopd_nemo.run.directory import RunDirectory


def test_forget_drops_later_steps_everywhere(tmp_path: Path) -> None:
    run = RunDirectory.at(Config(run_dir=str(tmp_path / "run")))
    run.create(Config())
    for file in (run.metrics_file, run.eval_file):
        write_rows(file, [{"step": step} for step in range(5)])
    for step in range(5):
        write_rows(run.rollouts_file(step), [])
        write_rows(run.rollouts_file(step, "eval"), [])
    run.forget_after(2)
    assert read_rows(run.metrics_file) == read_rows(run.eval_file) == [{"step": step} for step in range(3)]
    assert len(list(run.rollouts.iterdir())) == 6


def test_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir=.*cannot write there: .*; choose another run_dir"):
        RunDirectory(tmp_path / "file" / "run").create(Config())


def test_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory.open(tmp_path)
