"""The seam: what the pipeline asks of an engine, which runs the models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from mopd_nemo.types import Rollout

if TYPE_CHECKING:  # not at run time: `engines.vllm` imports this module in environments that lack what these need
    from mopd_nemo.chat import Chat
    from mopd_nemo.methods.batch import TrainBatch

Progress = Callable[[float], None]
"""Called with the fraction of a phase that is done, 0 to 1."""

OnRollout = Callable[[int, int, Rollout], None]
"""Called with the index of the prompt, the index of the sample and the rollout, as soon as it is finished."""

Targets = TypeVar("Targets")
"""A teacher's targets, in a form that only its own engine reads."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


class Engine(Protocol[Targets]):
    """A student, its teacher and an optimiser. Token ids in, token ids and numbers out."""

    chat: Chat

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        num_samples: int,
        sampling: Sampling,
        seed: str,
        on_progress: Progress | None = None,
        on_rollout: OnRollout | None = None,
    ) -> list[list[Rollout]]:
        """`num_samples` responses for each prompt, in order; the same seed gives the same ones.

        An engine that can tell when a single rollout is finished calls `on_rollout` then, in any order.
        """
        ...

    def score(self, batch: TrainBatch, on_progress: Progress | None = None) -> tuple[Targets, dict[str, float]]:
        """Teacher targets of the examples that have a teacher prompt, and metrics of the pass."""
        ...

    def update(
        self,
        batch: TrainBatch,
        targets: Targets,
        learning_rate: float,
        on_progress: Progress | None = None,
    ) -> dict[str, float]:
        """`train.num_updates_per_step` optimiser updates on the batch; returns metrics. No terms: no update.

        Args:
            targets: what `score` gave for this batch.
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
        """Move the teacher after the student, as `teacher.kind` says."""
        ...

    def save(self, directory: Path) -> None:
        """Write student (as a Hugging Face model), teacher and optimiser into an existing empty directory."""
        ...

    def load(self, directory: Path) -> None:
        """Continue exactly from a checkpoint of `save`."""
        ...


def seed_of(name: str) -> int:
    """A seed below 2^56 for a name such as `train/0/17/3`: torch and vLLM both take it."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
