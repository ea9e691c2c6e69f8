"""One optimiser step of the student on the divergence to its teacher.

Shape suffixes: T response tokens of a micro-batch, H hidden size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mopd_nemo.config import Config, DivergenceConfig
from mopd_nemo.engines.base import Progress
from mopd_nemo.engines.local.batching import micro_batches
from mopd_nemo.engines.local.model import LanguageModel
from mopd_nemo.losses import Divergence, Head, Objective, SampledReverseKL, Tokens, token_loss, token_weights
from mopd_nemo.types import TrainRow


class Learner:
    """AdamW over the student."""

    def __init__(self, student: LanguageModel, config: Config) -> None:
        self._student = student
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
        self,
        rows: Sequence[TrainRow],
        targets: Sequence[Tensor],
        teacher_head: nn.Module,
        learning_rate: float,
        on_progress: Progress | None,
    ) -> dict[str, float]:
        """Gradient over all rows, one update.

        Args:
            targets: per row, the teacher's hidden states of the response tokens.

        Returns:
            `loss`, `grad_norm`, `update/skipped`, and means over tokens of the signals of `losses.signals`.
        """
        if not rows:
            return {"update/skipped": 1.0}
        self.optimizer.zero_grad(set_to_none=True)
        num_tokens = sum(len(row.response_ids) for row in rows)
        weights = token_weights([len(row.response_ids) for row in rows], self._config.divergence.aggregation)
        totals: defaultdict[str, float] = defaultdict(float)
        done = 0
        lengths = [len(row.prompt_ids) + len(row.response_ids) for row in rows]
        for batch in micro_batches(lengths, self._config.train.tokens_per_micro_batch):
            weights_T = torch.cat([torch.full((len(rows[i].response_ids),), weights[i]) for i in batch])
            sums = self._backward([rows[i] for i in batch], [targets[i] for i in batch], weights_T, teacher_head)
            for name, value in sums.items():
                totals[name] += value
            done += len(batch)
            if on_progress:
                on_progress(done / len(rows))
        metrics = {name: total / num_tokens for name, total in totals.items() if name != "loss"}
        return {"loss": totals["loss"], **metrics, **self._apply(learning_rate)}

    def _backward(
        self, rows: Sequence[TrainRow], targets: Sequence[Tensor], weights_T: Tensor, teacher_head: nn.Module
    ) -> dict[str, float]:
        """Accumulate the gradient of one micro-batch; sums of its loss and signals over tokens."""
        student = self._student
        tokens = Tokens(
            ids_T=torch.tensor([token for row in rows for token in row.response_ids], device=student.device),
            sampler_logprobs_T=torch.tensor(
                [logprob for row in rows for logprob in row.sampled_logprobs], device=student.device
            ),
        )
        with student.computing():
            student_TH = student.response_hidden_TH([r.prompt_ids for r in rows], [r.response_ids for r in rows])
            result = token_loss(
                objective(self._config.divergence),
                _head(student_TH, student.head),
                tokens,
                _head(torch.cat(list(targets)), teacher_head),
                weights_T=weights_T.to(student.device),
                watch=self._config.divergence.k,
            )
        result.total.backward()
        return {"loss": result.total.item(), **{name: x_T.sum().item() for name, x_T in result.signals.items()}}

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


def objective(config: DivergenceConfig) -> Objective:
    """What the config's `divergence` section asks for."""
    if config.support == "sampled":
        return SampledReverseKL()
    return Divergence(config.kind, config.alpha, config.support, config.k, config.tail)


def _head(hidden_TH: Tensor, module: Any) -> Head:
    return Head(hidden_TH, module.weight, module.bias)
