"""The seam between the pipeline and what runs the models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mopd_nemo.chat import Chat
from mopd_nemo.lesson import Lesson
from mopd_nemo.types import Rollout, TrainRow

Progress = Callable[[float], None]
"""Called with the fraction done of a long phase, 0 to 1."""

OnRollout = Callable[[int, int, Rollout], None]
"""Called with the prompt's number, the sample's number and the rollout, as soon as it is finished."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


class Engine(Protocol):
    """A student, its teacher and an optimiser. Token ids in, token ids and numbers out."""

    chat: Chat

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        num_samples: int,
        sampling: Sampling,
        seed: str,
        on_progress: Progress | None = None,
        writer: Literal["student", "teacher"] = "student",
        on_rollout: OnRollout | None = None,
    ) -> list[list[Rollout]]:
        """`num_samples` responses for each prompt, in order; the same seed gives the same ones.

        An engine that knows when a rollout is finished says so through `on_rollout`, once for each, in any order.
        """
        ...

    def score(self, rows: Sequence[TrainRow], on_progress: Progress | None = None) -> Any:
        """Teacher targets of the rows that have a teacher prompt, in a form that only this engine's `update` reads."""
        ...

    def update(
        self,
        lesson: Lesson,
        targets: Any,
        learning_rate: float,
        on_progress: Progress | None = None,
    ) -> dict[str, float]:
        """`train.num_updates_per_step` optimiser updates on the lesson; returns metrics. No parts: no update.

        Args:
            targets: what `score` gave for the lesson's rows.
        """
        ...

    def response_logprobs(
        self,
        prompts: Sequence[tuple[int, ...]],
        responses: Sequence[tuple[int, ...]],
        on_progress: Progress | None = None,
    ) -> list[tuple[float, ...]]:
        """Log-probability (nats, temperature 1) that the student gives each token of each response after its prompt."""
        ...

    def update_teacher(self) -> None:
        """Let the teacher follow the student, as `teacher.kind` says."""
        ...

    def save(self, directory: Path) -> None:
        """Write student (as a Hugging Face model), teacher and optimiser into an existing empty directory."""
        ...

    def load(self, directory: Path) -> None:
        """Continue exactly from what `save` wrote."""
        ...
