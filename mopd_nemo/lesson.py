"""What one step learns from: rows, and the objective that each is learned by. Methods make it, engines read it."""

from __future__ import annotations

from dataclasses import dataclass, field

from mopd_nemo.losses.objectives import Objective
from mopd_nemo.peers.contexts import PeerContext
from mopd_nemo.types import TrainRow


@dataclass(frozen=True, slots=True)
class Dpo:
    """Direct preference optimisation (`losses.preference.dpo_loss`); the teacher is the reference."""

    beta: float


@dataclass(frozen=True, slots=True)
class Simpo:
    """Simple preference optimisation (`losses.preference.simpo_loss`)."""

    beta: float
    margin: float


Preference = Dpo | Simpo
"""An objective on pairs of whole responses; `losses.objectives.Objective` are those on single tokens."""


@dataclass(frozen=True, slots=True)
class Part:
    """One objective and the rows of the lesson that it is taken over. A row may belong to several parts."""

    objective: Objective | Preference
    rows: tuple[int, ...]
    """Indices into the lesson's rows. For a preference: chosen, rejected, chosen, rejected, ..."""
    weight: float = 1.0
    """Of this part in the step's loss."""
    silent: tuple[int, ...] = ()
    """Rows whose loss is known to be zero: they count in the mean and cost no pass."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one step learns from. The step's loss is Σ part.weight · mean loss of the part."""

    rows: list[TrainRow]
    parts: list[Part]
    metrics: dict[str, float] = field(default_factory=dict)
    contexts: list[list[PeerContext]] | None = None
    """Per group and rollout, what its teacher reads; for logs and for looking at. None: no teacher reads anything."""
