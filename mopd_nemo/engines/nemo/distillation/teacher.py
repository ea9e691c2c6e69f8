"""A teacher for NeMo-RL's distillation loop that shows each rollout its peers.

`nemo_rl.algorithms.distillation.distillation_train` asks its teacher three things. A NeMo-RL policy answers with its
logits on the student's own rows. This one answers in the same form about other rows: it puts rollouts back into their
groups, takes their verdicts, lets a method build what the teacher reads, has that scored, and lays the answer on the
positions of the student's rows.

Shape suffixes: B rows of the loop's batch, S positions, T response tokens of a row, K support.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopd_nemo.chat import Chat
from mopd_nemo.config import UserError
from mopd_nemo.engines.nemo.distillation.data import ProblemBook, Verdicts
from mopd_nemo.engines.nemo.scorer import Scorer
from mopd_nemo.losses.logits import TopK
from mopd_nemo.losses.objectives import Divergence
from mopd_nemo.methods.batch import TrainBatch
from mopd_nemo.peers.metrics import group_metrics
from mopd_nemo.types import Rollout, RolloutGroup

Build = Callable[[Sequence[RolloutGroup], int], TrainBatch]
"""A method's `build`: (groups, step) → what is learned from them."""
Log = Callable[[Mapping[str, float], int], None]
"""(metrics, step) → written down."""
UNTAUGHT = -100.0
"""Log-probability where there is nothing to learn: no infinity, which times a weight of 0 would not be 0."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a response lies in the loop's batch."""

    row: int
    start: int
    """Position of its first token."""
    length: int


class PeerTeacher:
    """In the place of the teacher policy; the student, or the policy of an external teacher, does the scoring.

    Args:
        scorer: knows the policies.
        build: of the method.
        problems: whose processor made the prompts.
        verdicts: of the environments that judge the loop's rollouts.
        chat: the student's.
        group_size: rollouts of a prompt, which follow one another in the batch.
        end_ids: tokens that end a response.
        steps_done: of the run that is continued.
        log: takes the metrics of each step.
    """

    def __init__(
        self,
        scorer: Scorer,
        build: Build,
        problems: ProblemBook,
        verdicts: Verdicts,
        chat: Chat,
        *,
        group_size: int,
        end_ids: Collection[int],
        steps_done: int,
        log: Log,
    ) -> None:
        self._scorer = scorer
        self._build = build
        self._problems = problems
        self._verdicts = verdicts
        self._chat = chat
        self._group_size = group_size
        self._end_ids = frozenset(end_ids)
        self._step = steps_done
        self._log = log

    def prepare_for_lp_inference(self) -> None:
        """Nothing yet: the scorer brings in who scores, one after the other."""

    def offload_after_refit(self) -> None:
        """Nothing any more: the scorer has sent away who must not stay."""

    def get_topk_logits(
        self, data: Any, k: int, micro_batch_size: int | None = None, timer: Any | None = None
    ) -> dict[str, Tensor]:
        """What the teacher gives the tokens that the loss compares: log-probabilities under its whole vocabulary.

        Args:
            data: the loop's batch: `input_ids`, `token_mask` [B, S], `input_lengths`, `sample_mask` [B]. The mask of a
                row that teaches nothing is set to 0, so that it counts in no mean.
            k: NeMo-RL's `topk_logits_k`, from which the method's divergence has its own.
            micro_batch_size: not used; the policy's config says it.
            timer: NeMo-RL's, which keeps the seconds of each part.

        Returns:
            `topk_indices` [B, S, K] int32 and `topk_logits` [B, S, K]; row p is about token p + 1.
        """
        self._step += 1
        with _timed(timer, "judge"):
            groups, places = self._groups(data)
        with _timed(timer, "build"):
            batch = self._build(groups, self._step)
            objective = _divergence(batch)
        with _timed(timer, "score"):
            targets, read = self._scorer.teach(batch.examples, objective) if objective else ([], {})
        taught = [places[example.group_index][example.rollout_index] for example in batch.examples]
        keep_B = torch.zeros(len(data["input_ids"]))
        keep_B[[place.row for place in taught]] = 1.0
        data["sample_mask"] = data["sample_mask"] * keep_B
        self._log(group_metrics(groups) | batch.metrics | read if groups else {"signal": 0.0}, self._step)
        width = targets[0].ids_TK.shape[-1] if targets else k
        return laid_out(targets, taught, tuple(data["input_ids"].shape), width)

    def _groups(self, data: Any) -> tuple[list[RolloutGroup], list[list[Place]]]:
        """The groups of a batch, and where each of their rollouts lies."""
        self._verdicts.collect()
        spans = response_spans(data)
        groups, places = [], []
        for first in range(0, len(spans), self._group_size):
            members = [span for span in spans[first : first + self._group_size] if span.length]
            members = [span for span in members if data["sample_mask"][span.row]]  # not of prompts that were cut
            if members:
                groups.append(self._group(data["input_ids"], members))
                places.append(members)
        return groups, places

    def _group(self, ids_BS: Tensor, members: Sequence[Place]) -> RolloutGroup:
        prompts = {tuple(ids_BS[span.row, : span.start].tolist()) for span in members}
        if len(prompts) > 1:
            raise UserError(
                f"rows {members[0].row} to {members[-1].row} of a batch have {len(prompts)} prompts: a group's "
                "rollouts must follow one another, distillation.num_generations_per_prompt of them"
            )
        problem = self._problems.problem(prompts.pop())
        prompt = self._problems.prompt_text(problem)
        rollouts, verdicts = [], []
        for span in members:
            ids = tuple(ids_BS[span.row, span.start : span.start + span.length].tolist())
            text = self._chat.decode(ids)
            rollouts.append(Rollout(ids, text, ids[-1] in self._end_ids, ()))
            verdicts.append(self._verdicts.of(prompt, text))
        return RolloutGroup(problem, tuple(rollouts), tuple(verdicts))


def response_spans(data: Any) -> list[Place]:
    """Where the one response of each row lies; of length 0 where there is none.

    Raises:
        UserError: a row has several.
    """
    spans = []
    for row, (mask_S, length) in enumerate(zip(data["token_mask"], data["input_lengths"].tolist(), strict=True)):
        positions = mask_S[:length].nonzero().squeeze(-1).tolist()
        start, count = (positions[0], len(positions)) if positions else (length, 0)
        if count and positions[-1] - start + 1 != count:
            raise UserError(
                f"row {row} of a batch has several turns of the assistant: set distillation.max_rollout_turns=1"
            )
        spans.append(Place(row, start, count))
    return spans


def laid_out(targets: Sequence[TopK], places: Sequence[Place], shape: tuple[int, ...], width: int) -> dict[str, Tensor]:
    """Targets on the positions of the student's rows, as NeMo-RL has it: those of token t at position t - 1.

    Args:
        places: of the responses that the targets are about.
        shape: (B, S).
        width: K.
    """
    ids_BSK = torch.arange(width, dtype=torch.int32).repeat(*shape, 1)  # any ids, each once
    logprobs_BSK = torch.full((*shape, width), UNTAUGHT)
    for target, place in zip(targets, places, strict=True):
        rows = slice(place.start - 1, place.start - 1 + place.length)
        ids_BSK[place.row, rows] = target.ids_TK.int()
        logprobs_BSK[place.row, rows] = target.logprobs_TK.float()
    return {"topk_indices": ids_BSK, "topk_logits": logprobs_BSK}


def _divergence(batch: TrainBatch) -> Divergence | None:
    """The batch's objective; None when it teaches nothing.

    Raises:
        UserError: it is not one divergence on all examples.
    """
    objectives = {term.objective for term in batch.terms}
    if not batch.examples:
        return None
    objective = objectives.pop() if len(objectives) == 1 else None
    if not isinstance(objective, Divergence):
        raise UserError("peer_teacher.method: NeMo-RL's loop minimises one divergence: choose mopd, sdpo or opd")
    return objective


def _timed(timer: Any | None, part: str) -> AbstractContextManager[Any]:
    return timer.time(f"peer_teacher/{part}") if timer else nullcontext()
