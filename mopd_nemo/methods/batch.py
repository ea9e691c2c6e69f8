"""The batch of one step: examples, and the loss terms over them. Methods make it, engines read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mopd_nemo.losses.objectives import Aggregation, Objective, token_weights
from mopd_nemo.peers.leaks import Leak
from mopd_nemo.peers.render import PeerContext
from mopd_nemo.types import TrainExample


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One objective and the examples that it is averaged over. An example may belong to several terms."""

    objective: Objective
    examples: tuple[int, ...]
    """Indices into the batch's examples. For an objective on pairs: chosen, rejected, chosen, rejected, ..."""
    weight: float = 1.0
    """Of this term in the step's loss."""
    zero_loss: tuple[int, ...] = ()
    """Further examples whose loss is known to be zero: they count in the mean and cost no pass."""

    @property
    def units(self) -> list[tuple[int, ...]]:
        """Examples that must share a micro-batch: the two of a pair, or each alone."""
        size = 2 if self.objective.pairs else 1
        return [self.examples[i : i + size] for i in range(0, len(self.examples), size)]


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """What one step learns from. The step's loss is Σ term.weight · mean loss of the term."""

    examples: list[TrainExample]
    terms: list[LossTerm]
    metrics: dict[str, float] = field(default_factory=dict)
    contexts: list[list[PeerContext]] | None = None
    """Per group and rollout, what its teacher reads; for records. None: no teacher reads anything."""
    leaks: list[list[tuple[Leak, ...]]] | None = None
    """Per group and rollout, where it speaks of what only a teacher reads; for records."""

    def updates(self, count: int) -> list[list[LossTerm]]:
        """The terms of each of at most `count` optimiser updates. Examples of one group stay together."""
        groups = sorted({example.group_index for example in self.examples})
        size = -(-len(groups) // count) if groups else 1
        update_of_group = {group: position // size for position, group in enumerate(groups)}
        update_of = [update_of_group[example.group_index] for example in self.examples]

        def within(indices: Sequence[int], update: int) -> tuple[int, ...]:
            return tuple(i for i in indices if update_of[i] == update)

        updates = [
            [
                replace(term, examples=within(term.examples, update), zero_loss=within(term.zero_loss, update))
                for term in self.terms
            ]
            for update in range(count)
        ]
        return [kept for terms in updates if (kept := [term for term in terms if term.examples])]

    def token_weights(self, term: LossTerm, aggregation: Aggregation) -> dict[int, list[float]]:
        """Per example, the weight of each of its tokens in the update's loss: 0 for masked ones, which still count.

        For pairs, each token has the weight of its pair.

        Args:
            term: as one update has it.
        """
        if term.objective.pairs:
            return {i: [term.weight / len(term.units)] * len(self.examples[i].response_ids) for i in term.examples}
        counted = [*term.examples, *term.zero_loss]
        weights = token_weights([len(self.examples[i].response_ids) for i in counted], aggregation)
        return {i: self._masked(i, term.weight * weight) for i, weight in zip(counted, weights, strict=True)}

    def _masked(self, i: int, weight: float) -> list[float]:
        example = self.examples[i]
        own = [weight] * len(example.response_ids)
        for position in example.masked:
            own[position] = 0.0
        return own
