"""The base of all methods. A method decides what each rollout learns from; trainer and engines know none by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config, UserError
from mopd_nemo.config.plugins import method_class
from mopd_nemo.losses.objectives import ReferenceKL
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import RolloutGroup, TrainExample


class Method(ABC):
    """Turns the verified groups of a step into a batch to train on."""

    teachers: ClassVar[tuple[str, ...]] = ("none",)
    """Kinds of teacher (`teacher.kind`) that it works with; the first is its default."""
    uses: ClassVar[frozenset[str]] = frozenset()
    """What it reads of the settings that not every method uses (`config.checks.OPTIONAL`): keys and whole sections.
    Setting another one is an error."""
    preset: ClassVar[Mapping[str, Any]] = {}
    """By dotted key, its own defaults. One that is not in `uses` cannot be changed."""
    reads_peers: ClassVar[bool] = False
    """Its teacher reads contexts of up to `peers.max_context_tokens`, not only the student's prompt."""
    pairs: ClassVar[bool] = False
    """It compares two responses of a group by their log-probabilities, one model's after the other's."""
    samples: ClassVar[bool] = True
    """The student samples responses in every step. False: it learns from those of the file `gkd.completions`."""

    def __init__(self, config: Config, chat: Chat) -> None:
        self.config = config
        self.chat = chat

    @classmethod
    def idle(cls, config: Config) -> dict[str, tuple[str, str]]:
        """Of `uses`, what has no effect beside the config's other settings. Setting it is an error.

        Returns:
            by key or section, the setting that leaves it without effect, and what would give it one.
        """
        return {}

    @abstractmethod
    def build(self, groups: Sequence[RolloutGroup], step: int) -> TrainBatch:
        """Pure: the same groups, step and config seed give the same batch."""


def make_method(config: Config, chat: Chat) -> Method:
    """The configured method.

    Raises:
        UserError: it is none.
    """
    method = method_class(config.method)
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise UserError(f"method={config.method}: not a subclass of mopd_nemo.methods.base.Method")
    return method(config, chat)


def train_example(
    groups: Sequence[RolloutGroup],
    group_index: int,
    rollout_index: int,
    *,
    teacher_prompt_ids: tuple[int, ...] | None = None,
    contrast_prompt_ids: tuple[int, ...] | None = None,
    advantage: float = 0.0,
) -> TrainExample:
    """The example of one rollout."""
    group = groups[group_index]
    rollout = group.rollouts[rollout_index]
    return TrainExample(
        group_index=group_index,
        rollout_index=rollout_index,
        prompt_ids=group.problem.prompt_ids,
        response_ids=rollout.response_ids,
        sampled_logprobs=rollout.logprobs,
        teacher_prompt_ids=teacher_prompt_ids,
        contrast_prompt_ids=contrast_prompt_ids,
        teacher=group.problem.teacher,
        advantage=advantage,
    )


def with_reference(batch: TrainBatch, config: Config) -> TrainBatch:
    """The batch with a pull of all its examples to the initial weights, if `reference.kl` asks for one."""
    if not config.reference.kl or not batch.terms:
        return batch
    every = tuple(range(len(batch.examples)))
    term = LossTerm(ReferenceKL(k=config.divergence.k), every, config.reference.kl)
    return replace(batch, terms=[*batch.terms, term])


def distinct_responses(group: RolloutGroup, indices: Sequence[int]) -> list[int]:
    """Of some rollouts, the first with each response."""
    first: dict[tuple[int, ...], int] = {}
    for index in indices:
        first.setdefault(group.rollouts[index].response_ids, index)
    return list(first.values())


def learned_fraction(terms: Sequence[LossTerm], groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """`signal`: fraction of the step's rollouts that are learned from."""
    learned = {example for term in terms for example in term.examples}
    return {"signal": len(learned) / max(sum(len(group.rollouts) for group in groups), 1)}
