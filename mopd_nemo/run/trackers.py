"""Optional sinks of metrics and sample groups beside the JSONL files: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config, UserError
from mopd_nemo.peers.render import PeerContext
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.rollouts import Row, describe_peers, mixed_first, rollout_records
from mopd_nemo.terminal import shortened, visible
from mopd_nemo.types import RolloutGroup

GROUPS, CHARACTERS = 4, 4000
"""Shown of a step, and of each text."""
COLUMNS = ("problem", "rollout", "outcome", "reward", "tokens", "response", "teacher read", "teacher prompt")
"""Of a table of groups."""


class Tracker(Protocol):
    """Receives the same rows as the JSONL files, and some groups of rollouts."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def groups(self, step: int, kind: str, rows: Sequence[Row]) -> None:
        """Show rollouts with their verdicts and what their teachers read. `kind`: train or held_out."""
        ...

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


class Trackers:
    """All trackers of a run."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.all = tuple(trackers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        for tracker in self.all:
            tracker.log(step, metrics)

    def groups(
        self,
        step: int,
        kind: str,
        groups: Sequence[RolloutGroup],
        contexts: Sequence[Sequence[PeerContext]] | None,
        chat: Chat,
    ) -> None:
        """Show some of a step's groups; see `run.rollouts.rollout_records`."""
        if self.all:
            rows = groups_to_show(rollout_records(step, groups, contexts, chat))
            for tracker in self.all:
                tracker.groups(step, kind, rows)

    def close(self) -> None:
        """Let them write what they have."""
        for tracker in self.all:
            tracker.close()


def make_trackers(config: Config, run: RunDirectory) -> Trackers:
    """The configured trackers; a resumed run continues their histories."""
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(_TensorBoard(run))
    if config.logging.wandb != "off":
        trackers.append(_WeightsAndBiases(config, run))
    return Trackers(trackers)


def groups_to_show(rows: Iterable[Row]) -> list[Row]:
    """Of a step's recorded rollouts the groups with the most to see, their texts without the middle of long ones."""
    shown: list[Row] = []
    for group in mixed_first(rows)[:GROUPS]:
        for row in group:
            texts = {name: shortened(row[name], CHARACTERS) for name in ("response", "teacher_prompt") if row[name]}
            shown.append({**row, **texts})
    return shown


class _TensorBoard:
    def __init__(self, run: RunDirectory) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def groups(self, step: int, kind: str, rows: Sequence[Row]) -> None:
        lines = []
        for row in rows:
            peers = describe_peers(row) if row["teacher_prompt"] else "no teacher"
            lines.append(f"{row['problem']}, rollout {row['rollout']}: {row['outcome']}; teacher read: {peers}")
            lines += ["", *str(row["response"]).splitlines(), ""]
        # Indented: TensorBoard renders Markdown, and a model's text is none.
        self._writer.add_text(f"{kind}/groups", "\n".join(f"    {visible(line)}" for line in lines), step)
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

    def groups(self, step: int, kind: str, rows: Sequence[Row]) -> None:
        import wandb

        data: list[Iterable[Any]] = [
            [
                *(row["problem"], row["rollout"], str(row["outcome"]), row["reward"], row["response_tokens"]),
                *(row["response"], describe_peers(row) if row["teacher_prompt"] else "", row["teacher_prompt"] or ""),
            ]
            for row in rows
        ]
        self._run.log({f"{kind}/groups": wandb.Table(columns=list(COLUMNS), data=data)}, step=step)

    def close(self) -> None:
        self._run.finish()
