from pathlib import Path

import pytest

from mopd_nemo.commands import train
from mopd_nemo.config import UserError
from mopd_nemo.files import read_rows
from mopd_nemo.run.directory import RunDirectory
from tests.conftest import QUICKSTART

SMALL = [
    "rollout.num_prompts_per_step=4",
    "rollout.num_rollouts_per_prompt=4",
    "data.num_train=8",
    "data.num_eval=4",
    "eval.num_samples=2",
    "train.num_steps=2",
    "train.eval_every=2",
]


def test_every_combination_once(tmp_path: Path) -> None:
    runs = train.plan(QUICKSTART, ["method=mopd,grpo", "seed=0,1,2", "optimizer.betas=[0.9,0.95]"], tmp_path)
    assert [run.path.name for run in runs][:2] == ["method=mopd,seed=0", "method=mopd,seed=1"]
    assert len(runs) == 6 and "optimizer.betas=[0.9,0.95]" in runs[0].overrides


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "nothing varies"),
        (["seed=1,2", "run_dir=x"], "say where with --output"),
        (["seed=0,1", "peers.choose=measured", "peers.choose_from=[9x]"], "context '9x'"),
        (["method=mopd,nonsense"], "method=nonsense: choose mopd"),
        (["method=mopd,grpo", "peers.failures=1"], "peers.failures=1 is unused by method=grpo"),
    ],
)
def test_bad_sweeps_are_refused_before_the_first_run(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.run_sweep(QUICKSTART, overrides, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sweep_runs_what_is_missing_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.run_sweep(QUICKSTART, [*SMALL, "method=grpo,verified_sft", "seed=0"], tmp_path) == 0
    # One more seed; what is done stays as it is, and one run is cut short to be resumed.
    done = tmp_path / "method=grpo" / "metrics.jsonl"
    before = done.read_bytes()
    cut = RunDirectory(tmp_path / "method=verified_sft")
    cut.metrics_file.write_text(cut.metrics_file.read_text().splitlines(keepends=True)[0])
    capsys.readouterr()
    assert train.run_sweep(QUICKSTART, [*SMALL, "method=grpo,verified_sft", "seed=0"], tmp_path) == 0
    assert done.read_bytes() == before
    said = capsys.readouterr().out
    assert "done already" in said and "resumed" in said
    assert (tmp_path / "compare.html").exists()


def test_other_settings_at_the_same_place_are_refused(tmp_path: Path) -> None:
    RunDirectory(path := tmp_path / "seed=0").create(
        train.load_config(QUICKSTART, [*SMALL, "seed=0", f"run_dir={path}", "optimizer.learning_rate=1e-3"])
    )
    with pytest.raises(UserError, match="holds a run with other settings"):
        train.plan(QUICKSTART, [*SMALL, "seed=0,1"], tmp_path)


def test_complete_means_all_steps_and_the_last_evaluation(tmp_path: Path) -> None:
    train.run_sweep(QUICKSTART, [*SMALL, "method=grpo", "seed=0,1"], tmp_path)
    run = RunDirectory(tmp_path / "seed=0")
    assert train.is_complete(run) and len(read_rows(run.metrics_file)) == 2
    run.eval_file.write_text(run.eval_file.read_text().splitlines(keepends=True)[0])
    assert not train.is_complete(run)
