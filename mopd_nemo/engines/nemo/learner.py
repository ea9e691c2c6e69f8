"""Updates of the student on a cluster: a lesson becomes calls of `Policy.train` with `LessonLoss`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config
from mopd_nemo.engines.base import Progress
from mopd_nemo.engines.nemo.batches import Targets, train_batch
from mopd_nemo.engines.nemo.packing import even_budget
from mopd_nemo.engines.nemo.scorer import Scorer
from mopd_nemo.engines.updates import cut_by_group, token_weights_of
from mopd_nemo.lesson import Dpo, Lesson, Part, Preference
from mopd_nemo.losses import LogLikelihood, Objective, PolicyGradient, dpo_loss, simpo_loss
from mopd_nemo.types import TrainRow


@dataclass(frozen=True, slots=True)
class _Weighted:
    """A part of an update as a sum over tokens."""

    objective: Objective
    weights: dict[int, Tensor]
    """Per row, of each of its tokens: [response tokens]."""
    loss: float | None
    """Its value, where the sum over tokens only has the same gradient."""


class Learner:
    """See `Engine.update`.

    Args:
        student: a policy whose workers have `TeacherMethods`.
        vocab_size: real tokens.
    """

    def __init__(self, student: Any, scorer: Scorer, config: Config, chat: Chat, vocab_size: int) -> None:
        self._student = student
        self._scorer = scorer
        self._config = config
        self._chat = chat
        self._vocab_size = vocab_size

    def step(
        self,
        lesson: Lesson,
        targets: Sequence[Targets | None],
        learning_rate: float,
        on_progress: Progress | None = None,
    ) -> dict[str, float]:
        """As many updates as `train.num_updates_per_step` asks for; means over them of their metrics."""
        updates = cut_by_group(lesson, self._config.train.num_updates_per_step)
        if not updates:
            return {"update/skipped": 1.0}
        old = None
        if len(updates) > 1 and any(isinstance(part.objective, PolicyGradient) for part in lesson.parts):
            # From the second update on, the policy is no longer the one that the ratios refer to.
            old = self._scorer.sampled_logprobs([(row.prompt_ids, row.response_ids) for row in lesson.rows])
        totals: dict[str, float] = {}
        for done, parts in enumerate(updates, start=1):
            for name, value in self._update(lesson.rows, parts, targets, old, learning_rate).items():
                totals[name] = totals.get(name, 0.0) + value / len(updates)
            if on_progress:
                on_progress(done / len(updates))
        return totals

    def _update(
        self,
        rows: Sequence[TrainRow],
        parts: Sequence[Part],
        targets: Sequence[Targets | None],
        old: Sequence[Tensor] | None,
        learning_rate: float,
    ) -> dict[str, float]:
        from nemo_rl.distributed.batched_data_dict import BatchedDataDict

        from mopd_nemo.engines.nemo.loss import SIGNALS, LessonLoss

        weighted = [self._weighted(part, rows, targets) for part in parts]
        used = sorted({i for part in parts for i in part.rows})
        weights = [
            torch.stack([part.weights.get(i, torch.zeros(len(rows[i].response_ids))) for part in weighted])
            for i in used
        ]
        batch = train_batch(
            [rows[i] for i in used],
            weights,
            [targets[i] for i in used],
            None if old is None else [old[i] for i in used],
            pad_id=self._chat.pad_id,
            length_multiple=self._student.cfg["make_sequence_length_divisible_by"],
            count_multiple=self._student.data_parallel_size,
        )
        watch = min(self._config.divergence.k, self._vocab_size)
        clip = self._config.rollout.importance_clip if "sampler" in batch else None
        student_support = self._config.divergence.support == "student_topk"
        loss = LessonLoss(
            [part.objective for part in weighted],
            clip,
            self._vocab_size,
            watch,
            student_support,
            self._config.nemo.backend,
        )
        self._student.prepare_for_training()
        self._student.run_all_workers_single_data("set_learning_rate", rate=learning_rate)
        start = time.monotonic()
        with _dealt_evenly(self._student, batch):
            result = self._student.train(BatchedDataDict(batch), loss, gbs=len(batch["weights"]), mbs=1)
        seconds = time.monotonic() - start
        sums = {name: math.fsum(values) for name, values in result["all_mb_metrics"].items()}
        num_tokens = sum(len(rows[i].response_ids) for i in parts[0].rows)
        metrics = {name: sums[name] / num_tokens for name in SIGNALS if sums.get(name)}
        metrics |= _losses(weighted, parts, sums)
        grad_norm = float(result["grad_norm"])
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient's norm is {grad_norm}, and it has been applied: continue from the last checkpoint, "
                "with a lower optimizer.learning_rate if this comes again"
            )
        return metrics | {"grad_norm": grad_norm, "update/skipped": 0.0} | _utilisation(result, seconds)

    def _weighted(self, part: Part, rows: Sequence[TrainRow], targets: Sequence[Targets | None]) -> _Weighted:
        weights = token_weights_of(
            part, rows, self._config.train.aggregation, piece=lambda token: self._chat.decode([token])
        )
        objective = part.objective
        if isinstance(objective, Preference):
            return self._preference(part, objective, weights, rows, targets)
        return _Weighted(objective, {i: torch.tensor(weights[i]) for i in part.rows}, None)

    def _preference(
        self,
        part: Part,
        objective: Preference,
        weights: dict[int, list[float]],
        rows: Sequence[TrainRow],
        targets: Sequence[Targets | None],
    ) -> _Weighted:
        """A loss on pairs as weights of log-likelihoods, so that the two of a pair may lie on different ranks.

        With c_i the derivative of the loss at row i's log P, taken at the student as it is, Σ c_i·log P_i has the
        gradient of the loss; one update needs no more. It costs a pass of the student without gradient.
        """
        members = sorted(set(part.rows))
        place = {i: position for position, i in enumerate(members)}
        found = self._scorer.sampled_logprobs([(rows[i].prompt_ids, rows[i].response_ids) for i in members])
        logprobs_N = torch.stack([part_R.sum() for part_R in found]).requires_grad_()
        lengths_N = torch.tensor([len(rows[i].response_ids) for i in members])
        chosen, rejected = ([place[i] for i in part.rows[start::2]] for start in (0, 1))
        if isinstance(objective, Dpo):
            reference_N = torch.stack([_reference(targets[i]) for i in members])
            pairs = dpo_loss(
                logprobs_N[chosen], logprobs_N[rejected], reference_N[chosen], reference_N[rejected], objective.beta
            )
        else:
            pairs = simpo_loss(
                logprobs_N[chosen],
                logprobs_N[rejected],
                lengths_N[chosen],
                lengths_N[rejected],
                objective.beta,
                objective.margin,
            )
        loss = (pairs * torch.tensor([weights[i][0] for i in part.rows[::2]])).sum()
        (slope_N,) = torch.autograd.grad(loss, logprobs_N)
        own = {i: -slope_N[place[i]].expand(len(rows[i].response_ids)) for i in members}
        return _Weighted(LogLikelihood(), own, loss.item())


@contextmanager
def _dealt_evenly(student: Any, batch: dict[str, Any]) -> Iterator[None]:
    """Meanwhile `Policy.train`, which takes its budget from its config, packs so that no rank waits for another."""
    packing = student.cfg["sequence_packing"]
    whole = packing["train_mb_tokens"]
    if packing["enabled"]:
        lengths = batch["input_lengths"].tolist()
        packing["train_mb_tokens"] = even_budget(
            lengths, whole, student.data_parallel_size, student.sequence_packing_args
        )
    try:
        yield
    finally:
        packing["train_mb_tokens"] = whole


def _reference(target: Targets | None) -> Tensor:
    assert target is not None
    return target.logprobs_RK.float().sum()


def _losses(weighted: Sequence[_Weighted], parts: Sequence[Part], sums: dict[str, float]) -> dict[str, float]:
    """`loss`, and with several parts `loss/<objective>`, named as the local engine does."""
    values = [sums[f"loss/{n}"] if part.loss is None else part.loss for n, part in enumerate(weighted)]
    losses = {"loss": math.fsum(values)}
    if len(parts) > 1:
        for part, value in zip(parts, values, strict=True):
            name = "policy_gradient" if isinstance(part.objective, PolicyGradient) else "divergence"
            losses[f"loss/{name}"] = value
    return losses


def _utilisation(result: dict[str, Any], seconds: float) -> dict[str, float]:
    """`mfu`: floating-point operations of the update over what the GPUs could have done, where NeMo-RL knows both."""
    if not result.get("total_flops") or not result.get("theoretical_tflops"):
        return {}
    return {"mfu": result["total_flops"] / (seconds * result["theoretical_tflops"] * 1e12)}
