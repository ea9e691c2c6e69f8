"""Forward and backward pass of a micro-batch: each row is read once, for all objectives that it is learned by.

Shape suffixes: T response tokens of the micro-batch, M of them that a part looks at, N pairs, H hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mopd_nemo.config import Config
from mopd_nemo.engines.local.model import LanguageModel
from mopd_nemo.lesson import Dpo, Part, Preference
from mopd_nemo.losses import (
    Divergence,
    Head,
    LogLikelihood,
    PolicyGradient,
    SampledReverseKL,
    Tokens,
    dpo_loss,
    simpo_loss,
    token_loss,
)
from mopd_nemo.types import TrainRow


@dataclass(frozen=True, slots=True)
class WeightedPart:
    """A part of a lesson as one update sees it."""

    part: Part
    weights: dict[int, list[float]]
    """Per row: of each of its tokens in the update's loss; for a preference, of its pair."""


class Passes:
    """Passes over the rows of a lesson.

    Args:
        targets: per row, the teacher's hidden states [response tokens, H], where it has a teacher prompt.
    """

    def __init__(
        self,
        student: LanguageModel,
        teacher: LanguageModel | None,
        rows: Sequence[TrainRow],
        targets: Sequence[Tensor | None],
        config: Config,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._rows = rows
        self._targets = targets
        self._config = config
        self._old: dict[int, Tensor] = {}

    @torch.no_grad()
    def remember_logprobs(self, batch: Sequence[int]) -> None:
        """Keep what the student gives the rows now: what ratios of later updates refer to."""
        with self._student.computing():
            hidden_TH = self._hidden_TH(batch)
            loss_T = token_loss(LogLikelihood(), self._head(self._student, hidden_TH), self._tokens(batch)).loss_T
        for i, loss in zip(batch, loss_T.split([len(self._rows[i].response_ids) for i in batch]), strict=True):
            self._old[i] = -loss

    def backward(self, batch: Sequence[int], parts: Sequence[WeightedPart]) -> dict[str, float]:
        """Accumulate the gradient of a micro-batch.

        Returns:
            `loss`, with several parts also `loss/<objective>`, and sums over the tokens of the first part of signals.
        """
        totals: defaultdict[str, float] = defaultdict(float)
        with self._student.computing():
            hidden_TH = self._hidden_TH(batch)
            loss = hidden_TH.new_zeros((), dtype=torch.float32)
            for weighted in parts:
                wanted = set(weighted.part.rows)
                mine = [i for i in batch if i in wanted]
                if not mine:
                    continue
                hidden_MH = hidden_TH if len(mine) == len(batch) else hidden_TH[self._positions(batch, wanted)]
                first = weighted is parts[0]
                if isinstance(weighted.part.objective, Preference):
                    value, signals = self._preference(mine, hidden_MH, weighted, weighted.part.objective), {}
                else:
                    value, signals = self._on_tokens(mine, hidden_MH, weighted, watch=first)
                loss = loss + value
                totals["loss"] += value.item()
                if len(parts) > 1:
                    totals[f"loss/{_name(weighted.part)}"] += value.item()
                for name, signal_M in signals.items():
                    totals[name] += signal_M.sum().item()
        loss.backward()
        return totals

    def _on_tokens(
        self, mine: Sequence[int], hidden_MH: Tensor, weighted: WeightedPart, watch: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        objective = weighted.part.objective
        assert not isinstance(objective, Preference)
        weights_M = torch.tensor([weight for i in mine for weight in weighted.weights[i]], device=hidden_MH.device)
        compares = isinstance(objective, Divergence | SampledReverseKL)
        corrects = compares or isinstance(objective, PolicyGradient)
        result = token_loss(
            objective,
            self._head(self._student, hidden_MH),
            self._tokens(mine),
            self._teacher_head(mine) if compares else None,
            weights_T=weights_M,
            importance_clip=self._config.rollout.importance_clip if corrects else None,
            watch=self._config.divergence.k if watch else None,
        )
        return result.total, result.signals

    def _preference(
        self, mine: Sequence[int], hidden_MH: Tensor, weighted: WeightedPart, objective: Preference
    ) -> Tensor:
        """Loss of the pairs of a micro-batch: chosen, rejected, chosen, rejected, ..."""
        chosen_N, rejected_N = self._summed(self._head(self._student, hidden_MH), mine)
        if isinstance(objective, Dpo):
            with torch.no_grad():
                reference = self._summed(self._teacher_head(mine), mine)
            loss_N = dpo_loss(chosen_N, rejected_N, *reference, objective.beta)
        else:
            lengths = torch.tensor([len(self._rows[i].response_ids) for i in mine], device=hidden_MH.device)
            loss_N = simpo_loss(chosen_N, rejected_N, lengths[::2], lengths[1::2], objective.beta, objective.margin)
        return (loss_N * torch.tensor([weighted.weights[i][0] for i in mine[::2]], device=loss_N.device)).sum()

    def _summed(self, head: Head, mine: Sequence[int]) -> tuple[Tensor, Tensor]:
        """log P of the chosen and of the rejected responses, summed over tokens: each [N]."""
        loss_M = token_loss(LogLikelihood(), head, self._tokens(mine)).loss_T
        sums = -torch.stack([part.sum() for part in loss_M.split([len(self._rows[i].response_ids) for i in mine])])
        return sums[::2], sums[1::2]

    def _hidden_TH(self, batch: Sequence[int]) -> Tensor:
        rows = [self._rows[i] for i in batch]
        return self._student.response_hidden_TH([row.prompt_ids for row in rows], [row.response_ids for row in rows])

    def _head(self, model: LanguageModel, hidden_TH: Tensor) -> Head:
        return Head(hidden_TH, model.head.weight, model.head.bias)

    def _teacher_head(self, mine: Sequence[int]) -> Head:
        assert self._teacher is not None
        hidden = [self._targets[i] for i in mine]
        return self._head(self._teacher, torch.cat([part for part in hidden if part is not None]))

    def _tokens(self, mine: Sequence[int]) -> Tokens:
        device = self._student.device
        rows = [self._rows[i] for i in mine]
        sampled = all(row.sampled_logprobs for row in rows)
        return Tokens(
            torch.tensor([token for row in rows for token in row.response_ids], device=device),
            torch.tensor([row.advantage for row in rows for _ in row.response_ids], device=device),
            torch.cat([self._old[i] for i in mine]) if self._old.keys() >= set(mine) else None,
            torch.tensor([x for row in rows for x in row.sampled_logprobs], device=device) if sampled else None,
        )

    def _positions(self, batch: Sequence[int], wanted: set[int]) -> Tensor:
        """Positions of the response tokens of some rows among those of the micro-batch."""
        flags = [i in wanted for i in batch for _ in self._rows[i].response_ids]
        return torch.tensor(flags, device=self._student.device).nonzero().squeeze(-1)


def _name(part: Part) -> str:
    return "policy_gradient" if isinstance(part.objective, PolicyGradient) else "divergence"
