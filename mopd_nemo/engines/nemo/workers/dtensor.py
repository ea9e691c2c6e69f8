"""NeMo-RL's DTensor worker (its second version, on Automodel), with scores of response tokens and a self-teacher.

Each GPU computes the logits of all positions for its shard of the vocabulary. Only [response tokens, k] values leave
the GPU.
"""

from __future__ import annotations

from typing import Any

import ray
import torch
import torch.distributed as dist
from nemo_rl.models.automodel.data import get_microbatch_iterator
from nemo_rl.models.automodel.train import TopkLogitsPostProcessor, forward_with_post_processing_fn
from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker
from nemo_rl.models.policy.workers.dtensor_policy_worker_v2 import DTensorPolicyWorkerV2Impl, get_train_context
from torch import Tensor
from torch.distributed.tensor import DTensor

from mopd_nemo.engines.nemo.batches import joined
from mopd_nemo.engines.nemo.workers.base import Place, Scores, TeacherMethods
from mopd_nemo.engines.nemo.workers.rows import padded_rows
from mopd_nemo.losses.vocab import Vocab, logprobs_of, topk_logprobs


class DTensorTeacherMethods(TeacherMethods):
    """Mixed into `DTensorPolicyWorkerV2Impl`, whose attributes it uses."""

    dp_mesh: Any
    tp_mesh: Any

    def _score(self, data: Any, k: int, vocab_size: int, dtype: torch.dtype, hidden: bool = False) -> Scores:
        if hidden:
            raise NotImplementedError("DTensor workers give no hidden states")
        return score_responses(self, data, k=k, vocab_size=vocab_size, dtype=dtype)

    def _place(self) -> Place:
        return Place(self.dp_mesh.get_local_rank(), 0, self.tp_mesh.get_local_rank(), True, 0)

    def _shard_name(self) -> str:
        """Every rank has a shard of its own: FSDP shards over the data-parallel ranks as well."""
        return f"rank{dist.get_rank()}of{dist.get_world_size()}"


@ray.remote(runtime_env=get_runtime_env_for_policy_worker("dtensor_policy_worker_v2"))
class DTensorTeacherWorker(DTensorTeacherMethods, DTensorPolicyWorkerV2Impl):
    """The Ray actor that trains, and scores as a teacher."""


@torch.no_grad()
def score_responses(worker: Any, data: Any, *, k: int, vocab_size: int, dtype: torch.dtype) -> Scores:
    """Score the response tokens of this data-parallel rank's sequences.

    Args:
        worker: a `DTensorPolicyWorkerV2Impl`.
        data: as for `megatron.score_responses`; not packed.
        dtype: of the log-probabilities returned.

    Returns:
        The scores, on the CPU.
    """
    worker.model.eval()
    microbatches, count = get_microbatch_iterator(
        data.to("cuda"), worker.cfg, worker.cfg["logprob_batch_size"], worker.dp_mesh, worker.tokenizer
    )
    process = _ResponseScores(worker, k, vocab_size, dtype)
    parts, counts_2 = [], torch.zeros(2, dtype=torch.int64)
    for number, microbatch in enumerate(microbatches):
        with get_train_context(1, worker.cp_mesh, [], 1, worker.dtype, worker.autocast_enabled):
            scores, _, _ = forward_with_post_processing_fn(
                model=worker.model,
                post_processing_fn=process,
                processed_mb=microbatch,
                allow_flash_attn_args=worker.allow_flash_attn_args,
                sampling_params=None,  # temperature 1: the sampler's temperature does not apply to the teacher
            )
        if number < count:  # the rest are dummies that keep the ranks in step
            parts.append(scores)
            positions = microbatch.processed_inputs.input_ids.numel()
            counts_2 += torch.tensor([positions, positions - int(microbatch.data_dict["input_lengths"].sum())])
    ids, logprobs = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"ids": ids, "logprobs": logprobs, "counts": counts_2}


class _ResponseScores(TopkLogitsPostProcessor):
    """A subclass because NeMo-RL dispatches on the type."""

    def __init__(self, worker: Any, k: int, vocab_size: int, dtype: torch.dtype) -> None:
        super().__init__(worker.cfg, worker.device_mesh, worker.cp_mesh, worker.tp_mesh, cp_size=1, k=k)
        self._vocab_size = vocab_size
        self._dtype = dtype

    def __call__(self, logits: Tensor, data_dict: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        logits_BSV = logits.to_local() if isinstance(logits, DTensor) else logits
        group = self.tp_mesh.get_group()
        rows = padded_rows(data_dict["prompt_lengths"].tolist(), data_dict["input_lengths"].tolist())
        logits_TV = logits_BSV[rows.sequence_R.to(logits_BSV.device), rows.position_R.to(logits_BSV.device)]
        if "candidates" in data_dict:
            ids_TK = joined(data_dict["candidates"]).to(logits_TV.device)
            logprobs_TK = logprobs_of(logits_TV, ids_TK, Vocab(group, self._vocab_size))
        else:
            ids_TK, logprobs_TK = topk_logprobs(logits_TV, self.k, Vocab(group, self._vocab_size))
        return ids_TK.int().cpu(), logprobs_TK.to("cpu", self._dtype)
