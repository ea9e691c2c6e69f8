import re
from pathlib import Path

import pytest

from mopd_nemo.analysis.report import setting_differences, write_report
from mopd_nemo.commands.analyze import teacher_signal
from mopd_nemo.config import Config
from mopd_nemo.files import append_row, read_rows, write_rows
from mopd_nemo.run.directory import RunDirectory
from tests.test_trainer import new_run


@pytest.fixture
def empty_run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.at(Config(run_dir=str(tmp_path / "run"), name="<b>empty</b>"))
    run.create(Config(name="<b>empty</b>"))
    return run


def test_report_of_a_run_without_anything(empty_run: RunDirectory) -> None:
    page = write_report([empty_run]).read_text()
    assert "Nothing recorded yet" in page and "<svg" not in page
    assert "&lt;b&gt;empty" in page and "<b>empty" not in page


def test_report_is_self_contained_and_shows_curves_and_contexts(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "train.num_steps=1")
    page = write_report([run]).read_text()
    assert page.count("<svg") >= 8
    assert "held-out mean@2" in page and "A correct solution of this problem" in page
    assert "Verifier outcomes" in page and "Time of a step" in page and "Teacher-signal" not in page
    check_self_contained(page)


def test_report_copes_with_missing_parts(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "train.num_steps=1", "train.eval_every=0", "logging.save_rollouts_every=0")
    page = write_report([run]).read_text()
    assert "held-out" not in page and "What the teacher saw" not in page
    run.metrics_file.unlink()
    assert "Nothing recorded yet" in write_report([run]).read_text()


def check_self_contained(page: str) -> None:
    assert not re.search(r"""(src|href)=["'](?!#)""", page), "nothing may be fetched from elsewhere"
    anchors = set(re.findall(r'<a href="#(\w+)"', page))
    assert anchors <= set(re.findall(r'id="(\w+)"', page)), "every link of the page leads somewhere"


def test_report_shows_the_teacher_signal_of_the_run(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "train.num_steps=1", "eval.num_samples=6")
    teacher_signal(run.path)
    page = write_report([run]).read_text()
    assert 'id="signal"' in page and "control: random peers" in page and "own prompts" in page
    for table in re.findall(r'<table class="wide-table">(.*?)</table>', page, flags=re.DOTALL):
        columns = {len(re.findall(r"<t[hd]", row)) for row in re.findall(r"<tr.*?</tr>", table, flags=re.DOTALL)}
        assert len(columns) == 1, "every row has a cell under every heading"
    check_self_contained(page)


def test_report_of_rows_that_lack_metrics(empty_run: RunDirectory) -> None:
    """Other methods log other metrics; only steps and seconds are always there."""
    phases = ("generate", "reward", "context", "score", "update", "other", "step")
    append_row(empty_run.metrics_file, {"step": 1, **{f"seconds/{phase}": 1.0 for phase in phases}})
    page = write_report([empty_run]).read_text()
    assert "steps done" in page and "Time of a step" in page
    assert "entropy" not in page.split("Settings")[0]


def test_report_of_rollouts_without_a_teacher(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "train.num_steps=1")
    file = run.rollouts_file(1)
    write_rows(file, [{k: v for k, v in row.items() if "teacher" not in k and k != "peers"} for row in read_rows(file)])
    page = write_report([run]).read_text()
    assert "Sample groups" in page and "what the teacher of rollout" not in page and "no teacher" not in page


def test_comparison_overlays_runs_and_says_what_differs(tmp_path: Path) -> None:
    one = new_run(tmp_path / "one", "train.num_steps=2")
    two = new_run(tmp_path / "two", "train.num_steps=1", "peers.failures=1", "train.eval_every=0")
    page = write_report([one, two], tmp_path / "out" / "both.html").read_text()
    assert "<td>peers.failures</td>" in page and "<td>optimizer.learning_rate</td>" not in page
    rows = dict(re.findall(r"<tr><td>(one|two)</td>(.*?)</tr>", page, flags=re.DOTALL))
    assert ">2<" in rows["one"] and "→" in rows["one"]
    assert ">1<" in rows["two"] and "→" not in rows["two"]
    assert page.count("<svg") >= 6
    check_self_contained(page)


def test_comparison_with_a_run_that_has_just_begun(tmp_path: Path, empty_run: RunDirectory) -> None:
    other = RunDirectory(tmp_path / "other" / "run")  # the same directory name
    other.create(Config())
    page = write_report([empty_run, other], tmp_path / "both.html").read_text()
    assert str(empty_run.path) in page and "<svg" not in page


def test_setting_differences_leave_out_what_is_equal() -> None:
    configs = {"a": Config(seed=1), "b": Config(seed=2, name="other", run_dir="x")}
    assert setting_differences(configs) == [["seed", "1", "2"]]
