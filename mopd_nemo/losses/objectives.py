"""Objectives that a method may minimise, as data, and the weight of each token in the loss of an update.

An objective says its name and what it reads. The formulas are in `reference.py`. This module needs no torch, so that a
config can be checked without it.

The loss is Σ weight_t · loss_t, with weights fixed by the response lengths of the *whole* update. So it does not depend
on how the examples are split into micro-batches, ordered, packed or spread over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd"]
Support = Literal["full", "student_topk", "teacher_topk"]
TokenWeights = Literal["none", "sharper", "student_entropy", "teacher_certainty", "divergence"]
Aggregation = Literal["token_mean", "sequence_mean"]


class Objective:
    """What to minimise at each response token, or on each pair of responses."""

    name: ClassVar[str]
    """The metric is `loss/NAME`."""
    reads_teacher: ClassVar[bool] = False
    """It compares the student with a teacher."""
    reads_reference: ClassVar[bool] = False
    """It compares the student with its initial weights."""
    reads_sampler: ClassVar[bool] = False
    """It is an expectation over sampled tokens, so importance weights correct for another sampler."""
    reads_old_policy: ClassVar[bool] = False
    """It reads log-probabilities of the policy before the step's first update."""
    pairs: ClassVar[bool] = False
    """It is taken on pairs of responses, chosen and rejected."""

    @property
    def reads_contrast(self) -> bool:
        """It also reads the teacher given failures alone."""
        return False

    @property
    def read_tokens(self) -> Support | Literal["sampled"]:
        """The tokens, at each position, whose probabilities it reads."""
        return "sampled"


@dataclass(frozen=True, slots=True)
class Divergence(Objective):
    """Distance of the student P to a teacher Q; the arguments are those of `reference.token_divergence`."""

    name = "divergence"
    reads_teacher = True
    reads_sampler = True

    kind: DivergenceKind = "jsd"
    alpha: float = 0.5
    support: Support = "student_topk"
    k: int = 100
    tail: bool = True
    weights: TokenWeights = "none"
    """Of each token, between 0 and 1 (`reference.token_weight`)."""
    entry_clip: float | None = None
    """Most that one token of the support adds to the divergence (`reference.divergence_entries`)."""
    contrast: float = 0.0
    """β of `reference.contrasted`; with 0 there is one teacher."""

    @property
    def reads_contrast(self) -> bool:
        """With β > 0, Q contrasts the teacher given successes with the teacher given failures."""
        return self.contrast > 0.0

    @property
    def needs_entries(self) -> bool:
        """It looks at single tokens of the support, so the whole vocabulary is one only as a top-k support."""
        return self.reads_contrast or self.entry_clip is not None

    @property
    def read_tokens(self) -> Support:
        """The support of the divergence."""
        return self.support

    def __post_init__(self) -> None:
        if self.kind == "jsd" and not 0.0 < self.alpha < 1.0:
            raise ValueError(
                f"alpha={self.alpha}: a JSD needs 0 < alpha < 1; at the ends take forward_kl or reverse_kl"
            )
        if self.k < 1:
            raise ValueError(f"k={self.k}: a top-k support needs at least one token")
        if self.contrast > 0.0 and self.support == "full":
            raise ValueError(f"contrast={self.contrast} with support=full: take student_topk or teacher_topk")
        if self.entry_clip is not None and (self.support == "full" or self.entry_clip <= 0.0):
            raise ValueError(f"entry_clip={self.entry_clip}: must be positive, with student_topk or teacher_topk")


@dataclass(frozen=True, slots=True)
class ReferenceKL(Divergence):
    """KL(P‖P_0) to the student's initial weights P_0, which read what the student reads."""

    name = "reference_kl"
    reads_teacher = False
    reads_reference = True

    kind: DivergenceKind = "reverse_kl"


@dataclass(frozen=True, slots=True)
class SampledReverseKL(Objective):
    """KL(P‖Q) through the sampled token alone, as in `reference.sampled_reverse_kl`."""

    name = "divergence"
    reads_teacher = True
    reads_sampler = True


@dataclass(frozen=True, slots=True)
class PolicyGradient(Objective):
    """Clipped policy gradient on each example's advantage, as in `reference.clipped_policy_gradient`."""

    name = "policy_gradient"
    reads_sampler = True
    reads_old_policy = True

    clip_low: float = 0.2
    clip_high: float = 0.28


@dataclass(frozen=True, slots=True)
class Suppression(Objective):
    """The same negative advantage for every unlikely token, as in `reference.suppressed`."""

    name = "suppression"
    reads_sampler = True

    below: float = 0.1


@dataclass(frozen=True, slots=True)
class LogLikelihood(Objective):
    """-log P(y_t): supervised fine-tuning."""

    name = "log_likelihood"


@dataclass(frozen=True, slots=True)
class Dpo(Objective):
    """Direct preference optimisation, as in `reference.dpo_loss`; the teacher is the reference model."""

    name = "dpo"
    reads_teacher = True
    pairs = True

    beta: float


@dataclass(frozen=True, slots=True)
class Simpo(Objective):
    """Simple preference optimisation, as in `reference.simpo_loss`."""

    name = "simpo"
    pairs = True

    beta: float
    margin: float


def token_weights(lengths_N: Sequence[int], aggregation: Aggregation) -> list[float]:
    """Weight of each token of each of N responses, given the lengths of all responses of the update.

    `token_mean`: 1 / Σ lengths. `sequence_mean`: 1 / (N · length). Both sum to 1 over all tokens.
    """
    if not lengths_N:
        return []
    if min(lengths_N) < 1:
        raise ValueError(f"empty response among lengths {list(lengths_N)}")
    if aggregation == "token_mean":
        return [1.0 / sum(lengths_N)] * len(lengths_N)
    return [1.0 / (len(lengths_N) * length) for length in lengths_N]
