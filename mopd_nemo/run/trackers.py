"""Optional metric sinks beside the JSONL files: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from mopd_nemo.config import Config, UserError
from mopd_nemo.run.directory import RunDirectory


class Tracker(Protocol):
    """Receives the same rows as the JSONL files."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_trackers(config: Config) -> None:
    """Raise UserError if a tracker's package is missing, before anything expensive starts."""
    packages = {"tensorboard": config.logging.tensorboard, "wandb": config.logging.wandb != "off"}
    for package, enabled in packages.items():
        if enabled and importlib.util.find_spec(package) is None:
            value = getattr(config.logging, package)
            raise UserError(
                f"logging.{package}={value}: {package} is not installed; pip install 'mopd-nemo[{package}]'"
            )


def make_trackers(config: Config, run: RunDirectory) -> list[Tracker]:
    """The configured trackers; a resumed run continues their histories."""
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(_TensorBoard(run))
    if config.logging.wandb != "off":
        trackers.append(_WeightsAndBiases(config, run))
    return trackers


class _TensorBoard:
    def __init__(self, run: RunDirectory) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, config: Config, run: RunDirectory) -> None:
        import wandb

        id_file = run.path / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        mode: Any = config.logging.wandb
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=config.name,
            id=id_file.read_text(),
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(run.path),
            config=config.model_dump(mode="json"),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
