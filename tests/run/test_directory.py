from pathlib import Path

import pytest

from mopd_nemo.config import Config, UserError
from mopd_nemo.run.directory import RunDirectory, append_row, read_rows, write_rows


def test_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append_row(file, {"step": 1})
    append_row(file, {"step": 2, "text": "ümlaut"})
    with file.open("a") as out:
        out.write('{"step": 3, "te')
    assert read_rows(file) == [{"step": 1}, {"step": 2, "text": "ümlaut"}]


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
