"""The optimiser of the student: one or several updates from a batch.

Each example passes the model once, for all terms that it belongs to.

Shape suffixes: T response tokens of a micro-batch, M of them in a term, N pairs, H hidden size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mopd_nemo.config import Config
from mopd_nemo.engines.base import Progress, TokenCounts, TokenSignal
from mopd_nemo.engines.local.model import LanguageModel
from mopd_nemo.engines.local.optimizer import make_optimizer
from mopd_nemo.engines.local.targets import Target, joined, joined_hidden
from mopd_nemo.losses.logits import Head, Tokens, TopK
from mopd_nemo.losses.objectives import Divergence, LogLikelihood, Objective
from mopd_nemo.losses.reference import pair_loss
from mopd_nemo.losses.token_loss import token_loss
from mopd_nemo.losses.token_signal import read_tokens
from mopd_nemo.methods.batch import LossTerm, TrainBatch

Targets = Sequence[Target | None]
"""Per example; None: no teacher scores it."""


class Learner:
    """Updates of what is trained of the student."""

    def __init__(self, student: LanguageModel, config: Config) -> None:
        self._student = student
        self._config = config
        self.optimizer = make_optimizer(student, config)

    def step(
        self, batch: TrainBatch, targets: Targets, learning_rate: float, on_progress: Progress | None
    ) -> dict[str, float]:
        """Gradients and updates over all examples of a batch.

        Returns:
            Means over updates of `loss`, with several terms also `loss/OBJECTIVE`, of `grad_norm` and `update/skipped`,
            and of the signals of `losses.chunk` over the tokens of the first term.
        """
        updates = batch.updates(self._config.train.num_updates_per_step)
        if not updates:
            return {"update/skipped": 1.0}
        passes = _Passes(self._student, batch, targets, self._config)
        if len(updates) > 1 and any(term.objective.reads_old_policy for term in batch.terms):
            # The ratios refer to the policy before the first update.
            for micro_batch in self._micro_batches(batch, batch.terms):
                passes.remember_logprobs(micro_batch)
        totals: defaultdict[str, float] = defaultdict(float)
        for number, terms in enumerate(updates):
            metrics = self._accumulate(passes, batch, terms, _share(on_progress, number, len(updates)))
            for name, value in (metrics | self._apply(learning_rate)).items():
                totals[name] += value / len(updates)
        return dict(totals)

    @torch.no_grad()
    def token_signal(self, batch: TrainBatch, targets: Targets, top: int) -> list[TokenSignal | None]:
        """Per example with a target, what student and teacher say of each token; a pass of the student."""
        taught = tuple(i for i, target in enumerate(targets) if target is not None and target.taught)
        distilled = (term.objective for term in batch.terms if isinstance(term.objective, Divergence))
        objective = next(distilled, Divergence("reverse_kl", support="full"))
        passes = _Passes(self._student, batch, targets, self._config)
        signals: list[TokenSignal | None] = [None] * len(targets)
        for micro_batch in self._micro_batches(batch, [LossTerm(objective, taught)]):
            for part in passes.by_teacher(micro_batch):
                for i, signal in zip(part, passes.token_signal(part, objective, top), strict=True):
                    signals[i] = signal
        return signals

    def _accumulate(
        self, passes: _Passes, batch: TrainBatch, terms: Sequence[LossTerm], on_progress: Progress | None
    ) -> dict[str, float]:
        """Gradient of one update; its loss, and the signals' means over the tokens of its first term that have them."""
        self.optimizer.zero_grad(set_to_none=True)
        weighted = [(term, batch.token_weights(term, self._config.train.aggregation)) for term in terms]
        totals: defaultdict[str, float] = defaultdict(float)
        watched: defaultdict[str, list[Tensor]] = defaultdict(list)
        micro_batches = self._micro_batches(batch, terms)
        self._student.counts = TokenCounts()
        update = self._updates_done() if self._config.lora.dropout else 0
        for done, micro_batch in enumerate(micro_batches, start=1):
            with self._student.dropping(f"{self._config.seed}/dropout/{update}/{done}"):
                losses = passes.backward(micro_batch, weighted, watched)
            for name, value in losses.items():
                totals[name] += value
            if on_progress:
                on_progress(done / len(micro_batches))
        metrics = totals | {name: torch.cat(parts).double().mean().item() for name, parts in watched.items()}
        members = [batch.examples[i] for micro_batch in micro_batches for i in micro_batch]
        alone = sum(len(example.prompt_ids) + len(example.response_ids) for example in members)
        return metrics | self._student.counts.metrics("update", alone)

    def _updates_done(self) -> int:
        """The optimiser's own count, which a checkpoint has. To read it, this process waits for a GPU."""
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0)

    def _micro_batches(self, batch: TrainBatch, terms: Sequence[LossTerm]) -> list[list[int]]:
        """Micro-batches of examples; the two of a pair stay together."""
        units = list(dict.fromkeys(unit for term in terms for unit in term.units))
        examples = batch.examples
        sequences = [[examples[i].prompt_ids + examples[i].response_ids for i in unit] for unit in units]
        micro_batches = self._student.batches(sequences, self._config.train.tokens_per_micro_batch)
        return [[i for unit in micro_batch for i in units[unit]] for micro_batch in micro_batches]

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


class _Passes:
    """Forward and backward passes over the micro-batches of one batch."""

    def __init__(
        self,
        student: LanguageModel,
        batch: TrainBatch,
        targets: Targets,
        config: Config,
    ) -> None:
        self._student = student
        self._examples = batch.examples
        self._targets = targets
        self._config = config
        self._old_logprobs: dict[int, Tensor] = {}

    @torch.no_grad()
    def remember_logprobs(self, micro_batch: Sequence[int]) -> None:
        """Keep the student's present log-probabilities, which the ratios of later updates refer to."""
        with self._student.computing():
            student = self._head(self._hidden_TH(micro_batch))
            loss_T = token_loss(LogLikelihood(), student, self._tokens(micro_batch)).loss_T
        for i, part_T in zip(micro_batch, loss_T.split(self._lengths(micro_batch)), strict=True):
            self._old_logprobs[i] = -part_T

    def token_signal(self, micro_batch: Sequence[int], objective: Divergence, top: int) -> list[TokenSignal]:
        """Of each of some examples, whose teacher is one and in this process."""
        with self._student.computing():
            student, teacher, divergence_T = read_tokens(
                objective,
                self._head(self._hidden_TH(micro_batch)),
                self._tokens(micro_batch),
                joined_hidden(self._targets_of(micro_batch), self._student.dtype),
                contrast=self._contrast(objective, micro_batch),
                top=top,
            )
        values = (student.sampled_T, teacher.sampled_T, divergence_T)
        tops = (student.top.ids_TK, student.top.logprobs_TK, teacher.top.ids_TK, teacher.top.logprobs_TK)
        parts = (of_all.cpu().split(self._lengths(micro_batch)) for of_all in (*values, *tops))
        return [TokenSignal(*(part.numpy() for part in own)) for own in zip(*parts, strict=True)]

    def backward(
        self,
        micro_batch: Sequence[int],
        terms: Sequence[tuple[LossTerm, dict[int, list[float]]]],
        watched: dict[str, list[Tensor]],
    ) -> dict[str, float]:
        """Accumulate the gradient of a micro-batch.

        Args:
            terms: each with its weights, as `TrainBatch.token_weights` gives them.
            watched: is given the signals of the first term's tokens.

        Returns:
            The losses of `Learner.step`.
        """
        totals: defaultdict[str, float] = defaultdict(float)
        with self._student.computing():
            hidden_TH = self._hidden_TH(micro_batch)
            loss = hidden_TH.new_zeros((), dtype=torch.float32)
            for number, term, weights, some in self._parts(micro_batch, terms):
                all_of_it = len(some) == len(micro_batch)
                student = self._head(hidden_TH if all_of_it else hidden_TH[self._positions(micro_batch, set(some))])
                if term.objective.pairs:
                    value, signals = self._pair_loss(term, some, student, weights), {}
                else:
                    watch = number == 0 and not term.objective.reads_reference
                    value, signals = self._token_loss(term, some, student, weights, watch)
                loss = loss + value
                totals["loss"] += value.item()
                if len(terms) > 1:
                    totals[f"loss/{term.objective.name}"] += value.item()
                for name, signal_M in signals.items():
                    watched[name].append(signal_M)
        loss.backward()
        return totals

    def by_teacher(self, some: Sequence[int]) -> list[list[int]]:
        """Examples in parts, each with one teacher in this process, or with served ones."""
        parts: dict[nn.Linear | None, list[int]] = {}
        for i in some:
            target = self._targets[i]
            parts.setdefault(None if target is None else target.head, []).append(i)
        return list(parts.values())

    def _parts(
        self, micro_batch: Sequence[int], terms: Sequence[tuple[LossTerm, dict[int, list[float]]]]
    ) -> Iterator[tuple[int, LossTerm, dict[int, list[float]], list[int]]]:
        """The examples of a micro-batch that a loss is computed on at once, with number, term and weights."""
        for number, (term, weights) in enumerate(terms):
            members = set(term.examples)
            some = [i for i in micro_batch if i in members]
            for part in self.by_teacher(some) if term.objective.reads_teacher else [some]:
                if part:
                    yield number, term, weights, part

    def _token_loss(
        self, term: LossTerm, some: Sequence[int], student: Head, weights: dict[int, list[float]], watch: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights_M = [weight for i in some for weight in weights[i]]
        result = token_loss(
            term.objective,
            student,
            self._tokens(some),
            self._teacher_of(term.objective, some),
            contrast=self._contrast(term.objective, some),
            weights_T=torch.tensor(weights_M, device=self._student.device),
            importance_clip=self._config.rollout.importance_clip if term.objective.reads_sampler else None,
            watch=self._config.divergence.k if watch else None,
        )
        return result.total, result.signals

    def _pair_loss(self, term: LossTerm, some: Sequence[int], student: Head, weights: dict[int, list[float]]) -> Tensor:
        """Loss of the pairs of a micro-batch: chosen, rejected, chosen, rejected, ..."""
        logprobs_2N = self._summed_2N(student, some)
        reference_2N = None
        if term.objective.reads_teacher:
            with torch.no_grad():
                reference_2N = self._summed_2N(joined_hidden(self._targets_of(some), self._student.dtype), some)
        lengths_2N = torch.tensor(self._lengths(some), device=logprobs_2N.device)
        loss_N = pair_loss(term.objective, logprobs_2N, lengths_2N, reference_2N)
        return (loss_N * torch.tensor([weights[i][0] for i in some[::2]], device=loss_N.device)).sum()

    def _summed_2N(self, head: Head, some: Sequence[int]) -> Tensor:
        """log P of each response, summed over its tokens."""
        loss_M = token_loss(LogLikelihood(), head, self._tokens(some)).loss_T
        return -torch.stack([part_M.sum() for part_M in loss_M.split(self._lengths(some))])

    def _hidden_TH(self, micro_batch: Sequence[int]) -> Tensor:
        examples = [self._examples[i] for i in micro_batch]
        return self._student.response_hidden_TH([e.prompt_ids for e in examples], [e.response_ids for e in examples])

    def _head(self, hidden_TH: Tensor) -> Head:
        return Head(hidden_TH, self._student.head.weight, self._student.head.bias)

    def _targets_of(self, some: Sequence[int]) -> list[Target]:
        return [target for i in some if (target := self._targets[i]) is not None]

    def _teacher_of(self, objective: Objective, some: Sequence[int]) -> Head | TopK | None:
        """What the objective compares the student with."""
        if objective.reads_reference:
            references = [target.reference for target in self._targets_of(some) if target.reference is not None]
            return joined(references, self._student.dtype)
        return joined(self._targets_of(some), self._student.dtype) if objective.reads_teacher else None

    def _contrast(self, objective: Objective, some: Sequence[int]) -> Head | None:
        if not objective.reads_contrast:
            return None
        return joined_hidden(self._targets_of(some), self._student.dtype, contrast=True)

    def _tokens(self, some: Sequence[int]) -> Tokens:
        device = self._student.device
        examples = [self._examples[i] for i in some]
        sampled = all(example.sampled_logprobs for example in examples)
        return Tokens(
            torch.tensor([token for e in examples for token in e.response_ids], device=device),
            torch.tensor([e.advantage for e in examples for _ in e.response_ids], device=device),
            torch.cat([self._old_logprobs[i] for i in some]) if self._old_logprobs.keys() >= set(some) else None,
            torch.tensor([x for e in examples for x in e.sampled_logprobs], device=device) if sampled else None,
        )

    def _lengths(self, some: Sequence[int]) -> list[int]:
        return [len(self._examples[i].response_ids) for i in some]

    def _positions(self, micro_batch: Sequence[int], members: set[int]) -> Tensor:
        """Positions of the response tokens of some examples among those of the micro-batch."""
        flags = [i in members for i in micro_batch for _ in self._examples[i].response_ids]
        return torch.tensor(flags, device=self._student.device).nonzero().squeeze(-1)


def _share(on_progress: Progress | None, number: int, count: int) -> Progress | None:
    """Progress within the `number`-th of `count` equal parts."""
    return (lambda done: on_progress((number + done) / count)) if on_progress else None
