import csv
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from mopd_nemo.analysis.compare import compare, rows
from mopd_nemo.analysis.compare_page import write_comparison
from mopd_nemo.analysis.contrasts import MARGIN
from mopd_nemo.commands.report import MARGIN as DEFAULT_POINTS
from mopd_nemo.commands.report import compare_runs
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.files import write_rows, write_text
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.display import PHASES
from tests.browser import Browser
from tests.conftest import QUICKSTART


def write_run(path: Path, right: list[int], seconds: float = 1.0, steps: int = 8, **settings: object) -> Path:
    """A recorded run: `right` of 8 samples of each held-out problem are right at the end."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    config = load_config(QUICKSTART, [f"run_dir={path}", "train.num_steps=8", *overrides])
    run = RunDirectory(path)
    run.create(config)
    times = {f"seconds/{phase}": 0.0 for phase in PHASES} | {"seconds/generate": seconds, "seconds/step": seconds}
    slow_start = [times | {"seconds/step": 100.0}] * 5 + [times] * (steps - 5)
    write_rows(
        run.metrics_file,
        [{"step": s + 1, "success_rate": 0.5, "ever_solved": 2.0 * s, **row} for s, row in enumerate(slow_start)],
    )
    mean = sum(right) / (8 * len(right))
    evals = [{"step": 0, "mean@8": 0.25, "pass@8": 0.5}, {"step": 8, "mean@8": mean, "pass@8": 1.0}]
    write_rows(run.eval_file, evals)
    samples = [
        {
            "step": 8,
            "problem": f"p{i}",
            "rollout": r,
            "response": "",
            "reward": float(r < c),
            "outcome": "correct" if r < c else "wrong",
            "success": r < c,
        }
        for i, c in enumerate(right)
        for r in range(8)
    ]
    write_rows(run.rollouts_file(8, "eval"), samples)
    return path


def test_table_over_seeds(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a0", [8, 4], seed=0),
        write_run(tmp_path / "a1", [8, 8], seed=1),
        write_run(tmp_path / "b0", [2, 2], seconds=0.8, method="sdpo"),
        write_run(tmp_path / "b1", [2, 2], seconds=0.8, method="sdpo", seed=1),
    ]
    comparison = compare(paths)
    mopd, sdpo = rows(comparison)
    assert [setting.label for setting in comparison.settings] == ["mopd", "sdpo"]
    assert (mopd.seeds, mopd.mean, mopd.before) == (2, 0.875, 0.25)
    assert mopd.std == pytest.approx(0.125 * 2**0.5)
    assert sdpo.std == 0.0
    (contrast,) = comparison.contrasts.against_baseline
    assert (contrast.setting, contrast.mean, contrast.seeds) == ("mopd", 0.625, (0, 1))
    assert mopd.over_baseline == pytest.approx(0.25), "the slow first steps are left out"
    assert mopd.ever_solved == 14.0
    assert not comparison.warnings


def test_any_setting_can_be_the_baseline(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / m, [4, 5], seconds=s, method=m) for m, s in (("mopd", 3.0), ("grpo", 1.0))]
    assert compare(paths).contrasts.baseline == "mopd", "the first, as there is no sdpo"
    assert [row.over_baseline for row in rows(compare(paths, "grpo"))] == [2.0, 0.0]
    assert [each.setting for each in compare(paths, "grpo").contrasts.against_baseline] == ["mopd"]
    with pytest.raises(UserError, match="--baseline opd: no such setting; there are: mopd, grpo"):
        compare(paths, "opd")


def test_the_margin_of_the_command_is_that_of_the_analysis() -> None:
    assert DEFAULT_POINTS == 100 * MARGIN


def test_labels_name_what_differs(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / str(i), [4, 4], peers__failures=i, peers__successes=2 - i) for i in (0, 1)]
    labels = [setting.label for setting in compare(paths).settings]
    assert labels == ["peers.successes=2 peers.failures=0", "peers.successes=1 peers.failures=1"]


def test_uneven_comparisons_are_said(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a", [4, 4]),
        write_run(tmp_path / "b", [4, 4], method="grpo", steps=6),
        write_run(tmp_path / "c", [4, 4], method="grpo", seed=1),
    ]
    warnings = " ".join(compare(paths).warnings)
    assert "rollout budgets differ: 768, 1,024" in warnings
    assert "not finished: b" in warnings and "different numbers of seeds" in warnings


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda run: run.eval_file.unlink(), "eval.jsonl has no rows; set train.eval_every"),
        (lambda run: run.metrics_file.write_text(""), "metrics.jsonl has no rows; train it first"),
        (lambda run: run.rollouts_file(8, "eval").unlink(), "intervals by problem need the samples"),
        (lambda run: run.config_file.unlink(), "neither a run directory"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(tmp_path: Path, breakage, message: str) -> None:
    good, bad = write_run(tmp_path / "good", [4, 4]), write_run(tmp_path / "bad", [4, 4], seed=1)
    breakage(RunDirectory(bad))
    with pytest.raises(UserError, match=message):
        compare([good, bad])


def test_a_sweep_is_compared_as_documented(tmp_path: Path) -> None:
    """`sweep --output S` puts its tables beside the runs; `compare S/*` and `compare S` mean its runs."""
    runs = [write_run(tmp_path / "s" / m, [4, 8], method=m) for m in ("mopd", "sdpo")]
    (tmp_path / "s" / "compare.csv").write_text("setting\n")
    for paths in ([tmp_path / "s"], sorted((tmp_path / "s").iterdir()), [*runs, tmp_path / "s"]):
        assert [run.path for setting in compare(paths).settings for run in setting.runs] == runs


def test_what_holds_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("")
    for name, message in (("empty", "neither a run directory"), ("nowhere", "no such"), ("table.csv", "no run direc")):
        with pytest.raises(UserError, match=message):
            compare([tmp_path / name])


def test_the_same_experiment_twice_is_no_second_seed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a and .*/b: the same settings and seed \(0\); leave one out"):
        compare([write_run(tmp_path / name, [4, 8]) for name in "ab"])


def test_tables_fit_a_terminal_of_80_columns(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("mopd_nemo.analysis.compare_page.write_comparison", lambda *_: "compare.html")
    paths = [
        write_run(tmp_path / f"{f}{s}", [4, 8, f], seconds=100.0, peers__failures=f, peers__successes=2, seed=s)
        for f in (0, 1)
        for s in (0, 1)
    ]
    compare_runs(paths, tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "…" in line]
    time = [line.split() for line in lines if "100.00" in line]
    assert [(words[0], words[-2]) for words in time] == [("peers.failures=0", "+0.0"), ("peers.failures=1", "+0.0")]
    assert any("not told apart" in line for line in lines)


def test_different_problems_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="different problems"):
        compare([write_run(tmp_path / "a", [4]), write_run(tmp_path / "b", [4, 4])])
    with pytest.raises(UserError, match="on one problem, which says nothing about others"):
        compare([tmp_path / "a"])


def test_all_files_are_written(tmp_path: Path) -> None:
    comparison = compare([write_run(tmp_path / m, [4, 8], method=m) for m in ("mopd", "sdpo", "grpo")])
    page = write_comparison(comparison, tmp_path / "out").read_text()
    assert page.count("<svg") == 4 and "+0.0 %" in page
    assert not re.search(r'(src|href)="http', page), "self-contained"
    names = {file.name for file in (tmp_path / "out").iterdir()}
    names_drawn = ("held_out", "training_success", "ever_solved", "seconds")
    figures = {f"{name}.{kind}" for name in names_drawn for kind in ("png", "pdf")}
    assert names == {"compare.html", "compare.md", "compare.csv", *figures}
    with (tmp_path / "out" / "compare.csv").open() as file:
        assert [row["setting"] for row in csv.DictReader(file)] == ["mopd", "sdpo", "grpo"]
    assert "| mopd | 1 |" in (tmp_path / "out" / "compare.md").read_text()


def test_page_links_to_the_runs_and_says_what_they_share(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / f"run {n}", [8, 4], seed=n, logging__tensorboard=n == 1) for n in (0, 1))
    write_text(one / "report.html", "its own page")
    comparison = compare([one, two])
    assert [setting.label for setting in comparison.settings] == ["mopd"], "what is logged makes no other setting"
    page = write_comparison(comparison, tmp_path / "out").read_text()
    links = re.findall(r'<a href="([^"#]+)">', page)
    assert [(tmp_path / "out" / unquote(link)).resolve() for link in links] == [(one / "report.html").resolve()]
    assert "mopd (2 seeds)" in page
    shared = page.split("What they share")[1]
    assert "data.num_train" in shared and "seed" not in shared.split("</p>")[1] and "run_dir" not in shared


def test_phone_shows_that_a_table_goes_on(browser: Browser, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{n}", [8, 4], seed=n) for n in (0, 1)]
    page = write_comparison(compare(runs), tmp_path / "out")
    for width in (1280, 390):
        browser.open(page, width)
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
    table = "document.querySelector('.scroll')"
    assert browser.evaluate(f"{table}.scrollWidth > {table}.clientWidth")
    assert "gradient" in browser.evaluate(f"getComputedStyle({table}).backgroundImage"), "a shadow where it is cut"
    browser.evaluate(f"{table}.scrollLeft = 1000")
    first = "document.querySelector('.scroll td').getBoundingClientRect().x"
    assert browser.evaluate(f"{first} >= 0 && {first} < 30"), "names stay in sight"
