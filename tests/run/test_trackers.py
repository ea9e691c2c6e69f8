import importlib.util
import json
from pathlib import Path

import pytest

from mopd_nemo.config import Config, UserError
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.trackers import check_trackers, make_trackers


def log_three_steps(tmp_path: Path, **logging: object) -> RunDirectory:
    config = Config.model_validate({"run_dir": str(tmp_path / "run"), "logging": logging})
    run = RunDirectory.at(config)
    run.create(config)
    check_trackers(config)
    (tracker,) = make_trackers(config, run)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0 / step})
    tracker.close()
    return run


def test_tensorboard_gets_every_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_three_steps(tmp_path, tensorboard=True).path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_wandb_offline_writes_a_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = log_three_steps(tmp_path, wandb="offline")
    (written,) = (run.path / "wandb").glob("offline-run-*/*.wandb")
    assert (run.path / "wandb_id").read_text() in written.name


def test_missing_package_is_an_error_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=r"logging.wandb=offline: wandb is not installed; pip install 'mopd-nemo\[wandb\]'"
    ):
        check_trackers(Config.model_validate({"logging": {"wandb": "offline"}}))


def test_no_tracker_unless_asked(tmp_path: Path) -> None:
    assert make_trackers(Config(), RunDirectory(tmp_path)) == []
    assert json.loads(json.dumps(Config().logging.model_dump()))["wandb"] == "off"
