"""Checkpoints that were damaged, copied, half written or half deleted."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from mopd_nemo.config import UserError
from mopd_nemo.engines.base import Engine
from mopd_nemo.files import WriteError
from mopd_nemo.run import checkpoints as module
from mopd_nemo.run.checkpoints import (
    best_saved,
    checkpoints,
    fault,
    load_checkpoint,
    newest_step,
    newest_up_to,
    prune,
    recover,
    save_checkpoint,
)


class Files:
    """An engine that saves files as several ranks do, in directories of their own."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def save(self, directory: Path) -> None:
        for name in ("model.safetensors", "policy/weights/iter_0000000/__0_0.distcp", "teacher/rank1.pt"):
            file = directory / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(0o600)
            file.write_bytes(name.encode() * 100)
        if self.error:
            raise self.error

    def checkpoint_bytes(self) -> int:
        return 5000

    def load(self, directory: Path) -> None:
        if self.error:
            raise self.error


def save(directory: Path, step: int, keep: int = 9, error: Exception | None = None) -> Path:
    path = save_checkpoint(directory, step, cast(Engine, Files(error)), {"step": step})
    prune(directory, keep)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Checkpoints of steps 2 and 4."""
    for step in (2, 4):
        save(tmp_path, step)
    return tmp_path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", 7)


def flip(path: Path) -> None:
    file = path / "policy/weights/iter_0000000/__0_0.distcp"
    file.write_bytes(b"X" + file.read_bytes()[1:])


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "model.safetensors has 7 bytes, and had 1700 when it was written"),
        (flip, "policy/weights/iter_0000000/__0_0.distcp does not hold what was written"),
        (lambda path: shutil.rmtree(path / "teacher"), "teacher/rank1.pt: No such file or directory"),
        (lambda path: (path / "trainer.json").unlink(), "trainer.json: No such file or directory"),
        (lambda path: (path / "trainer.json").write_text("{'step"), "trainer.json has 6 bytes, and had 11"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text("[1]"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_bytes(bytes(99)), "manifest.json is damaged"),
        (empty, "manifest.json is missing"),
    ],
)
def test_the_newest_intact_one_is_used_and_what_was_passed_over_is_said(
    damage: Callable[[Path], Any], reason: str, saved: Path
) -> None:
    damage(saved / "step_000004")
    said: list[str] = []
    assert recover(saved, said.append) == saved / "step_000002"
    (line,) = said
    assert f"{saved}/step_000004 is passed over: {reason}" in line and "it is now damaged-000004" in line
    assert names(saved) == ["damaged-000004", "step_000002"]
    assert recover(saved, said.append) == saved / "step_000002" and len(said) == 1


def test_intact_means_that_nothing_is_said(saved: Path) -> None:
    (saved / "step_000004" / "notes.txt").write_text("a person's file")
    assert recover(saved, pytest.fail) == saved / "step_000004"
    assert recover(saved / "none yet", pytest.fail) is None


def test_when_none_is_intact_nothing_is_touched(saved: Path) -> None:
    for path in checkpoints(saved):
        truncate(path)
    with pytest.raises(
        UserError, match=r"no checkpoint is intact \(step_000004: model.safetensors has 7 .*step_000002: "
    ):
        recover(saved, pytest.fail)
    assert names(saved) == ["step_000002", "step_000004"]


def test_only_names_that_a_run_gives_count(saved: Path) -> None:
    shutil.copytree(saved / "step_000002", saved / "step_best")
    (saved / "step_000009.zip").touch()
    (saved / "step_000009").touch()
    assert recover(saved, pytest.fail) == saved / "step_000004"
    assert newest_up_to(saved, 3) == saved / "step_000002" and newest_up_to(saved, 1) is None
    shutil.copytree(saved / "step_000002", saved / "step_000008")  # not what its name says
    assert newest_step(saved) == 4 and newest_step(saved / "none yet") == 0
    said: list[str] = []
    assert recover(saved, said.append) == saved / "step_000004" and "it is a copy of step 2" in said[0]
    save(saved, 1_000_000)
    assert checkpoints(saved)[-1].name == "step_1000000"


@pytest.mark.parametrize("name", [".partial-000006", ".old-000006", "damaged-000004", "step_000006"])
@pytest.mark.parametrize("link", [False, True])
def test_a_file_or_link_in_place_of_a_directory_is_replaced(saved: Path, name: str, link: bool) -> None:
    if link:
        (saved / name).symlink_to("nowhere")
    else:
        (saved / name).write_text("of a person")
    truncate(saved / "step_000004")
    assert recover(saved, lambda _: None) == saved / "step_000002"
    assert fault(save(saved, 6)) == ""
    assert names(saved) == ["damaged-000004", "step_000002", "step_000006"]


@pytest.mark.parametrize("name", ["step_0000009", "step_00000\N{ARABIC-INDIC DIGIT NINE}"])
def test_a_step_has_one_name(saved: Path, name: str) -> None:
    shutil.copytree(saved / "step_000004", saved / name)
    assert [path.name for path in checkpoints(saved)] == ["step_000002", "step_000004"]


@pytest.mark.parametrize(
    "manifest",
    [
        '{"step": 4, "files": {}}',
        "[" * 100_000,
        '{"step": 4, "files": {"trainer.json": {"bytes": 1, "sha256": ""}, "\\u0000": {"bytes": 1, "sha256": ""}}}',
    ],
)
def test_a_manifest_of_no_checkpoint_is_damaged(saved: Path, manifest: str) -> None:
    (saved / "step_000004" / "manifest.json").write_text(manifest)
    assert fault(saved / "step_000004") == "manifest.json is damaged"
    assert newest_step(saved) in (2, 4)


def test_a_damaged_one_takes_no_place_among_those_to_keep(saved: Path) -> None:
    truncate(saved / "step_000004")
    recover(saved, lambda _: None)
    save(saved, 3, keep=1)
    assert names(saved) == ["damaged-000004", "step_000003"]


@pytest.mark.parametrize("moment", ["rename", "rmtree"])
def test_a_kill_while_old_ones_are_deleted_leaves_no_half(
    moment: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def killed(path: Path, *_: Any, **__: Any) -> None:
        if moment == "rmtree" and path.exists():
            (path / "model.safetensors").unlink()
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        if moment == "rmtree":
            patch.setattr(module.shutil, "rmtree", lambda path, **how: None if how else killed(path))
        else:
            patch.setattr(module, "_delete", killed)
        save(saved, 6, keep=1)
    assert recover(saved, pytest.fail) == saved / "step_000006"
    assert all(fault(path) == "" for path in checkpoints(saved)) and not list(saved.glob(".*"))


def test_a_failed_save_leaves_nothing_and_the_others_stay(saved: Path) -> None:
    with pytest.raises(RuntimeError, match="no disk problem"):
        save(saved, 6, error=RuntimeError("no disk problem"))
    assert names(saved) == ["step_000002", "step_000004"]


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.rglob("*") if file.is_file()} == {"0o640"}
    assert {oct(file.stat().st_mode & 0o777) for file in (path, *path.rglob("*")) if file.is_dir()} == {"0o750"}


def test_another_model_is_said_to_be_one(saved: Path) -> None:
    broken = cast(Engine, Files(RuntimeError("size mismatch for lm_head\nmore")))
    with pytest.raises(UserError, match=r"step_000004: intact, but it does not fit .*: size mismatch for lm_head"):
        load_checkpoint(saved / "step_000004", broken)
    assert load_checkpoint(saved / "step_000002", cast(Engine, Files())) == {"step": 2}


def _other_optimiser() -> None:
    first, second = torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    torch.optim.AdamW(second.parameters()).load_state_dict(torch.optim.AdamW(first.parameters()).state_dict())


@pytest.mark.parametrize(
    ("load", "foreign"),
    [
        (lambda: torch.nn.Linear(2, 3).load_state_dict(torch.nn.Linear(3, 3).state_dict()), True),
        (lambda: torch.nn.Linear(2, 3).load_state_dict({}), True),
        (lambda: torch.zeros(3).copy_(torch.zeros(2)), True),
        (_other_optimiser, True),
        (lambda: Path("optimizer.pt of another engine").read_bytes(), True),
        (lambda: torch.empty(1 << 60), False),
        (lambda: torch.zeros(2, 2) @ torch.zeros(3, 2), False),
        (lambda: int("programming"), False),
        (lambda: {}["programming"], False),
        (lambda: Path("/").read_bytes(), False),
    ],
)
def test_only_what_another_model_causes_is_called_that(saved: Path, load: Callable[[], Any], foreign: bool) -> None:
    with pytest.raises(Exception) as found:
        load()
    with pytest.raises(UserError if foreign else type(found.value)) as told:
        load_checkpoint(saved / "step_000004", cast(Engine, Files(found.value)))
    assert ("does not fit this run's settings" in str(told.value)) == foreign


def test_room_for_the_first_one_is_judged_by_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_space", lambda _: 4999)
    with pytest.raises(WriteError, match=r"step_000001: not written: a checkpoint needs 5 kB, and 5 kB are free there"):
        save(tmp_path, 1)


def test_room_is_judged_by_the_newest_one_before_the_next(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_space", lambda _: 4000)
    with pytest.raises(
        WriteError, match=r"step_000006: not written: a checkpoint needs .* kB, and 4 kB are free there"
    ):
        save(saved, 6)
    monkeypatch.setattr(module, "free_space", lambda _: 1 << 40)
    monkeypatch.setattr(module, "file_limit", lambda: 1000)
    with pytest.raises(WriteError, match=r"its largest file has .*, and this process may write 1 kB \(ulimit -f\)"):
        save(saved, 6)
    assert names(saved) == ["step_000002", "step_000004"]


def test_manifest_lists_every_file(saved: Path) -> None:
    listed = json.loads((saved / "step_000004" / "manifest.json").read_text())["files"]
    found = {str(f.relative_to(saved / "step_000004")) for f in (saved / "step_000004").rglob("*") if f.is_file()}
    assert listed.keys() == found - {"manifest.json"}


@pytest.mark.slow
def test_hashing_costs_less_than_writing(tmp_path: Path) -> None:
    """1 GB in four files. See docs/architecture.md for what was measured."""

    class Big(Files):
        def save(self, directory: Path) -> None:
            for number in range(4):
                (directory / f"rank{number}").write_bytes(os.urandom(1 << 20) * 256)

    started = time.monotonic()
    path = save_checkpoint(tmp_path, 1, cast(Engine, Big()), {})
    written = time.monotonic() - started
    started = time.monotonic()
    assert fault(path) == ""
    assert time.monotonic() - started < written


def test_the_best_of_the_evaluations_that_have_a_checkpoint(saved: Path) -> None:
    rows = [{"step": step, "mean@8": rate} for step, rate in ((0, 0.9), (2, 0.5), (3, 0.8), (4, 0.5))]
    best = best_saved(saved, rows, "mean@8")
    assert best == (saved / "step_000002", rows[1])
    assert best_saved(saved, rows, "pass@1") is None and best_saved(saved, rows[:1], "mean@8") is None
    prune(saved, 1, [saved / "step_000002", None])
    save(saved, 6)
    prune(saved, 1, [saved / "step_000002", None])
    assert names(saved) == ["step_000002", "step_000006"]
