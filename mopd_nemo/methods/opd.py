"""On-policy distillation (paper section 3): a teacher scores every token of the student's own responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from mopd_nemo.config import Config, DivergenceConfig
from mopd_nemo.losses.objectives import Divergence, Objective, SampledReverseKL
from mopd_nemo.methods.base import Method, train_example, with_reference
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.peers.metrics import context_metrics
from mopd_nemo.peers.render import PeerContext, plain_contexts
from mopd_nemo.types import RolloutGroup

DISTILLATION = frozenset(
    {"rollout.importance_clip", "train.denominator", "reference"}
    | {f"divergence.{name}" for name in ("kind", "alpha", "support", "k", "tail", "weights", "entry_clip", "targets")}
)
"""Settings of every method that distils."""


class Opd(Method):
    """Distillation without context: the teacher reads what the student read.

    With an external teacher this is the usual teacher-student setting. A frozen self-teacher only pulls back a student
    that something else has changed: at the start the two are the same model.
    """

    teachers: ClassVar = ("external", "frozen", "server")
    uses: ClassVar = DISTILLATION

    @classmethod
    def idle(cls, config: Config) -> dict[str, tuple[str, str]]:
        """What the form of the divergence does not read."""
        kind, support = config.divergence.kind, config.divergence.support
        idle = {}
        if kind != "jsd":
            idle["divergence.alpha"] = (f"divergence.kind={kind}", "set divergence.kind=jsd")
        if support in ("full", "sampled"):
            idle["divergence.tail"] = (
                f"divergence.support={support}",
                "set divergence.support=student_topk or teacher_topk",
            )
        return idle

    def build(self, groups: Sequence[RolloutGroup], step: int) -> TrainBatch:
        """Every rollout has a signal, whatever its verdict."""
        return with_reference(distil(groups, plain_contexts(groups), self.config), self.config)


def distil(groups: Sequence[RolloutGroup], contexts: list[list[PeerContext]], config: Config) -> TrainBatch:
    """One example for each rollout whose context has a signal, all under one divergence (paper eq. 5).

    `divergence.targets` leaves rollouts out by their verdict: they then have no signal. With `train.denominator:
    sampled` the other rollouts are examples, too: with loss 0, at no cost.
    """
    contexts = _gated(groups, contexts, config.divergence.targets)
    examples = [
        train_example(
            groups,
            group_index,
            rollout_index,
            teacher_prompt_ids=context.prompt_ids,
            contrast_prompt_ids=context.contrast_prompt_ids,
        )
        for group_index, members in enumerate(contexts)
        for rollout_index, context in enumerate(members)
        if context.prompt_ids is not None or config.train.denominator == "sampled"
    ]
    taught = tuple(i for i, example in enumerate(examples) if example.teacher_prompt_ids is not None)
    others = tuple(i for i, example in enumerate(examples) if example.teacher_prompt_ids is None)
    objective = divergence_objective(config.divergence)
    terms = [LossTerm(objective, taught, zero_loss=others)] if taught else []
    return TrainBatch(examples, terms, context_metrics(contexts), contexts)


def _gated(
    groups: Sequence[RolloutGroup], contexts: list[list[PeerContext]], targets: Literal["all", "failures", "successes"]
) -> list[list[PeerContext]]:
    """The contexts of the targets that are learned from; the others have no prompt. Unjudged ones are neither."""
    if targets == "all":
        return contexts
    return [
        [
            context if index in getattr(group, targets) else replace(context, prompt_ids=None, contrast_prompt_ids=None)
            for index, context in enumerate(members)
        ]
        for group, members in zip(groups, contexts, strict=True)
    ]


def divergence_objective(config: DivergenceConfig) -> Objective:
    """The configured objective."""
    if config.support == "sampled":
        return SampledReverseKL()
    return Divergence(
        config.kind,
        alpha=config.alpha,
        support=config.support,
        k=config.k,
        tail=config.tail,
        weights=config.weights,
        entry_clip=config.entry_clip,
        contrast=config.contrast,
    )
