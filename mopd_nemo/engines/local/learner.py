"""The optimiser over the student: a lesson becomes one or several updates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mopd_nemo.config import Config
from mopd_nemo.engines.base import Progress
from mopd_nemo.engines.local.model import LanguageModel, Work
from mopd_nemo.engines.local.passes import Passes, WeightedPart
from mopd_nemo.engines.updates import cut_by_group, token_weights_of
from mopd_nemo.lesson import Lesson, Part, Preference
from mopd_nemo.losses import PolicyGradient
from mopd_nemo.types import TrainRow


class Learner:
    """AdamW over the student.

    Args:
        teacher: whose hidden states `step` is given; None when no row has a teacher.
        piece: text of a token, for finding reasoning steps.
    """

    def __init__(
        self, student: LanguageModel, teacher: LanguageModel | None, config: Config, piece: Callable[[int], str]
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._piece = piece
        self._config = config
        matrices = [p for p in student.module.parameters() if p.dim() >= 2]
        vectors = [p for p in student.module.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.optimizer.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
        )

    def step(
        self, lesson: Lesson, targets: Sequence[Tensor | None], learning_rate: float, on_progress: Progress | None
    ) -> dict[str, float]:
        """Gradients and updates over all rows of a lesson.

        Args:
            targets: per row, the teacher's hidden states of the response tokens, where it has a teacher prompt.

        Returns:
            Means over updates of `loss`, `grad_norm`, `update/skipped`, and of the signals of `losses.signals`.
        """
        updates = cut_by_group(lesson, self._config.train.num_updates_per_step)
        if not updates:
            return {"update/skipped": 1.0}
        passes = Passes(self._student, self._teacher, lesson.rows, targets, self._config)
        if len(updates) > 1 and any(isinstance(part.objective, PolicyGradient) for part in lesson.parts):
            # From the second update on, the policy is no longer the one that the ratios refer to.
            for batch in self._batches(lesson.rows, lesson.parts):
                passes.remember_logprobs(batch)
        totals: defaultdict[str, float] = defaultdict(float)
        for number, parts in enumerate(updates):
            found = self._accumulate(passes, lesson.rows, parts, _share(on_progress, number, len(updates)))
            for name, value in (found | self._apply(learning_rate)).items():
                totals[name] += value / len(updates)
        return dict(totals)

    def _accumulate(
        self, passes: Passes, rows: Sequence[TrainRow], parts: Sequence[Part], on_progress: Progress | None
    ) -> dict[str, float]:
        """Gradient of one update; its loss, and the signals' means over the tokens of its first part."""
        self.optimizer.zero_grad(set_to_none=True)
        aggregation = self._config.train.aggregation
        weighted = [WeightedPart(part, token_weights_of(part, rows, aggregation, self._piece)) for part in parts]
        totals: defaultdict[str, float] = defaultdict(float)
        batches = self._batches(rows, parts)
        self._student.work = Work()
        for done, batch in enumerate(batches, start=1):
            for name, value in passes.backward(batch, weighted).items():
                totals[name] += value
            if on_progress:
                on_progress(done / len(batches))
        num_tokens = sum(len(rows[i].response_ids) for i in parts[0].rows)
        metrics = {name: total if name.startswith("loss") else total / num_tokens for name, total in totals.items()}
        alone = sum(len(rows[i].prompt_ids) + len(rows[i].response_ids) for batch in batches for i in batch)
        return metrics | self._student.work.metrics("update", alone)

    def _batches(self, rows: Sequence[TrainRow], parts: Sequence[Part]) -> list[list[int]]:
        """Micro-batches of rows; the two of a pair stay together."""
        units: dict[tuple[int, ...], None] = {}
        for part in parts:
            size = 2 if isinstance(part.objective, Preference) else 1
            units |= dict.fromkeys(part.rows[i : i + size] for i in range(0, len(part.rows), size))
        members = list(units)
        sequences = [[rows[i].prompt_ids + rows[i].response_ids for i in unit] for unit in members]
        batches = self._student.batches(sequences, self._config.train.tokens_per_micro_batch)
        return [[row for unit in batch for row in members[unit]] for batch in batches]

    def _apply(self, learning_rate: float) -> dict[str, float]:
        parameters = [p for p in self._student.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._config.optimizer.max_grad_norm).item()
        skipped = not math.isfinite(norm)
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "update/skipped": float(skipped)}


def _share(on_progress: Progress | None, number: int, count: int) -> Progress | None:
    """Progress of one of `count` equal stretches."""
    return (lambda done: on_progress((number + done) / count)) if on_progress else None
