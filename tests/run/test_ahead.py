"""Rollouts one step ahead, in the loop as a user runs it. Kills and stops: tests/test_trainer.py."""

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.data.load import problems_of_step
from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.local import engine as local_engine
from mopd_nemo.files import read_rows
from mopd_nemo.run import ahead
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.trainer import Trainer
from tests.conftest import QUICKSTART

SMALL = [
    "rollout.lag=1",
    "rollout.num_prompts_per_step=4",
    "rollout.num_rollouts_per_prompt=4",
    "data.num_train=16",
    "optimizer.warmup_steps=0",
    "optimizer.learning_rate=1e-3",
    "train.num_steps=4",
    "train.eval_every=0",
    "train.checkpoint_every=1",
    "train.keep_checkpoints=9",
]


def trainer_of(path: Path, *overrides: str) -> Trainer:
    return Trainer.new(load_config(QUICKSTART, [f"run_dir={path}", *SMALL, *overrides]), Console(file=io.StringIO()))


def resumed(run: RunDirectory, *overrides: str) -> tuple[Trainer, str]:
    screen = io.StringIO()
    trainer = Trainer.resumed(run, overrides, Console(file=screen, width=200))
    assert trainer.fit()
    return trainer, screen.getvalue()


def recorded(run: RunDirectory, step: int) -> list[list[int]]:
    return [row["response_ids"] for row in read_rows(run.rollouts_file(step))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    trainer = trainer_of(tmp_path_factory.mktemp("ahead") / "run")
    assert trainer.fit()
    return trainer.run


def test_a_step_learns_from_rollouts_of_the_weights_before_the_last_update(run: RunDirectory) -> None:
    config = run.read_config()
    trainer = Trainer(config, run, Console(file=io.StringIO()))
    sampling = Sampling(config.rollout.max_response_tokens)

    def drawn(step: int) -> list[list[int]]:
        problems = problems_of_step(trainer.problems, step, 4, config.seed)
        request = Request([p.prompt_ids for p in problems], 4, sampling, f"train/{config.seed}/{step}")
        groups = trainer.engine.generate(request)
        return [list(rollout.response_ids) for group in groups for rollout in group]

    assert recorded(run, 1) == drawn(1) and recorded(run, 2) == drawn(2), "both of the initial weights"
    for weights in (1, 2):
        trainer.engine.load(run.checkpoints / f"step_{weights:06d}")
        assert recorded(run, weights + 2) == drawn(weights + 2)
    assert recorded(run, 3) != drawn(3), "which the last update has changed"
    trainer.verifiers.close()
    assert [row["rollout/lag"] for row in read_rows(run.metrics_file)] == [0, 1, 1, 1]


def test_the_lag_shows_in_the_importance_weights(run: RunDirectory) -> None:
    """Sampler and learner are one model here: nothing but the age of the weights is between them."""
    gaps = [row["sampler/gap"] for row in read_rows(run.metrics_file)]
    assert gaps[0] < 1e-4 and all(gap > 1e-3 for gap in gaps[1:])


def test_without_a_lag_nothing_is_in_flight(run: RunDirectory, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", "rollout.lag=0", "train.num_steps=2")
    assert trainer.fit()
    assert not list(trainer.run.checkpoints.glob(f"*/{ahead.FILE}"))
    rows = read_rows(trainer.run.metrics_file)
    assert [row["rollout/lag"] for row in rows] == [0, 0] and "seconds/waiting" not in rows[0]
    first = read_rows(run.metrics_file)[0]
    assert all(first[name] == rows[0][name] for name in first if not name.startswith(("seconds", "tokens_per_second")))


def test_the_last_step_draws_nothing_ahead_and_a_longer_run_begins_without(run: RunDirectory) -> None:
    files = [(run.checkpoints / f"step_{step:06d}" / ahead.FILE).is_file() for step in (1, 2, 3, 4)]
    assert files == [True, True, True, False]
    resumed(run, "train.num_steps=6")
    assert [row["rollout/lag"] for row in read_rows(run.metrics_file)] == [0, 1, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("overrides", "notice"),
    [
        (["rollout.temperature=0.8"], True),
        (["rollout.num_rollouts_per_prompt=3"], True),
        (["seed=5"], True),
        (["data.prompt_suffix=please"], True),
        (["rollout.lag=0"], False),
        (["optimizer.learning_rate=1e-4"], None),
    ],
)
def test_rollouts_in_flight_are_used_only_where_the_run_would_have_drawn_them(
    tmp_path: Path, overrides: list[str], notice: bool | None
) -> None:
    first = trainer_of(tmp_path / "run", "train.num_steps=3", "data.num_train=8")
    first.stop.leaves_time_for = lambda work: first.step < 1  # type: ignore[method-assign]
    assert not first.fit()
    _, screen = resumed(first.run, *overrides)
    assert ("drawn with other settings: step 2 draws its own" in screen) == bool(notice)
    second = read_rows(first.run.metrics_file)[1]
    assert second["rollout/lag"] == (1 if notice is None else 0)


def test_a_step_takes_the_longer_of_drawing_and_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that takes a second, and a learner that does: both idle meanwhile, as if on GPUs of their own."""

    def slowed(whole: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any, **settings: Any) -> Any:
            time.sleep(1.0)
            return whole(*arguments, **settings)

        return slow

    monkeypatch.setattr(local_engine, "sample", slowed(local_engine.sample))
    monkeypatch.setattr(local_engine.LocalEngine, "update", slowed(local_engine.LocalEngine.update))
    seconds: dict[int, float] = {}
    for lag in (0, 1):
        trainer = trainer_of(tmp_path / str(lag), f"rollout.lag={lag}", "train.checkpoint_every=9")
        assert trainer.fit()
        steady = read_rows(trainer.run.metrics_file)[1:]
        seconds[lag] = min(row["seconds/step"] for row in steady)
        if lag:
            assert all(row["seconds/waiting"] < row["seconds/drawing"] for row in steady)
    assert seconds[0] > 2.0 and 1.0 < seconds[1] < seconds[0] - 0.7


def test_a_drawing_that_fails_ends_the_run_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = local_engine.sample, []

    def failing(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory for the cache")
        return whole(*arguments, **settings)

    monkeypatch.setattr(local_engine, "sample", failing)
    trainer = trainer_of(tmp_path / "run", "train.checkpoint_every=9")
    with pytest.raises(torch.OutOfMemoryError, match="no memory for the cache"):
        trainer.fit()
    assert [row["step"] for row in read_rows(trainer.run.metrics_file)] == [1, 2]


def test_a_failure_elsewhere_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path / "run")
    started: list[Any] = []
    whole = trainer.engine.generate_ahead

    def noted(*arguments: Any) -> Any:
        started.append(whole(*arguments))
        return started[-1]

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("a broken update")

    monkeypatch.setattr(trainer.engine, "generate_ahead", noted)
    monkeypatch.setattr(trainer.engine, "update", fail)
    with pytest.raises(ValueError, match="a broken update"):
        trainer.fit()
    assert started and not any(drawing._thread.is_alive() for drawing in started)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.importance_clip=null"], "rollout.importance_clip=null does not correct for that: set a number"),
        (["method=gkd", "teacher.path=x", "gkd.completions=x.jsonl"], "rollout.lag=1 is unused by method=gkd"),
        (["engine=nemo"], "nemo.generation.gpus=0 has them take turns .* reserve some with nemo.generation.gpus, or"),
        (["rollout.lag=2"], "rollout.lag=2"),
    ],
)
def test_a_lag_that_cannot_work_is_refused_by_name(tmp_path: Path, overrides: list[str], message: str) -> None:
    base = tmp_path / "config.yaml"
    base.write_text(json.dumps({"rollout": {"lag": 1}}))
    with pytest.raises(UserError, match=message):
        load_config(base, overrides)


def test_methods_without_importance_weights_take_a_lag(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", "method=simpo", "train.num_steps=2")
    assert trainer.fit()
