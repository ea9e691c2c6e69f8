"""Scores of responses: which model scores what, and in which order the models use the GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mopd_nemo.config import Config
from mopd_nemo.engines.nemo.batches import score_batch, split_scores
from mopd_nemo.engines.nemo.dealing import deal, deal_alone, dealt, lanes
from mopd_nemo.losses.logits import TopK
from mopd_nemo.losses.objectives import Divergence, Objective
from mopd_nemo.losses.reference import contrasted
from mopd_nemo.types import TrainExample

Ids = Sequence[int]
REPLICAS = ["context_parallel", "tensor_parallel", "pipeline_parallel"]
"""Axes of a policy's workers that work on the same rows."""


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
    ) -> list[TopK]:
        """Teacher targets of rows that all have a teacher prompt.

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
        if self._teacher is None:
            self._student.prepare_for_lp_inference()
            return self._taught(self._student, rows, objective, candidates, k, own)
        shared = not self._config.nemo.teacher_gpus
        if shared:
            self._student.offload_after_refit()
        self._teacher.prepare_for_lp_inference()
        theirs = deal(rows, [], self._teacher.data_parallel_size, packed=self._packed)
        targets = self._taught(self._teacher, rows, objective, candidates, k, theirs)
        if shared:
            self._teacher.offload_after_refit()
        return targets

    def _taught(
        self,
        policy: Any,
        rows: Sequence[TrainExample],
        objective: Objective,
        candidates: Sequence[Tensor] | None,
        k: int,
        rank_of: Sequence[int],
    ) -> list[TopK]:
        """Targets of the rows from the teacher's policy."""
        self_teacher = self._teacher is None and self._config.teacher.kind in ("ema", "frozen")
        sequences = [(row.teacher_prompt_ids or (), row.response_ids) for row in rows]
        targets = self._scores(policy, sequences, candidates, k, self_teacher, rank_of)
        if not (isinstance(objective, Divergence) and objective.reads_contrast):
            return targets
        second = [i for i, row in enumerate(rows) if row.contrast_prompt_ids is not None]
        sequences = [(rows[i].contrast_prompt_ids or (), rows[i].response_ids) for i in second]
        supports = [targets[i].ids_TK for i in second]
        ranks = [rank_of[i] for i in second]
        failures = self._scores(policy, sequences, supports, k, self_teacher, ranks) if second else []
        for i, failure in zip(second, failures, strict=True):
            both = targets[i].logprobs_TK.float(), failure.logprobs_TK.float()
            target_TK = contrasted(*both, objective.contrast, objective.tail)
            targets[i] = TopK(targets[i].ids_TK, target_TK.to(targets[i].logprobs_TK.dtype))
        return targets

    def sampled_logprobs(self, sequences: Sequence[tuple[Ids, Ids]]) -> list[Tensor]:
        """The student's log-probabilities of the responses in (prompt, response) sequences: [response tokens] each."""
        candidates = [torch.tensor(response)[:, None] for _, response in sequences]
        lengths = [len(prompt) + len(response) for prompt, response in sequences]
        rank_of = deal_alone(lengths, self._student.data_parallel_size, packed=self._packed)
        scores = self.student_scores(sequences, candidates, 1, rank_of)
        return [target.logprobs_TK.float().squeeze(-1) for target in scores]

    def student_scores(
        self, sequences: Sequence[tuple[Ids, Ids]], candidates: Sequence[Tensor] | None, k: int, rank_of: Sequence[int]
    ) -> list[TopK]:
        """Scores of (prompt, response) sequences by the present student."""
        self._student.prepare_for_lp_inference()
        return self._scores(self._student, sequences, candidates, k, self_teacher=False, rank_of=rank_of)

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
    ) -> list[TopK]:
        order = lanes(rank_of, policy.data_parallel_size)
        multiple = policy.cfg["make_sequence_length_divisible_by"]
        filler = len(order) - len(sequences)
        batch = score_batch(sequences, candidates, pad_id=self._pad_id, length_multiple=multiple, filler=filler)
        shards, positions = shard(policy, dealt(batch, order))
        futures = policy.worker_group.run_all_workers_sharded_data(
            "score_responses",
            data=shards,
            in_sharded_axes=["data_parallel"],
            replicate_on_axes=REPLICAS,
            output_is_replicated=["context_parallel", "tensor_parallel"],  # earlier pipeline stages return None
            common_kwargs={
                "k": k,
                "vocab_size": self._vocab_size,
                "self_teacher": self_teacher,
                "dtype": self._config.nemo.target_dtype,
            },
        )
        scores = [part for part in policy.worker_group.get_all_worker_results(futures) if part is not None]
        return split_scores(
            scores, [order[position] for position in positions], [len(response) for _, response in sequences]
        )


def shard(policy: Any, data: Any) -> tuple[list[Any], list[int]]:
    """The part of each data-parallel rank for scoring; and positions in the batch, rank by rank."""
    size, cfg = policy.data_parallel_size, policy.cfg
    if cfg["sequence_packing"]["enabled"]:
        tokens = cfg["sequence_packing"]["logprob_mb_tokens"]
        arguments = policy.sequence_packing_args | {"max_tokens_per_microbatch": tokens}
        return data.shard_by_batch_size(size, sequence_packing_args=arguments)
    if cfg["dynamic_batching"]["enabled"]:
        tokens = cfg["dynamic_batching"]["logprob_mb_tokens"]
        arguments = policy.dynamic_batching_args | {"max_tokens_per_microbatch": tokens}
        return data.shard_by_batch_size(size, dynamic_batching_args=arguments)
    return data.shard_by_batch_size(size), list(range(data.size))
