"""NeMo-RL's Megatron worker, with scores of response tokens and a self-teacher.

Only response rows reach the output layer. Only [response tokens, k] values leave the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from nemo_rl.models.megatron.data import ProcessedMicrobatch, get_microbatch_iterator
from nemo_rl.models.megatron.train import TopkLogitsPostProcessor, megatron_forward_backward
from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker
from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl
from torch import Tensor, nn

from mopd_nemo.engines.nemo.batches import joined
from mopd_nemo.engines.nemo.workers.base import Scores, TeacherMethods
from mopd_nemo.engines.nemo.workers.rows import LocalRows, ResponseHead, packed_rows, padded_rows
from mopd_nemo.losses.vocab import Vocab, logprobs_of, topk_logprobs


class MegatronTeacherMethods(TeacherMethods):
    """Mixed into `MegatronPolicyWorkerImpl`, whose attributes it uses."""

    cfg: Any
    mcore_state: Any
    defer_fp32_logits: Any
    should_disable_forward_pre_hook: bool

    def move_model(self, model: Any, device: str, move_params: bool = True, move_grads: bool = True) -> Any:
        """Move the model to a device. NeMo-RL calls this to offload a model and to bring it back.

        An external teacher has no optimiser and is not wrapped in Megatron's DDP. NeMo-RL v0.7.0 copies the weights of
        such a model to the other device and back, so the model does not move; here it does.
        """
        if self.optimizer is not None:
            return super().move_model(model, device, move_params=move_params, move_grads=move_grads)  # type: ignore[misc]
        return model.to(device) if move_params else model

    def _score(self, data: Any, k: int, vocab_size: int, dtype: torch.dtype, hidden: bool = False) -> Scores | None:
        return score_responses(
            self.model,
            data,
            self.cfg,
            k=k,
            vocab_size=vocab_size,
            dtype=dtype,
            hidden=hidden,
            straggler_timer=self.mcore_state.straggler_timer,
            defer_fp32_logits=self.defer_fp32_logits,
        )

    @contextmanager
    def _whole_parameters(self) -> Iterator[None]:
        """With `overlap_param_gather`, a layer gets its updated parameters only when its next forward starts.

        Parameters may be read or written only while this is off. Switching it off gathers the updated parameters.
        """
        enabled = self.should_disable_forward_pre_hook and bool(
            getattr(self.model, "remove_forward_pre_hook_handles", None)
        )
        if enabled:
            self.disable_forward_pre_hook()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            if enabled:
                self.enable_forward_pre_hook()  # type: ignore[attr-defined]

    def _shard_name(self) -> str:
        pipeline = parallel_state.get_pipeline_model_parallel_rank()
        tensor = parallel_state.get_tensor_model_parallel_rank()
        expert = parallel_state.get_expert_model_parallel_rank()
        expert_tensor = parallel_state.get_expert_tensor_parallel_rank()
        return f"shard_pp{pipeline:02d}_tp{tensor:02d}_ep{expert:02d}_et{expert_tensor:02d}.pt"


@ray.remote(runtime_env=get_runtime_env_for_policy_worker("megatron_policy_worker"))
class MegatronTeacherWorker(MegatronTeacherMethods, MegatronPolicyWorkerImpl):
    """The Ray actor that trains, and scores as a teacher."""


@torch.no_grad()
def score_responses(
    model: nn.Module,
    data: Any,
    cfg: Any,
    *,
    k: int,
    vocab_size: int,
    dtype: torch.dtype,
    hidden: bool = False,
    **forward: Any,
) -> Scores | None:
    """Score the response tokens of this data-parallel rank's sequences.

    Args:
        model: a Megatron model, wrapped or not.
        data: a `BatchedDataDict` with `input_ids` [B, S], `input_lengths` [B], `prompt_lengths` [B] and, to score given
            tokens instead of the likeliest k, `candidates`: per sequence a [response tokens, k] array of ids.
        cfg: NeMo-RL's PolicyConfig.
        dtype: of the log-probabilities returned.
        hidden: return the last hidden states, `hidden` [T, H], and the output layer's weight [V/TP, H], `head`, in
            place of scores.
        forward: passed on to `megatron_forward_backward`.

    Returns:
        The scores, on the CPU, on the last pipeline stage; None on the others. A `head` is the model's own.
    """
    model.eval()
    microbatches, count, size, _, length = get_microbatch_iterator(
        data, cfg, cfg["logprob_batch_size"], straggler_timer=forward.get("straggler_timer")
    )
    with ResponseHead(_output_layer(model), hidden) as head:
        outputs = megatron_forward_backward(
            model=model,
            data_iterator=_choosing_rows(microbatches, head),
            num_microbatches=count,
            seq_length=length,
            mbs=size,
            post_processing_fn=_Hidden(cfg, k, head) if hidden else _ResponseScores(cfg, k, head, vocab_size, dtype),
            forward_only=True,
            sampling_params=None,  # temperature 1: the sampler's temperature does not apply to the teacher
            **forward,
        )
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    scores = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
    return scores | {"head": head.weight_VH} if hidden else scores


class _ResponseScores(TopkLogitsPostProcessor):
    """A subclass because NeMo-RL dispatches on the type."""

    def __init__(self, cfg: Any, k: int, head: ResponseHead, vocab_size: int, dtype: torch.dtype) -> None:
        super().__init__(cfg, k)
        self._head = head
        self._vocab_size = vocab_size
        self._dtype = dtype

    def __call__(
        self, data_dict: Any, cu_seqlens_padded: Tensor | None
    ) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
        rows = self._head.rows

        def process(logits_1RV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logits_RV = logits_1RV.squeeze(0)
            group = parallel_state.get_tensor_model_parallel_group()
            if "candidates" in data_dict:
                ids_RK = joined(data_dict["candidates"])[rows.number_R].to(logits_RV.device)
                logprobs_RK = logprobs_of(logits_RV, ids_RK, Vocab(group, self._vocab_size))
            else:
                ids_RK, logprobs_RK = topk_logprobs(logits_RV, self.k, Vocab(group, self._vocab_size))
            ids_TK, logprobs_TK = (_all_rows(part, rows) for part in (ids_RK.int(), logprobs_RK))
            return logits_1RV.new_zeros(()), {"ids": ids_TK.cpu(), "logprobs": logprobs_TK.to("cpu", self._dtype)}

        return process


class _Hidden(TopkLogitsPostProcessor):
    """Hidden states in place of scores."""

    def __init__(self, cfg: Any, k: int, head: ResponseHead) -> None:
        super().__init__(cfg, k)
        self._head = head

    def __call__(
        self, data_dict: Any, cu_seqlens_padded: Tensor | None
    ) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
        rows = self._head.rows

        def process(hidden_1RH: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            # Megatron widens what it takes for logits.
            hidden_TH = _all_rows(hidden_1RH.squeeze(0).to(self._head.weight_VH.dtype), rows)
            return hidden_1RH.new_zeros(()), {"hidden": hidden_TH.cpu()}

        return process


def _all_rows(part_RK: Tensor, rows: LocalRows) -> Tensor:
    """All rows of the micro-batch, gathered from the context-parallel ranks."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return part_RK
    all_TK = part_RK.new_zeros(rows.total, part_RK.shape[-1])
    all_TK[rows.number_R.to(part_RK.device)] = part_RK
    dist.all_reduce(all_TK, group=parallel_state.get_context_parallel_group())
    return all_TK


def _choosing_rows(microbatches: Iterator[ProcessedMicrobatch], head: ResponseHead) -> Iterator[ProcessedMicrobatch]:
    """The micro-batches. Each sets the rows of the head when its forward pass takes it."""
    for microbatch in microbatches:
        prompts = microbatch.data_dict["prompt_lengths"].tolist()
        lengths = microbatch.data_dict["input_lengths"].tolist()
        if microbatch.packed_seq_params is None:
            head.rows = padded_rows(prompts, lengths)
        else:
            head.rows = packed_rows(
                prompts,
                lengths,
                microbatch.cu_seqlens_padded.tolist(),
                parallel_state.get_context_parallel_rank(),
                parallel_state.get_context_parallel_world_size(),
            )
        yield microbatch


def _output_layer(model: Any) -> Any | None:
    """The output layer of a wrapped model; None on a pipeline stage without one."""
    while hasattr(model, "module"):
        model = model.module
    return getattr(model, "output_layer", None)
