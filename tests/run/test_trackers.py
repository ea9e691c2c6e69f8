import importlib.util
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.config import Config, UserError
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.trackers import CHARACTERS, COLUMNS, GROUPS, check_trackers, groups_to_show, make_trackers
from mopd_nemo.types import Outcome
from tests.test_trainer import new_run

HOSTILE = "# <b>[31m \x1b[2J"


def row(problem: str, rollout: int) -> dict[str, Any]:
    """A recorded rollout; the second of the problems a to e fails, so that f is the one without anything to see."""
    right = rollout == 0 or problem == "f"
    peer = {"kind": "success", "problem": problem, "rollout": 0, "summary": False}
    taught = (
        {"peers": [peer], "teacher_prompt": f"prompt {HOSTILE}"} if rollout else {"peers": [], "teacher_prompt": None}
    )
    outcome = Outcome.CORRECT if right else Outcome.WRONG
    texts = {"response": f"{HOSTILE}\n" + "long " * 2000, "response_tokens": 9, "sources": ["peers"] * rollout}
    head = {"problem": problem, "rollout": rollout, "outcome": outcome, "success": right, "reward": float(right)}
    return head | texts | taught


def log_three_steps(tmp_path: Path, **logging: object) -> RunDirectory:
    config = Config.model_validate({"run_dir": str(tmp_path / "run"), "logging": logging})
    run = RunDirectory.at(config)
    run.create(config)
    check_trackers(config)
    trackers = make_trackers(config, run)
    for step in (1, 2, 3):
        trackers.log(step, {"loss": 1.0 / step})
    rows = groups_to_show([row(problem, r) for problem in "abcdef" for r in range(2)])
    for tracker in trackers.all:
        tracker.groups(3, "train", rows)
    trackers.close()
    return run


def test_tensorboard_gets_every_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_three_steps(tmp_path, tensorboard=True).path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    (event,) = events.Tensors("train/groups/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 3 and text.count("rollout 1: wrong; teacher read: success 0") == GROUPS
    assert all(line.startswith("    ") for line in text.splitlines()), "code, never Markdown"
    assert "f, rollout" not in text and "\x1b" not in text and len(text) < 2 * GROUPS * (CHARACTERS + 200)


def test_wandb_offline_writes_a_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = log_three_steps(tmp_path, wandb="offline")
    (written,) = (run.path / "wandb").glob("offline-run-*/*.wandb")
    assert (run.path / "wandb_id").read_text() in written.name
    end = time.monotonic() + 30
    while not any(record.WhichOneof("record_type") == "exit" for record in records(written)):
        assert time.monotonic() < end, "wandb's own process has not finished its file"
        time.sleep(0.05)
    losses = [float(item) for row in history(written) for name, item in row.items() if name == "loss"]
    assert losses == [1.0, 0.5, pytest.approx(1 / 3)]
    (file,) = written.parent.glob("files/media/table/train/*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == list(COLUMNS) and len(table["data"]) == 2 * GROUPS
    first, second = table["data"][:2]
    assert first[:5] == ["a", 0, "correct", 1.0, 9] and first[6:] == ["", ""], "no teacher read anything for it"
    assert second[2] == "wrong" and second[6:] == ["success 0", f"prompt {HOSTILE}"]
    assert "characters ..." in second[5] and len(second[5]) < CHARACTERS + 100


def history(file: Path) -> Iterator[dict[str, str]]:
    """The logged values of an offline run, as JSON, row by row."""
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or item.nested_key[0]: item.value_json for item in record.history.item}


def records(file: Path) -> Iterator[Any]:
    """All that an offline run has written so far. Its file is a log of LevelDB's format."""
    record_type = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) < 7:
            at += left
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record_type.FromString(parts)
            parts = b""


def test_a_run_sends_groups_of_steps_and_evaluations(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = new_run(tmp_path / "run", "train.num_steps=3", "logging.tensorboard=true", "logging.track_groups_every=2")
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Tensors("train/groups/text_summary")] == [2]
    assert [event.step for event in events.Tensors("held_out/groups/text_summary")] == [0, 2, 3]


def test_missing_package_is_an_error_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=r"logging.wandb=offline: wandb is not installed; pip install 'mopd-nemo\[wandb\]'"
    ):
        check_trackers(Config.model_validate({"logging": {"wandb": "offline"}}))


def test_no_tracker_unless_asked(tmp_path: Path) -> None:
    assert make_trackers(Config(), RunDirectory(tmp_path)).all == ()
    assert json.loads(json.dumps(Config().logging.model_dump()))["wandb"] == "off"
