"""The values that pass through the pipeline: small, frozen, and without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12


class Message(TypedDict):
    """One chat turn, as chat templates expect it."""

    role: str
    content: str


class Outcome(StrEnum):
    """A verifier's finding. Only `CORRECT` is right; only `VERIFIER_ERROR` is not caused by the model."""

    CORRECT = "correct"
    WRONG = "wrong"
    BAD_FORMAT = "bad_format"
    TRUNCATED = "truncated"
    TIMEOUT = "timeout"
    VERIFIER_ERROR = "verifier_error"


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt with a checkable answer."""

    id: str
    messages: tuple[Message, ...]
    """The student's prompt; the last message is the user's."""
    answer: Any
    """The gold answer, in the form of the task's verifier."""
    task: str
    """Name of the verifier."""
    prompt_ids: tuple[int, ...] = ()
    """`messages` under the student's chat template; empty until `chat.with_prompt_ids`."""
    teacher: str = ""
    """Name of its teacher among several; empty with a single one."""
    privileged: str = ""
    """Text for the teacher alone, such as a reference solution; empty where there is none."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response."""

    response_ids: tuple[int, ...]
    """The sampled token ids, the end-of-turn token included when the model produced it."""
    text: str
    """`response_ids` decoded without special tokens. Scores always use the ids."""
    finished: bool
    """False when the response was truncated at the token limit."""
    logprobs: tuple[float, ...]
    """Log-probability (nats) of each sampled token under the distribution it was sampled from; empty when unknown."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verifier's judgement of one rollout."""

    reward: float
    outcome: Outcome
    feedback: str = ""
    """An environment's message about a failure. It reveals the gold answer only if the config says so."""
    details: dict[str, Any] = field(default_factory=dict)
    informative: bool = True
    """False where the feedback says no more than that the response failed."""
    success: bool | None = None
    """Whether the reward reaches τ of eq. 3 (`verifiers.base.decide`). None: it could not be judged."""
    seconds: float = field(default=0.0, compare=False)
    """Wall-clock time of the judging, without the wait for a worker."""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All rollouts of one problem in one step, with their verdicts, in sampling order."""

    problem: Problem
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...]

    def __post_init__(self) -> None:
        if len(self.rollouts) != len(self.verdicts):
            raise ValueError(
                f"group {self.problem.id}: {len(self.rollouts)} rollouts but {len(self.verdicts)} verdicts"
            )

    @property
    def successes(self) -> tuple[int, ...]:
        """Indices of S(x), eq. 3."""
        return tuple(i for i, verdict in enumerate(self.verdicts) if verdict.success)

    @property
    def failures(self) -> tuple[int, ...]:
        """Indices of F(x), eq. 3."""
        return tuple(i for i, verdict in enumerate(self.verdicts) if verdict.success is False)

    @property
    def judged(self) -> tuple[int, ...]:
        """Indices of the rollouts that the verifier could judge."""
        return tuple(i for i, verdict in enumerate(self.verdicts) if verdict.success is not None)


@dataclass(frozen=True, slots=True)
class TrainExample:
    """One response to learn from, with the prompts of student and teacher.

    The student scores `prompt_ids + response_ids`, the teacher `teacher_prompt_ids + response_ids`. Both score the same
    sampled ids, so token t of the response is the same event for both.
    """

    group_index: int
    """Index of the rollout group within the step."""
    rollout_index: int
    """Index of the rollout within its group."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    sampled_logprobs: tuple[float, ...]
    """Log-probabilities of the response ids from the sampler; empty when unknown."""
    teacher_prompt_ids: tuple[int, ...] | None = None
    """None: no teacher scores this response."""
    advantage: float = 0.0
    """Of the whole response, for policy gradients."""
    contrast_prompt_ids: tuple[int, ...] | None = None
    """Prompt with failures alone: the teacher's distribution after it is the other side of a contrast."""
    teacher: str = ""
    """Name of the teacher that scores it; empty with a single one."""
    masked: tuple[int, ...] = ()
    """Positions of the response tokens that have loss 0. They count in the mean."""
