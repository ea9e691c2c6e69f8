"""The rollouts of each step: drawn when it begins or, with `rollout.lag: 1`, while the step before it is learned from.

A checkpoint holds those in flight, finished, in `rollouts.jsonl`: the weights that draw them are older than its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mopd_nemo.config import Config
from mopd_nemo.data.load import problems_of_step
from mopd_nemo.engines.base import Engine, InFlight, Progress, Request, Sampling
from mopd_nemo.files import read_rows
from mopd_nemo.types import Problem, Rollout, RolloutGroup
from mopd_nemo.verifiers.pool import PendingVerdicts, VerifierPool

FILE = "rollouts.jsonl"
"""Name of the rollouts in flight within a checkpoint."""


@dataclass(frozen=True, slots=True)
class StepRollouts:
    """The responses to the problems of one step, and their verdicts, some of which may still be pending."""

    problems: list[Problem]
    samples: list[list[Rollout]]
    verdicts: PendingVerdicts
    metrics: dict[str, float]
    """`rollout/lag`: steps between the weights that drew these rollouts and those that learn from them."""

    def judged(self) -> list[RolloutGroup]:
        """The groups, once all verdicts are there."""
        verdicts = self.verdicts.collect(self.problems, self.samples)
        return [
            RolloutGroup(problem, tuple(rollouts), verdict)
            for problem, rollouts, verdict in zip(self.problems, self.samples, verdicts, strict=True)
        ]


@dataclass(slots=True)
class _Pending:
    """The rollouts of one step, drawn or being drawn."""

    step: int
    problems: list[Problem]
    request: Request
    verdicts: PendingVerdicts
    weights: int
    """Number of the step whose update made the weights that draw; 0 for the initial ones."""
    drawing: InFlight | None = None
    samples: list[list[Rollout]] = field(default_factory=list)
    """Those of a checkpoint, of which nothing is left to draw."""

    def on_rollout(self, number: int, sample: int, rollout: Rollout) -> None:
        self.verdicts.add(self.problems[number], sample, rollout)

    def wait(self, on_progress: Progress | None = None) -> list[list[Rollout]]:
        return self.samples if self.drawing is None else self.drawing.wait(on_progress)

    def header(self) -> dict[str, Any]:
        """What decides the responses beside weights and prompts."""
        return {
            "step": self.step,
            "num_samples": self.request.num_samples,
            "max_tokens": self.request.sampling.max_tokens,
            "temperature": self.request.sampling.temperature,
            "seed": self.request.seed,
        }


class RolloutSource:
    """Gives every step its rollouts.

    Args:
        problems: those of training.
        completions: responses that exist already, by problem. None: the student samples.
    """

    def __init__(
        self,
        config: Config,
        problems: list[Problem],
        engine: Engine,
        verifiers: VerifierPool,
        completions: Mapping[str, list[Rollout]] | None,
    ) -> None:
        self._config = config
        self._problems = problems
        self._engine = engine
        self._verifiers = verifiers
        self._completions = completions
        self._ahead: _Pending | None = None
        self._taken: _Pending | None = None
        """The last one that a step was given."""

    def of(self, step: int, on_progress: Progress) -> StepRollouts:
        """The rollouts of a step. With `rollout.lag: 1`, those of the next one begin to be drawn."""
        pending, lagging = self._ahead, self._config.rollout.lag
        if pending is None:
            pending = self._pending(step, weights=step - 1)
            pending.samples = self._draw(pending, on_progress)
        began = time.perf_counter()
        samples = pending.wait(on_progress)
        self._ahead, self._taken = None, pending
        metrics = {"rollout/lag": float(step - 1 - pending.weights)}
        if lagging:
            metrics["seconds/waiting"] = time.perf_counter() - began
        if pending.drawing is not None:
            metrics["seconds/drawing"] = pending.drawing.seconds
        if lagging and step < self._config.train.num_steps:
            self._ahead = self._pending(step + 1, weights=step - 1)
            self._ahead.drawing = self._engine.generate_ahead(self._ahead.request, self._ahead.on_rollout)
        return StepRollouts(pending.problems, samples, pending.verdicts, metrics)

    def rows(self, step: int, on_progress: Progress) -> list[dict[str, Any]]:
        """The rollouts in flight as rows for a checkpoint made after `step`, once they are drawn; none: nothing is.

        A step that could not learn from its rollouts gives them back: older weights have drawn them.
        """
        found = (r for r in (self._taken, self._ahead) if r is not None and r.step == step + 1)
        pending = next(found, None)
        if pending is None or not self._config.rollout.lag:
            return []
        rows: list[dict[str, Any]] = [pending.header() | {"weights": pending.weights}]
        for problem, rollouts in zip(pending.problems, pending.wait(on_progress), strict=True):
            responses = [{"ids": r.response_ids, "finished": r.finished, "logprobs": r.logprobs} for r in rollouts]
            rows.append({"problem": problem.id, "prompt_ids": problem.prompt_ids, "responses": responses})
        return rows

    def restore(self, checkpoint: Path, step: int) -> str:
        """Take up the rollouts in flight of a checkpoint, made after `step`.

        Returns:
            a notice where there are some that this run's settings would not have drawn; they are not used.
        """
        file = checkpoint / FILE
        if not self._config.rollout.lag or not file.exists():
            return ""
        header, *rows = read_rows(file)
        pending = self._pending(step + 1, weights=header["weights"])
        recorded = {name: header[name] for name in pending.header()}
        asked = [(problem.id, list(problem.prompt_ids)) for problem in pending.problems]
        if recorded != pending.header() or [(row["problem"], row["prompt_ids"]) for row in rows] != asked:
            return f"The rollouts in flight of {file} were drawn with other settings: step {step + 1} draws its own."
        pending.samples = [[self._rollout(response) for response in row["responses"]] for row in rows]
        self._ahead = pending
        return ""

    def stop(self) -> None:
        """Give up what is in flight."""
        if self._ahead is not None and self._ahead.drawing is not None:
            self._ahead.drawing.stop()
        self._ahead = None

    def _pending(self, step: int, weights: int) -> _Pending:
        config, rollout = self._config, self._config.rollout
        problems = problems_of_step(self._problems, step, rollout.num_prompts_per_step, config.seed)
        request = Request(
            [problem.prompt_ids for problem in problems],
            rollout.num_rollouts_per_prompt,
            Sampling(rollout.max_response_tokens, rollout.temperature),
            f"train/{config.seed}/{step}",
        )
        return _Pending(step, problems, request, PendingVerdicts(self._verifiers, self._engine.chat), weights)

    def _draw(self, pending: _Pending, on_progress: Progress) -> list[list[Rollout]]:
        if self._completions is not None:
            return [self._completions[problem.id] for problem in pending.problems]
        return self._engine.generate(pending.request, on_progress, pending.on_rollout)

    def _rollout(self, response: Mapping[str, Any]) -> Rollout:
        ids = tuple(response["ids"])
        return Rollout(ids, self._engine.chat.decode(ids), response["finished"], tuple(response["logprobs"]))
