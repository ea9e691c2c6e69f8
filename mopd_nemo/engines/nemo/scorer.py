"""Scores of responses: which model scores what, and in which order the models use the GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopd_nemo.config import Config
from mopd_nemo.config.cluster import keeps_hidden
from mopd_nemo.engines.base import TokenCounts, TokenSignal
from mopd_nemo.engines.nemo.batches import NO_ROW, Scored, score_batch, split_rows, split_scores
from mopd_nemo.engines.nemo.dealing import deal, deal_sequences, dealt, lanes
from mopd_nemo.engines.nemo.prompts import row_by_row, say
from mopd_nemo.losses.logits import TopK
from mopd_nemo.losses.objectives import Divergence, Objective
from mopd_nemo.losses.reference import contrasted
from mopd_nemo.types import TrainExample

Ids = Sequence[int]
REPLICAS = ["context_parallel", "tensor_parallel", "pipeline_parallel"]
"""Axes of a policy's workers that work on the same rows."""
LAST_STAGES = ["context_parallel", "tensor_parallel"]
"""Axes of which one worker answers, where earlier pipeline stages answer None."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What the teacher says of the examples of a step."""

    keys: list[int]
    """By which the student's workers keep it; `NO_ROW` for an example of which they keep nothing."""
    here: list[TopK | None]
    """What the driver has; see `Scorer.stays`."""

    @classmethod
    def none(cls, count: int) -> Targets:
        """For examples without a teacher."""
        return cls([NO_ROW] * count, [None] * count)


class Scorer:
    """Asks policies whose workers have `TeacherMethods`.

    Args:
        student: the student's policy, whose workers also hold a self-teacher.
        teacher: the policy of an external teacher.
        vocab_size: real tokens.
    """

    def __init__(self, student: Any, teacher: Any | None, config: Config, pad_id: int, vocab_size: int) -> None:
        self._student = student
        self._teacher = teacher
        self._config = config
        self._pad_id = pad_id
        self._vocab_size = vocab_size

    def teach(
        self, rows: Sequence[TrainExample], objective: Objective, rank_of: Sequence[int] | None = None
    ) -> tuple[list[TopK], dict[str, float]]:
        """Teacher targets of rows that all have a teacher prompt, and metrics of the teacher's passes.

        Args:
            rank_of: the student's data-parallel rank of each row; None deals them here.
            objective: for a divergence, the support is the likeliest tokens of the teacher, or of the student, which
                costs a pass of the student first. For any other objective it is the sampled token. For a contrast, what
                the teacher says after successes is set against what it says after failures already here.
        """
        own = deal(rows, [], self._student.data_parallel_size, packed=self._packed) if rank_of is None else rank_of
        k, candidates = 1, None
        match objective:
            case Divergence(support="student_topk"):
                k = min(objective.k, self._vocab_size)
                sequences = [(row.prompt_ids, row.response_ids) for row in rows]
                candidates = [target.ids_TK for target in self.student_scores(sequences, None, k, own)]
            case Divergence():
                k = min(objective.k, self._vocab_size)
            case _:
                candidates = [torch.tensor(row.response_ids)[:, None] for row in rows]
        with self._teaching() as policy:
            theirs = own if policy is self._student else deal(rows, [], policy.data_parallel_size, packed=self._packed)
            return self._taught(policy, rows, objective, candidates, k, theirs)

    @contextmanager
    def _teaching(self) -> Iterator[Any]:
        """The policy of the teacher; inside, it is on its GPUs."""
        if self._teacher is None:
            self._student.prepare_for_lp_inference()
            yield self._student
            return
        shared = not self._config.nemo.teacher_gpus
        if shared:
            self._student.offload_after_refit()
        self._teacher.prepare_for_lp_inference()
        yield self._teacher
        if shared:
            self._teacher.offload_after_refit()

    def _taught(
        self,
        policy: Any,
        rows: Sequence[TrainExample],
        objective: Objective,
        candidates: Sequence[Tensor] | None,
        k: int,
        rank_of: Sequence[int],
    ) -> tuple[list[TopK], dict[str, float]]:
        """Targets of the rows from the teacher's policy, and metrics."""
        self_teacher = self._has_past_self
        sequences = [(row.teacher_prompt_ids or (), row.response_ids) for row in rows]
        targets, counts = self._scores(policy, sequences, candidates, k, self_teacher, rank_of)
        alone = _tokens(sequences)
        if not (isinstance(objective, Divergence) and objective.reads_contrast):
            return targets, counts.metrics("score", alone)
        second = [i for i, row in enumerate(rows) if row.contrast_prompt_ids is not None]
        sequences = [(rows[i].contrast_prompt_ids or (), rows[i].response_ids) for i in second]
        supports = [targets[i].ids_TK for i in second]
        failures: list[TopK] = []
        if second:
            ranks = [rank_of[i] for i in second]
            failures, more = self._scores(policy, sequences, supports, k, self_teacher, ranks)
            counts += more
        for i, failure in zip(second, failures, strict=True):
            both = targets[i].logprobs_TK.float(), failure.logprobs_TK.float()
            target_TK = contrasted(*both, objective.contrast, objective.tail)
            targets[i] = TopK(targets[i].ids_TK, target_TK.to(targets[i].logprobs_TK.dtype))
        return targets, counts.metrics("score", alone + _tokens(sequences))

    def stays(self, objective: Objective) -> bool:
        """Whether workers can keep the targets of an objective.

        The driver computes with those of preferences. The student's likeliest tokens, where hidden states are not kept,
        go to an external teacher through it.
        """
        if self._teacher is None or objective.pairs:
            return not objective.pairs
        student_names = objective.read_tokens == "student_topk"
        return self._config.nemo.backend == "megatron" and (self._keeps_hidden(objective) or not student_names)

    def keep(
        self, rows: Sequence[TrainExample], objective: Objective, rank_of: Sequence[int], keys: Sequence[int]
    ) -> dict[str, float]:
        """Have the student's workers keep what the teacher says of the rows; see `teach`.

        An external teacher's workers put it into Ray's object store, and the student's take it from there.

        Args:
            rank_of: the student's data-parallel rank of each row, where its update is.
            keys: of the rows, different from those of all other steps.

        Returns:
            Metrics of the teacher's passes.
        """
        needs_head = self.forget()
        hidden, ranks = self._keeps_hidden(objective), list(rank_of)
        if objective.read_tokens == "student_topk" and not hidden:
            own = [(row.prompt_ids, row.response_ids) for row in rows]
            self._student.prepare_for_lp_inference()
            self._keep(self._student, own, "support", objective, rank_of, keys, hidden=False)
        with self._teaching() as policy:
            if policy.data_parallel_size != self._student.data_parallel_size:
                ranks = deal(rows, [], policy.data_parallel_size, packed=self._packed)
            taught = [(row.teacher_prompt_ids or (), row.response_ids) for row in rows]
            counts = self._keep(policy, taught, "teacher", objective, ranks, keys, hidden=hidden)
            alone = _tokens(taught)
            second = [i for i, row in enumerate(rows) if row.contrast_prompt_ids is not None]
            if objective.reads_contrast and second:
                after = [(rows[i].contrast_prompt_ids or (), rows[i].response_ids) for i in second]
                theirs, own_keys = [ranks[i] for i in second], [keys[i] for i in second]
                counts += self._keep(policy, after, "contrast", objective, theirs, own_keys, hidden=hidden)
                alone += _tokens(after)
        if policy is not self._student:
            self._hand_over(dict(zip(keys, rank_of, strict=True)), hidden and needs_head)
        return counts.metrics("score", alone)

    def token_signal(
        self, rows: Sequence[TrainExample], objective: Divergence, rank_of: Sequence[int], keys: Sequence[int], top: int
    ) -> list[TokenSignal]:
        """What the student says of each token now, and the teacher whose hidden states are kept; see `keep`."""
        self._student.prepare_for_lp_inference()
        sequences = [(row.prompt_ids, row.response_ids) for row in rows]
        shards, order = self._shards(self._student, sequences, None, rank_of, keys)
        answers = self._asked(self._student, "token_signal", shards, top, False, objective=objective)
        scores = [part for part in answers if part is not None]
        parts = split_rows(scores, order, [len(row.response_ids) for row in rows])
        return [TokenSignal(**{name: part[i] for name, part in parts.items()}) for i in range(len(rows))]

    def forget(self) -> bool:
        """Give the memory of kept targets back; whether a worker of the student needs an external teacher's head."""
        return any(self._student.run_all_workers_single_data("forget_targets"))

    def _keeps_hidden(self, objective: Objective) -> bool:
        return keeps_hidden(self._config.nemo, objective.read_tokens, self._config.train.num_updates_per_step)

    def _hand_over(self, rank_of: dict[int, int], head: bool) -> None:
        """From the teacher's workers to the student's. The driver has references alone."""
        assert self._teacher is not None
        parts: list[list[Any]] = [[] for _ in range(self._student.data_parallel_size)]
        heads: list[tuple[int, Any]] = []
        for found in self._teacher.run_all_workers_single_data("hand_over", rank_of=rank_of, head=head):
            heads += found["head"]
            for rank, part in found["rows"]:
                parts[rank].append(part)
        futures = self._student.worker_group.run_all_workers_sharded_data(
            "take_over",
            parts=parts,
            in_sharded_axes=["data_parallel"],
            replicate_on_axes=REPLICAS,
            output_is_replicated=REPLICAS,
            common_kwargs={"heads": [shard for _, shard in sorted(heads, key=lambda found: found[0])]},
        )
        self._student.worker_group.get_all_worker_results(futures)

    def _keep(
        self,
        policy: Any,
        sequences: Sequence[tuple[Ids, Ids]],
        role: str,
        objective: Objective,
        rank_of: Sequence[int],
        keys: Sequence[int],
        *,
        hidden: bool,
    ) -> TokenCounts:
        self_teacher = role != "support" and self._has_past_self
        k, candidates, contrast = 1, None, (0.0, True)
        if isinstance(objective, Divergence):
            k, contrast = min(objective.k, self._vocab_size), (objective.contrast, objective.tail)
        else:
            candidates = [torch.tensor(response)[:, None] for _, response in sequences]
        shards, _ = self._shards(policy, sequences, candidates, rank_of, keys)
        more = {"role": role, "hidden": hidden, "contrast": contrast}
        return _counted(self._asked(policy, "keep_targets", shards, k, self_teacher, **more))

    def sampled_logprobs(self, sequences: Sequence[tuple[Ids, Ids]]) -> list[Tensor]:
        """The student's log-probabilities of the responses in (prompt, response) sequences: [response tokens] each."""
        candidates = [torch.tensor(response)[:, None] for _, response in sequences]
        rank_of = deal_sequences(sequences, self._student.data_parallel_size, packed=self._packed)
        scores = self.student_scores(sequences, candidates, 1, rank_of)
        return [target.logprobs_TK.float().squeeze(-1) for target in scores]

    def student_scores(
        self, sequences: Sequence[tuple[Ids, Ids]], candidates: Sequence[Tensor] | None, k: int, rank_of: Sequence[int]
    ) -> list[TopK]:
        """Scores of (prompt, response) sequences by the present student."""
        self._student.prepare_for_lp_inference()
        return self._scores(self._student, sequences, candidates, k, self_teacher=False, rank_of=rank_of)[0]

    @property
    def _has_past_self(self) -> bool:
        return self._teacher is None and self._config.teacher.kind in ("ema", "frozen")

    @property
    def _packed(self) -> bool:
        return self._config.nemo.batching == "packed"

    def _scores(
        self,
        policy: Any,
        sequences: Sequence[tuple[Ids, Ids]],
        candidates: Sequence[Tensor] | None,
        k: int,
        self_teacher: bool,
        rank_of: Sequence[int],
    ) -> tuple[list[TopK], TokenCounts]:
        """Scores of (prompt, response) sequences, and what was computed for them."""
        shards, order = self._shards(policy, sequences, candidates, rank_of)
        answers = self._asked(policy, "score_responses", shards, k, self_teacher)
        scores = [part for part in answers if part is not None]
        return split_scores(scores, order, [len(response) for _, response in sequences]), _counted(scores)

    def _asked(self, policy: Any, method: str, shards: list[Any], k: int, self_teacher: bool, **more: Any) -> list[Any]:
        """What each worker answers to a method that scores its shard; None on earlier pipeline stages."""
        futures = policy.worker_group.run_all_workers_sharded_data(
            method,
            data=shards,
            in_sharded_axes=["data_parallel"],
            replicate_on_axes=REPLICAS,
            output_is_replicated=LAST_STAGES,
            common_kwargs={
                "k": k,
                "vocab_size": self._vocab_size,
                "self_teacher": self_teacher,
                "dtype": self._config.nemo.target_dtype,
                **more,
            },
        )
        return policy.worker_group.get_all_worker_results(futures)

    def _shards(
        self,
        policy: Any,
        sequences: Sequence[tuple[Ids, Ids]],
        candidates: Sequence[Tensor] | None,
        rank_of: Sequence[int],
        keys: Sequence[int] | None = None,
    ) -> tuple[list[Any], list[int]]:
        """Each data-parallel rank's part of a batch to score, and the sequences' numbers rank by rank."""
        order = lanes(rank_of, policy.data_parallel_size)
        batch = score_batch(
            sequences,
            candidates,
            pad_id=self._pad_id,
            length_multiple=policy.cfg["make_sequence_length_divisible_by"],
            filler=len(order) - len(sequences),
            keys=keys,
        )
        shards, positions = shard(policy, dealt(batch, order))
        return shards, [order[position] for position in positions]


def _tokens(sequences: Sequence[tuple[Ids, Ids]]) -> int:
    return sum(len(prompt) + len(response) for prompt, response in sequences)


def _counted(parts: Sequence[Scored | None]) -> TokenCounts:
    """Of all data-parallel ranks."""
    return sum((TokenCounts(*part["counts"].tolist()) for part in parts if part is not None), TokenCounts())


def shard(policy: Any, data: Any) -> tuple[list[Any], list[int]]:
    """The part of each data-parallel rank for scoring; and positions in the batch, rank by rank.

    A rank packs rows that share prompts itself. Others are packed or batched here.
    """
    size, cfg = policy.data_parallel_size, policy.cfg
    reason = row_by_row(cfg)
    if reason is not None:
        say(reason)
    if reason is not None and cfg["sequence_packing"]["enabled"]:
        tokens = cfg["sequence_packing"]["logprob_mb_tokens"]
        arguments = policy.sequence_packing_args | {"max_tokens_per_microbatch": tokens}
        return data.shard_by_batch_size(size, sequence_packing_args=arguments)
    if cfg["dynamic_batching"]["enabled"]:
        tokens = cfg["dynamic_batching"]["logprob_mb_tokens"]
        arguments = policy.dynamic_batching_args | {"max_tokens_per_microbatch": tokens}
        return data.shard_by_batch_size(size, dynamic_batching_args=arguments)
    return data.shard_by_batch_size(size), list(range(data.size))
