"""The files of a run.

config.yaml           every setting, defaults included
metrics.jsonl         one row a step
eval.jsonl            one row an evaluation
rollouts/             step_*.jsonl: what was sampled, judged and shown; eval_*.jsonl: held-out samples
checkpoints/step_*/   Hugging Face model, teacher, optimiser, trainer state
report.html
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Literal

from mopd_nemo.config import Config, UserError
from mopd_nemo.config.load import dump_config, load_config
from mopd_nemo.files import read_rows, write_rows, write_text


class RunDirectory:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_file = path / "metrics.jsonl"
        self.eval_file = path / "eval.jsonl"
        self.config_file = path / "config.yaml"
        self.report_file = path / "report.html"
        self.rollouts = path / "rollouts"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def at(cls, config: Config) -> RunDirectory:
        """The place of a new run, before anything is written.

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
        """Where the rollouts of a training step, or of the evaluation after it, are or will be."""
        return self.rollouts / f"{kind}_{step:06d}.jsonl"

    def rollout_files(self, kind: Literal["step", "eval"] = "step") -> dict[int, Path]:
        """Recorded rollouts by step, oldest first."""
        return {int(file.stem.removeprefix(f"{kind}_")): file for file in sorted(self.rollouts.glob(f"{kind}_*.jsonl"))}

    def forget_after(self, step: int) -> None:
        """Drop rows and files of steps later than `step`: a resumed run makes them again."""
        for file in (self.metrics_file, self.eval_file):
            if file.exists():
                write_rows(file, [row for row in read_rows(file) if row["step"] <= step])
        for recorded, file in (*self.rollout_files("step").items(), *self.rollout_files("eval").items()):
            if recorded > step:
                file.unlink()
