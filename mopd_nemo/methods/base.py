"""What a method is: it decides what each rollout learns from. The trainer knows no method by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config
from mopd_nemo.lesson import Lesson, Part
from mopd_nemo.types import RolloutGroup, TrainRow


class Method(ABC):
    """Turns the verified groups of a step into rows to train on."""

    writer: ClassVar[Literal["student", "teacher"]] = "student"
    """Who writes the responses: the student in every step, or the teacher once and for all."""

    def __init__(self, config: Config, chat: Chat) -> None:
        self.config = config
        self.chat = chat

    @abstractmethod
    def build(self, groups: Sequence[RolloutGroup], step: int) -> Lesson:
        """Pure: the same groups, step and config seed give the same lesson."""


def train_row(
    groups: Sequence[RolloutGroup],
    group_index: int,
    rollout_index: int,
    *,
    teacher_prompt_ids: tuple[int, ...] | None = None,
    advantage: float = 0.0,
) -> TrainRow:
    """The row of one rollout."""
    group = groups[group_index]
    rollout = group.rollouts[rollout_index]
    return TrainRow(
        group_index=group_index,
        rollout_index=rollout_index,
        prompt_ids=group.problem.prompt_ids,
        response_ids=rollout.response_ids,
        sampled_logprobs=rollout.logprobs,
        teacher_prompt_ids=teacher_prompt_ids,
        advantage=advantage,
    )


def signal(parts: Sequence[Part], groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """`signal`: fraction of the step's rollouts that are learned from."""
    taught = {row for part in parts for row in part.rows}
    return {"signal": len(taught) / max(sum(len(group.rollouts) for group in groups), 1)}
