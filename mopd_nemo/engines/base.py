"""The seam: what the pipeline asks of an engine, which runs the models."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from mopd_nemo.types import Rollout

if TYPE_CHECKING:  # not at run time: `engines.vllm` imports this module in environments that lack what these need
    from mopd_nemo.chat import Chat
    from mopd_nemo.methods.batch import TrainBatch

Progress = Callable[[float], None]
"""Called with the fraction of a phase that is done, 0 to 1."""

OnRollout = Callable[[int, int, Rollout], None]
"""Called with the index of the prompt, the index of the sample and the rollout, as soon as it is finished."""

Draw = Callable[[Progress, OnRollout], list[list[Rollout]]]
"""Draws responses, as `Engine.generate` gives them."""

SHOWN_EVERY = 0.2
"""Seconds between two looks at the progress of rollouts that are waited for."""
GIVEN_UP_AFTER = 10.0
"""Seconds that a thread has to end after a stop. It holds nothing that the end of the process would not free."""

Targets = TypeVar("Targets")
"""A teacher's targets, in a form that only its own engine reads."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """Responses to be drawn. An engine gives the same request the same ones, as long as its weights are the same."""

    prompts: Sequence[tuple[int, ...]]
    """Token ids of each."""
    num_samples: int
    """Responses for each prompt."""
    sampling: Sampling
    seed: str

    def __len__(self) -> int:
        """Responses in all."""
        return len(self.prompts) * self.num_samples


@dataclass
class TokenCounts:
    """Positions that forward passes have computed."""

    positions: int = 0
    padding: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(self.positions + other.positions, self.padding + other.padding)

    def metrics(self, phase: str, tokens_alone: int) -> dict[str, float]:
        """Positions computed, the sum of the sequences' lengths (`tokens_alone`), and the share of padding."""
        if not self.positions:
            return {}
        share = self.padding / self.positions
        return {f"{phase}/tokens": self.positions, f"{phase}/tokens_alone": tokens_alone, f"{phase}/padding": share}


@dataclass(frozen=True, slots=True)
class TokenSignal:
    """What student and teacher say of each token of one response: T tokens, K likeliest tokens. Nats, float32."""

    student: np.ndarray
    """[T] log P of the sampled token."""
    teacher: np.ndarray
    """[T] log Q of the sampled token."""
    divergence: np.ndarray
    """[T] the divergence that the token is learned under, before any weight of its response."""
    student_top_ids: np.ndarray
    """[T, K] the student's likeliest tokens, likeliest first."""
    student_top: np.ndarray
    """[T, K] their log-probabilities."""
    teacher_top_ids: np.ndarray
    """[T, K] the teacher's likeliest tokens."""
    teacher_top: np.ndarray
    """[T, K] their log-probabilities."""

    @property
    def advantage(self) -> np.ndarray:
        """[T] log Q - log P of the sampled token: negative where the teacher objects."""
        return self.teacher - self.student


class InFlight:
    """Responses that a thread draws while its caller goes on.

    Args:
        draw: runs in the thread.
        on_rollout: is called in the thread.
    """

    def __init__(self, draw: Draw, on_rollout: OnRollout = lambda *_: None) -> None:
        self.seconds = 0.0
        """That drawing has taken, once it is done."""
        self._draw, self._on_rollout = draw, on_rollout
        self._fraction = 0.0
        self._stopped = threading.Event()
        self._drawn: Future[list[list[Rollout]]] = Future()
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()

    def wait(self, on_progress: Progress | None = None) -> list[list[Rollout]]:
        """The responses, once they are all there. Raises what the thread has raised."""
        while wait([self._drawn], timeout=SHOWN_EVERY).not_done:
            if on_progress:
                on_progress(self._fraction)
        return self._drawn.result()

    def stop(self) -> None:
        """Give the responses up, and wait for the thread, which ends when it finishes a response."""
        self._stopped.set()
        self._thread.join(GIVEN_UP_AFTER)

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            drawn = self._draw(self._progress, self._finish)
        except BaseException as error:
            self._drawn.set_exception(error)
        else:
            self.seconds = time.perf_counter() - started
            self._drawn.set_result(drawn)

    def _progress(self, fraction: float) -> None:
        self._fraction = fraction
        self._check()

    def _finish(self, prompt: int, sample: int, rollout: Rollout) -> None:
        self._check()
        self._on_rollout(prompt, sample, rollout)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise CancelledError


class Engine(Protocol[Targets]):
    """A student, its teacher and an optimiser. Token ids in, token ids and numbers out."""

    chat: Chat

    def generate(
        self,
        request: Request,
        on_progress: Progress | None = None,
        on_rollout: OnRollout | None = None,
    ) -> list[list[Rollout]]:
        """The responses for each prompt, in order.

        `on_rollout` is called when a single rollout is finished, in any order.
        """
        ...

    def generate_ahead(
        self,
        request: Request,
        on_rollout: OnRollout,
    ) -> InFlight:
        """What `generate` gives now, drawn by the student's present weights while other methods change them.

        Args:
            on_rollout: is called in another thread.
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

    def token_signal(self, batch: TrainBatch, targets: Targets, top: int) -> list[TokenSignal | None]:
        """Per example of a batch, what the student and its teacher say of each token now. None: no teacher scores it.

        Args:
            targets: what `score` gave for this batch.
            top: how many of the likeliest tokens to tell.
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

    def checkpoint_bytes(self) -> int:
        """About how much `save` will write; 0: unknown before the first one is there."""
        ...

    def load(self, directory: Path) -> None:
        """Continue exactly from a checkpoint of `save`."""
        ...


def added(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of scoring by several teachers: sums, but for `score/padding`, a share of the computed positions."""
    totals: dict[str, float] = {}
    for own in metrics:
        for name, value in own.items():
            weight = own["score/tokens"] if name == "score/padding" else 1
            totals[name] = totals.get(name, 0) + weight * value
    if "score/padding" in totals:
        totals["score/padding"] /= totals["score/tokens"]
    return totals


def seed_of(name: str) -> int:
    """A seed below 2^56 for a name such as `train/0/17/3`: torch and vLLM both take it."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
