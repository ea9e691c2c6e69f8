"""What to minimise at one response token, as data, and the mathematics on a few log-probabilities.

Every objective here is a function of the student's log-probabilities of a few tokens: the support of a divergence, or
the sampled token. The one that is not, the full-vocabulary divergence, is in `dense.py`.

Shape suffixes: T response tokens, K support.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mopd_nemo.losses.divergence import Kind, Support, support_divergence
from mopd_nemo.losses.policy import clipped_policy_gradient
from mopd_nemo.losses.sources import Tokens


@dataclass(frozen=True, slots=True)
class Divergence:
    """Distance of the student P to a teacher Q; the arguments are those of `token_divergence`."""

    kind: Kind = "jsd"
    alpha: float = 0.5
    support: Support = "student_topk"
    k: int = 100
    tail: bool = True

    def __post_init__(self) -> None:
        if self.kind == "jsd" and not 0.0 < self.alpha < 1.0:
            raise ValueError(
                f"alpha={self.alpha}: a JSD needs 0 < alpha < 1; at the ends take forward_kl or reverse_kl"
            )
        if self.k < 1:
            raise ValueError(f"k={self.k}: a top-k support needs at least one token")


@dataclass(frozen=True, slots=True)
class SampledReverseKL:
    """KL(P‖Q) through the sampled token alone, as in `sampled_reverse_kl`."""


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """Clipped policy gradient on `Tokens.advantages_T`, as in `clipped_policy_gradient`."""

    clip_low: float = 0.2
    clip_high: float = 0.28


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """-log P(y_t): supervised fine-tuning, or with the sign turned what DPO and SimPO add up."""


Objective = Divergence | SampledReverseKL | PolicyGradient | LogLikelihood


def needs_teacher(objective: Objective) -> bool:
    """Whether the objective compares with a teacher."""
    return isinstance(objective, Divergence | SampledReverseKL)


def loss_on_support(objective: Objective, student_TK: Tensor, teacher_TK: Tensor | None, tokens: Tokens) -> Tensor:
    """loss_T from log-probabilities of the support; of the sampled token alone (K = 1) except for a divergence."""
    match objective:
        case Divergence():
            assert teacher_TK is not None
            return support_divergence(student_TK, teacher_TK, objective.kind, objective.alpha, objective.tail)
        case SampledReverseKL():
            assert teacher_TK is not None
            student_T, teacher_T = student_TK.squeeze(-1), teacher_TK.squeeze(-1)
            return (student_T - teacher_T).detach() * student_T
        case PolicyGradient():
            assert tokens.advantages_T is not None
            student_T = student_TK.squeeze(-1)
            return clipped_policy_gradient(
                student_T, tokens.old_logprobs_T, tokens.advantages_T, objective.clip_low, objective.clip_high
            )
        case LogLikelihood():
            return -student_TK.squeeze(-1)
