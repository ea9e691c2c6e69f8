import csv
import re
from pathlib import Path

import pytest

from mopd_nemo.analysis.compare import compare, rows, write_comparison
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.files import write_rows
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.display import PHASES
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
    samples = [{"problem": f"p{i}", "rollout": r, "success": r < c} for i, c in enumerate(right) for r in range(8)]
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
    assert (mopd.seeds, mopd.mean.mean, mopd.mean.before) == (2, 0.875, 0.25)
    assert mopd.mean.std == pytest.approx(0.125 * 2**0.5)
    # Two problems, 1.0 and 0.75 on average over seeds: resampling gives means between these.
    assert (mopd.mean.low, mopd.mean.high) == (0.75, 1.0)
    assert sdpo.mean.std == 0.0 and sdpo.mean.low == sdpo.mean.high == 0.25
    assert mopd.over_baseline == pytest.approx(0.25), "the slow first steps are left out"
    assert mopd.ever_solved == 14.0
    assert not comparison.warnings


def test_any_setting_can_be_the_baseline_of_step_times(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / m, [4], seconds=s, method=m) for m, s in (("grpo", 1.0), ("mopd", 3.0))]
    assert [row.over_baseline for row in rows(compare(paths))] == [None, None], "there is no sdpo"
    assert [row.over_baseline for row in rows(compare(paths, "grpo"))] == [0.0, 2.0]
    with pytest.raises(UserError, match="--baseline opd: no such setting; there are: grpo, mopd"):
        compare(paths, "opd")


def test_labels_name_what_differs(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / str(i), [4], peers__failures=i, peers__successes=2 - i) for i in (0, 1)]
    labels = [setting.label for setting in compare(paths).settings]
    assert labels == ["peers.successes=2 peers.failures=0", "peers.successes=1 peers.failures=1"]


def test_uneven_comparisons_are_said(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a", [4]),
        write_run(tmp_path / "b", [4], method="grpo", steps=6),
        write_run(tmp_path / "c", [4], method="grpo", seed=1),
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
        (lambda run: run.config_file.unlink(), "not a run directory"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(tmp_path: Path, breakage, message: str) -> None:
    good, bad = write_run(tmp_path / "good", [4]), write_run(tmp_path / "bad", [4], seed=1)
    breakage(RunDirectory(bad))
    with pytest.raises(UserError, match=message):
        compare([good, bad])


def test_different_problems_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="different problems"):
        compare([write_run(tmp_path / "a", [4]), write_run(tmp_path / "b", [4, 4])])


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
