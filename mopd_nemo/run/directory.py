"""The files of a run. A checkpoint appears only when it is complete: it is written aside, synced to disk, then renamed.

config.yaml           every setting, defaults included
metrics.jsonl         one row a step
eval.jsonl            one row an evaluation
choices.jsonl         one row a choice of peers, with `peers.choose: measured`
rollouts/             step_*.jsonl: samples, verdicts and teacher prompts; eval_*.jsonl: held-out samples
checkpoints/step_*/   Hugging Face model, teacher, optimiser, trainer state
report.html
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from mopd_nemo.config import Config, UserError
from mopd_nemo.config.load import dump_config, load_config
from mopd_nemo.engines.base import Engine
from mopd_nemo.files import read_rows, write_rows, write_text

_PREFIX, _PARTIAL = "step_", ".partial-"


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        self.eval_file = path / "eval.jsonl"
        self.choices_file = path / "choices.jsonl"
        self.config_file = path / "config.yaml"
        self.problems_file = path / "problems.json"
        self.report_file = path / "report.html"
        self.rollouts = path / "rollouts"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def at(cls, config: Config) -> RunDirectory:
        """The directory of a new run. Writes nothing.

        Raises:
            UserError: the directory already holds a run.
        """
        run = cls(Path(config.run_dir or f"runs/{config.name}-{datetime.now():%Y%m%d-%H%M%S}"))
        if run.config_file.exists():
            raise UserError(
                f"run_dir={run.path}: holds a run already; continue it with `mopd train --resume {run.path}`, "
                "or choose another run_dir"
            )
        return run

    def create(self, config: Config) -> None:
        """Make the directory and record the resolved settings.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self.rollouts.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self.write_config(config)
        except OSError as error:
            raise UserError(
                f"run_dir={self.path}: cannot write there: {error.strerror}; choose another run_dir"
            ) from error

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run.

        Raises:
            UserError: there is none at `path`.
        """
        run = cls(path)
        if not run.config_file.is_file():
            raise UserError(f"{path}: not a run directory (no config.yaml in it)")
        return run

    def read_config(self, overrides: Iterable[str] = ()) -> Config:
        """The run's settings, with dotted overrides."""
        return load_config(self.config_file, [*overrides, f"run_dir={self.path}"])

    def write_config(self, config: Config) -> None:
        """Record the resolved settings."""
        write_text(self.config_file, dump_config(config))

    def rollouts_file(self, step: int, kind: Literal["step", "eval"] = "step") -> Path:
        """File of the rollouts of a training step, or of the evaluation after it."""
        return self.rollouts / f"{kind}_{step:06d}.jsonl"

    def rollout_files(self, kind: Literal["step", "eval"] = "step") -> dict[int, Path]:
        """Recorded rollouts by step, oldest first."""
        return {int(file.stem.removeprefix(f"{kind}_")): file for file in sorted(self.rollouts.glob(f"{kind}_*.jsonl"))}

    def forget_after(self, step: int) -> None:
        """Drop rows and files of steps after `step`: a resumed run writes them again."""
        for file in (self.metrics_file, self.eval_file, self.choices_file):
            if file.exists():
                write_rows(file, [row for row in read_rows(file) if row["step"] <= step])
        for recorded, file in (*self.rollout_files("step").items(), *self.rollout_files("eval").items()):
            if recorded > step:
                file.unlink()


def save_checkpoint(
    directory: Path, step: int, engine: Engine, state: dict[str, Any], keep: int, spare: Path | None = None
) -> Path:
    """Write `directory/step_NNNNNN` and delete all but the newest `keep` checkpoints.

    Args:
        state: of the trainer, as JSON.
        spare: an older checkpoint that stays.
    """
    partial = directory / f"{_PARTIAL}{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    engine.save(partial)
    (partial / "trainer.json").write_text(json.dumps(state))
    _sync(partial)
    final = directory / f"{_PREFIX}{step:06d}"
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync_directory(directory)
    for old in checkpoints(directory)[:-keep]:
        if old != spare:
            shutil.rmtree(old)
    return final


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob(f"{_PREFIX}*") if path.is_dir())


def newest_up_to(directory: Path, step: int) -> Path | None:
    """The newest complete checkpoint of this step or an earlier one."""
    early = [path for path in checkpoints(directory) if int(path.name.removeprefix(_PREFIX)) <= step]
    return early[-1] if early else None


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint; partial ones are removed."""
    for partial in directory.glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial)
    complete = checkpoints(directory)
    return complete[-1] if complete else None


def load_checkpoint(checkpoint: Path, engine: Engine) -> dict[str, Any]:
    """Restore the engine. Returns the trainer's state."""
    engine.load(checkpoint)
    return json.loads((checkpoint / "trainer.json").read_text())


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
