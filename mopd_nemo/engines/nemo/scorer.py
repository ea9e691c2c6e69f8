"""Scores of responses: which model scores what, and in which order the models use the GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mopd_nemo.config import Config
from mopd_nemo.engines.nemo.batches import even_budget, score_batch, split_scores
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

    def teach(self, rows: Sequence[TrainExample], objective: Objective) -> list[TopK]:
        """Teacher targets of rows that all have a teacher prompt.

        Args:
            objective: for a divergence, the support is the likeliest tokens of the teacher, or of the student, which
                costs a pass of the student first. For any other objective it is the sampled token. For a contrast, what
                the teacher says after successes is set against what it says after failures already here.
        """
        k, candidates = 1, None
        match objective:
            case Divergence(support="student_topk"):
                k = min(objective.k, self._vocab_size)
                own = [(row.prompt_ids, row.response_ids) for row in rows]
                candidates = [target.ids_TK for target in self.student_scores(own, None, k)]
            case Divergence():
                k = min(objective.k, self._vocab_size)
            case _:
                candidates = [torch.tensor(row.response_ids)[:, None] for row in rows]
        if self._teacher is None:
            self._student.prepare_for_lp_inference()
            return self._taught(self._student, rows, objective, candidates, k)
        shared = not self._config.nemo.teacher_gpus
        if shared:
            self._student.offload_after_refit()
        self._teacher.prepare_for_lp_inference()
        targets = self._taught(self._teacher, rows, objective, candidates, k)
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
    ) -> list[TopK]:
        """Targets of the rows from the teacher's policy."""
        self_teacher = self._teacher is None and self._config.teacher.kind in ("ema", "frozen")
        sequences = [(row.teacher_prompt_ids or (), row.response_ids) for row in rows]
        targets = self._scores(policy, sequences, candidates, k, self_teacher)
        if not (isinstance(objective, Divergence) and objective.reads_contrast):
            return targets
        second = [i for i, row in enumerate(rows) if row.contrast_prompt_ids is not None]
        sequences = [(rows[i].contrast_prompt_ids or (), rows[i].response_ids) for i in second]
        supports = [targets[i].ids_TK for i in second]
        failures = self._scores(policy, sequences, supports, k, self_teacher) if second else []
        for i, failure in zip(second, failures, strict=True):
            both = targets[i].logprobs_TK.float(), failure.logprobs_TK.float()
            target_TK = contrasted(*both, objective.contrast, objective.tail)
            targets[i] = TopK(targets[i].ids_TK, target_TK.to(targets[i].logprobs_TK.dtype))
        return targets

    def sampled_logprobs(self, sequences: Sequence[tuple[Ids, Ids]]) -> list[Tensor]:
        """The student's log-probabilities of the responses in (prompt, response) sequences: [response tokens] each."""
        candidates = [torch.tensor(response)[:, None] for _, response in sequences]
        return [target.logprobs_TK.float().squeeze(-1) for target in self.student_scores(sequences, candidates, 1)]

    def student_scores(
        self, sequences: Sequence[tuple[Ids, Ids]], candidates: Sequence[Tensor] | None, k: int
    ) -> list[TopK]:
        """Scores of (prompt, response) sequences by the present student."""
        self._student.prepare_for_lp_inference()
        return self._scores(self._student, sequences, candidates, k, self_teacher=False)

    def _scores(
        self,
        policy: Any,
        sequences: Sequence[tuple[Ids, Ids]],
        candidates: Sequence[Tensor] | None,
        k: int,
        self_teacher: bool,
    ) -> list[TopK]:
        from nemo_rl.distributed.batched_data_dict import BatchedDataDict

        multiple = policy.cfg["make_sequence_length_divisible_by"]
        size = policy.data_parallel_size
        batch = score_batch(sequences, candidates, pad_id=self._pad_id, length_multiple=multiple, count_multiple=size)
        shards, order = shard(policy, BatchedDataDict(batch))
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
        return split_scores(scores, order, [len(response) for _, response in sequences])


def shard(policy: Any, data: Any) -> tuple[list[Any], list[int]]:
    """A batch for each data-parallel rank, as the policy packs or batches; and the rows' order, rank by rank."""
    size, cfg = policy.data_parallel_size, policy.cfg
    if cfg["sequence_packing"]["enabled"]:
        packing = policy.sequence_packing_args
        budget = even_budget(
            data["input_lengths"].tolist(), cfg["sequence_packing"]["logprob_mb_tokens"], size, packing
        )
        arguments = packing | {"max_tokens_per_microbatch": budget}
        return data.shard_by_batch_size(size, batch_size=None, sequence_packing_args=arguments)
    if cfg["dynamic_batching"]["enabled"]:
        tokens = cfg["dynamic_batching"]["logprob_mb_tokens"]
        arguments = policy.dynamic_batching_args | {"max_tokens_per_microbatch": tokens}
        return data.shard_by_batch_size(size, batch_size=None, dynamic_batching_args=arguments)
    return data.shard_by_batch_size(size, batch_size=None), list(range(data.size))
