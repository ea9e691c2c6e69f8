"""Updates of the student on a cluster: `Policy.train` with `BatchLoss`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config
from mopd_nemo.engines.base import Progress
from mopd_nemo.engines.nemo.batches import NO_ROW, train_batch
from mopd_nemo.engines.nemo.dealing import dealt, lanes
from mopd_nemo.engines.nemo.scorer import Scorer, Targets
from mopd_nemo.losses.logits import TopK
from mopd_nemo.losses.objectives import LogLikelihood, Objective
from mopd_nemo.losses.reference import pair_loss
from mopd_nemo.methods.batch import LossTerm, TrainBatch


@dataclass(frozen=True, slots=True)
class _Weighted:
    """A term of an update as a weighted sum over tokens."""

    objective: Objective
    weights: dict[int, Tensor]
    """Per example, the weight of each response token: [response tokens]."""
    loss: float | None
    """Its value, if the sum over tokens has only its gradient."""


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
        batch: TrainBatch,
        targets: Targets,
        rank_of: Sequence[int],
        learning_rate: float,
        on_progress: Progress | None = None,
    ) -> dict[str, float]:
        """`train.num_updates_per_step` updates. Returns the means of their metrics.

        Args:
            rank_of: the data-parallel rank of each example.
        """
        updates = batch.updates(self._config.train.num_updates_per_step)
        if not updates:
            return {"update/skipped": 1.0}
        old = None
        if len(updates) > 1 and any(term.objective.reads_old_policy for term in batch.terms):
            # The ratios refer to the policy before the first update.
            old = self._scorer.sampled_logprobs([(e.prompt_ids, e.response_ids) for e in batch.examples])
        totals: dict[str, float] = {}
        for done, terms in enumerate(updates, start=1):
            for name, value in self._update(batch, terms, targets, rank_of, old, learning_rate).items():
                totals[name] = totals.get(name, 0.0) + value / len(updates)
            if on_progress:
                on_progress(done / len(updates))
        if any(key != NO_ROW for key in targets.keys):
            self._scorer.forget()
        return totals

    def _update(
        self,
        batch: TrainBatch,
        terms: Sequence[LossTerm],
        targets: Targets,
        rank_of: Sequence[int],
        old: Sequence[Tensor] | None,
        learning_rate: float,
    ) -> dict[str, float]:
        from mopd_nemo.engines.nemo.workers.loss import SIGNALS, BatchLoss

        weighted = [self._weighted(term, batch, targets.here) for term in terms]
        used = sorted({i for term in terms for i in term.examples})
        rows = [batch.examples[i] for i in used]
        order = lanes([rank_of[i] for i in used], self._student.data_parallel_size)
        keys = [targets.keys[i] for i in used]
        weights = [
            torch.stack([term.weights.get(i, torch.zeros(len(row.response_ids))) for term in weighted])
            for i, row in zip(used, rows, strict=True)
        ]
        data = train_batch(
            rows,
            weights,
            [targets.here[i] for i in used],
            None if old is None else [old[i] for i in used],
            pad_id=self._chat.pad_id,
            length_multiple=self._student.cfg["make_sequence_length_divisible_by"],
            filler=len(order) - len(rows),
            keys=keys if any(key != NO_ROW for key in keys) else None,
        )
        watch = min(self._config.divergence.k, self._vocab_size)
        clip = self._config.rollout.importance_clip if "sampler" in data else None
        student_support = self._config.divergence.support == "student_topk"
        loss = BatchLoss(
            [term.objective for term in weighted],
            clip,
            self._vocab_size,
            watch,
            student_support,
            self._config.nemo.backend,
        )
        self._student.prepare_for_training()
        self._student.run_all_workers_single_data("set_learning_rate", rate=learning_rate)
        if self._config.lora.dropout:
            self._student.run_all_workers_single_data("seed_dropout", seed=str(self._config.seed))
        start = time.monotonic()
        result = self._student.train(dealt(data, order), loss, gbs=len(order), mbs=1)
        seconds = time.monotonic() - start
        sums = {name: math.fsum(values) for name, values in result["all_mb_metrics"].items()}
        num_tokens = sum(len(batch.examples[i].response_ids) for i in terms[0].examples)
        metrics = {name: sums[name] / num_tokens for name in SIGNALS if sums.get(name)}
        metrics |= _losses(weighted, terms, sums)
        grad_norm = float(result["grad_norm"])
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient's norm is {grad_norm}, and the update has been applied: continue from the last "
                "checkpoint, with a lower optimizer.learning_rate if this happens again"
            )
        return metrics | {"grad_norm": grad_norm, "update/skipped": 0.0} | _utilisation(result, seconds)

    def _weighted(self, term: LossTerm, batch: TrainBatch, targets: Sequence[TopK | None]) -> _Weighted:
        weights = batch.token_weights(term, self._config.train.aggregation)
        if term.objective.pairs:
            return self._pairs(term, {i: own[0] for i, own in weights.items()}, batch, targets)
        return _Weighted(term.objective, {i: torch.tensor(weights[i]) for i in term.examples}, None)

    def _pairs(
        self, term: LossTerm, weights: dict[int, float], batch: TrainBatch, targets: Sequence[TopK | None]
    ) -> _Weighted:
        """A loss on pairs as weights of log-likelihoods, so that the two of a pair may be on different ranks.

        Let c_i be the derivative of the loss with respect to example i's log P, at the present student. Then
        Σ c_i·log P_i has the gradient of the loss, which is all that one update needs. It costs a pass of the student
        without gradient.
        """
        members = [batch.examples[i] for i in term.examples]
        logprobs = self._scorer.sampled_logprobs([(e.prompt_ids, e.response_ids) for e in members])
        logprobs_2N = torch.stack([part_R.sum() for part_R in logprobs]).requires_grad_()
        lengths = [len(example.response_ids) for example in members]
        reference_2N = None
        if term.objective.reads_teacher:
            reference_2N = torch.stack([_reference(targets[i]) for i in term.examples])
        loss_N = pair_loss(term.objective, logprobs_2N, torch.tensor(lengths), reference_2N)
        loss = (loss_N * torch.tensor([weights[i] for i in term.examples[::2]])).sum()
        (slope_2N,) = torch.autograd.grad(loss, logprobs_2N)
        token_weights = {i: torch.zeros(len(batch.examples[i].response_ids)) for i in term.examples}
        for i, slope in zip(term.examples, slope_2N, strict=True):
            token_weights[i] -= slope  # an example may be in several pairs
        return _Weighted(LogLikelihood(), token_weights, loss.item())


def _reference(target: TopK | None) -> Tensor:
    assert target is not None
    return target.logprobs_TK.float().sum()


def _losses(weighted: Sequence[_Weighted], terms: Sequence[LossTerm], sums: dict[str, float]) -> dict[str, float]:
    """`loss`, and with several terms `loss/OBJECTIVE`, as the local engine names them."""
    values = [sums[f"loss/{n}"] if term.loss is None else term.loss for n, term in enumerate(weighted)]
    losses = {"loss": math.fsum(values)}
    if len(terms) > 1:
        losses |= {f"loss/{term.objective.name}": value for term, value in zip(terms, values, strict=True)}
    return losses


def _utilisation(result: dict[str, Any], seconds: float) -> dict[str, float]:
    """`mfu`: floating-point operations of the update as a share of the GPUs' peak, if NeMo-RL reports both."""
    if not result.get("total_flops") or not result.get("theoretical_tflops"):
        return {}
    return {"mfu": result["total_flops"] / (seconds * result["theoretical_tflops"] * 1e12)}
