import re
import sys
from pathlib import Path

import numpy as np
import pytest

from mopd_nemo.analysis import groups
from mopd_nemo.analysis.card import model_card
from mopd_nemo.analysis.compare import compare
from mopd_nemo.analysis.report import setting_differences, write_report
from mopd_nemo.analysis.tokens import one_line
from mopd_nemo.commands.analyze import teacher_signal
from mopd_nemo.config import Config, UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.files import append_row, read_rows, write_rows
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.token_signal import read_token_signal
from tests.browser import Browser
from tests.conftest import QUICKSTART
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


@pytest.mark.parametrize("setting", ["context=[peers,'gone:hints']", "method=gone:Own"])
def test_a_run_is_read_without_the_code_of_the_user_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "gone.py").write_text(
        "from mopd_nemo.methods.mopd import Mopd\n\n\ndef hints(group, target):\n    return [('Hint:', 'add')]\n\n\n"
        "class Own(Mopd):\n    pass\n"
    )
    with monkeypatch.context() as patch:
        patch.syspath_prepend(code)
        run = new_run(tmp_path / "run", "train.num_steps=1", setting)
    (code / "gone.py").unlink()
    monkeypatch.delitem(sys.modules, "gone")
    page = write_report([run]).read_text()
    assert "held-out mean@2" in page and "gone:" in page
    assert setting.startswith("method") or "reads 2 successes and 0 failures, gone:hints" in page
    assert f"method `{run.read_config().method}`" in model_card(run, 1, "m")
    compare([run.path], None, 0.02)
    with pytest.raises(UserError, match="there is no module gone"):
        run.load_config()


def check_self_contained(page: str) -> None:
    assert not re.search(r"""src=["']|<link|@import|url\((?!#)""", page), "nothing may be fetched from elsewhere"
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


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of four steps that has recorded the signal of the second and the fourth."""
    path = tmp_path_factory.mktemp("told") / "run"
    return new_run(path, "train.num_steps=4", "logging.save_token_signal_every=2", "train.eval_every=2")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_token_of_the_report_has_the_numbers_that_were_recorded(
    browser: Browser, told: RunDirectory, tmp_path: Path, width: int
) -> None:
    page = write_report([told], tmp_path / "report.html")
    check_self_contained(page.read_text())
    browser.open(page, width)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
    closed = "[...document.querySelectorAll('details.group')].findIndex(group => !group.open)"
    group = f"document.querySelectorAll('details.group')[{browser.evaluate(closed)}]"
    browser.evaluate(f"{group}.querySelector('summary').click()")
    browser.evaluate(f"{group}.querySelector('.tokens').id = 'looked-at'")
    browser.hover("#looked-at i:nth-child(3)")
    shown = browser.evaluate("document.getElementById('token').innerText").replace("−", "-")
    problem = browser.evaluate(f"{group}.querySelector('summary').firstChild.textContent").strip()
    rollout = int(browser.evaluate("document.getElementById('looked-at').parentNode.querySelector('b').innerText"))
    own = next(
        own
        for file in told.signal_files().values()
        for own in read_token_signal(file)
        if (own.problem, own.rollout) == (problem, rollout)
    )
    signal = own.signal
    assert f"token 3 of {len(own.texts)}" in shown
    for value in (signal.student[2], signal.teacher[2], signal.advantage[2]):
        assert f"{value:.3f}" in shown
    (divergence,) = re.findall(r"divergence\s+(\S+)", shown)
    assert float(divergence) == pytest.approx(float(signal.divergence[2]), rel=0.06, abs=1e-9)
    for ids, logprobs in ((signal.student_top_ids, signal.student_top), (signal.teacher_top_ids, signal.teacher_top)):
        name, share = one_line(own.names[int(ids[2, 0])]), 100 * round(float(np.exp(logprobs[2, 0])), 4)
        assert f"{name} {share:.1f} %" in shown


def test_tokens_can_be_read_with_the_keyboard_alone(browser: Browser, told: RunDirectory, tmp_path: Path) -> None:
    browser.open(write_report([told], tmp_path / "report.html"), 1280)
    for _ in range(40):
        browser.press("Tab")
        if browser.evaluate("document.activeElement.matches('.tokens')"):
            break
    text = "document.getElementById('token').innerText"
    assert "token 1 of" in browser.evaluate(text)
    browser.press("ArrowRight")
    assert "token 2 of" in browser.evaluate(text)
    browser.press("Escape")
    assert browser.evaluate("document.getElementById('token').hidden")


def test_tokens_of_a_page_are_bounded_and_the_page_says_so(
    told: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(groups, "TOKENS", 100)
    monkeypatch.setattr(groups, "TOKENS_OF_RESPONSE", 20)
    page = write_report([told], tmp_path / "report.html").read_text()
    assert "On this page: 100 tokens, and never more than 100;" in page and "of these groups are left out" in page
    assert re.search(r"first 20 of \d+ tokens", page)
    assert sum(text.count("</i>") for text in re.findall(r'<pre class="tokens".*?</pre>', page, flags=re.DOTALL)) == 100
    steps = [int(step) for step in re.findall(r"<h3>Step (\d+)</h3>", page)]
    assert steps == [2, 4], "the first and the last recorded step"


def test_report_says_which_setting_records_tokens(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "train.num_steps=1")
    page = write_report([run]).read_text()
    assert "logging.save_token_signal_every=N" in page and "token-data" not in page
    run.write_config(load_config(QUICKSTART, ["method=grpo"]))
    page = write_report([run]).read_text()
    assert "has no teacher" in page and "save_token_signal_every=N" not in page


def test_report_of_rows_that_lack_metrics(empty_run: RunDirectory) -> None:
    """Other methods log other metrics; only steps and seconds are always there."""
    phases = ("generate", "reward", "context", "score", "update", "other", "step")
    append_row(empty_run.metrics_file, {"step": 1, **{f"seconds/{phase}": 1.0 for phase in phases}})
    page = write_report([empty_run]).read_text()
    assert "Time of a step" in page and "Whether it works is unknown: no evaluation is done yet" in page
    assert "nats per token" not in page


def test_report_of_rollouts_without_a_teacher(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", "train.num_steps=1")
    file = run.rollouts_file(1)
    untaught = {"teacher_prompt": None, "peers": [], "sources": []}
    write_rows(file, [row | untaught for row in read_rows(file)])
    page = write_report([run]).read_text()
    assert "Sample groups" in page and "what the teacher of rollout" not in page and "no teacher" not in page


def write_and_keep(run: RunDirectory) -> RunDirectory:
    write_report([run])
    return run


def test_comparison_overlays_runs_and_says_what_differs(tmp_path: Path) -> None:
    one = new_run(tmp_path / "one", "train.num_steps=2")
    two = new_run(tmp_path / "two", "train.num_steps=1", "peers.failures=1", "train.eval_every=0")
    page = write_report([one, two], tmp_path / "out" / "both.html").read_text()
    differing, shared = page.split("What they share")
    assert "<td>peers.failures</td>" in differing and "<td>optimizer.learning_rate</td>" not in differing
    rows = dict(re.findall(r"<tr><td>(one|two)</td>(.*?)</tr>", page, flags=re.DOTALL))
    assert ">2 of 2<" in rows["one"] and "→" in rows["one"]
    assert ">1 of 1<" in rows["two"] and "→" not in rows["two"]
    assert "<td>data.num_train</td>" in shared and "peers.failures" not in shared
    assert "<a href" not in page.split("Summary</h2>")[0].split("</nav>")[1], "no page of a run to link to yet"
    page = write_report([write_and_keep(one), two], tmp_path / "out" / "both.html").read_text()
    (link,) = re.findall(r'<li><b><a href="([^"#]+)">one</a>', page)
    assert (tmp_path / "out" / link).resolve() == one.report_file.resolve()
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
