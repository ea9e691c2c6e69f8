"""NeMo-RL's Megatron worker, with scores of response tokens and a self-teacher.

Only response rows reach the output layer. Only [response tokens, k] values leave the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.megatron.data import ProcessedMicrobatch, get_microbatch_iterator
from nemo_rl.models.megatron.train import TopkLogitsPostProcessor, megatron_forward_backward
from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker
from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl
from torch import Tensor, nn

from mopd_nemo.engines.base import TokenCounts
from mopd_nemo.engines.nemo.batches import joined
from mopd_nemo.engines.nemo.prompts import by_prompt, in_bins, row_by_row, say
from mopd_nemo.engines.nemo.workers.base import Place, Scores, TeacherMethods
from mopd_nemo.engines.nemo.workers.rows import LocalRows, ResponseHead, packed_rows, padded_rows
from mopd_nemo.engines.nemo.workers.self_teacher import Share, distributed_optimizers, main_weights, optimizers_share
from mopd_nemo.engines.nemo.workers.shared_prompt import PromptSharing, SharedRow, cannot_share, shared_row
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

    def _place(self) -> Place:
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        return Place(
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
            last,
            _unwrapped(self.model).output_layer.output_size_per_partition if last else 0,
        )

    def _tensor_group(self) -> Any:
        return parallel_state.get_tensor_model_parallel_group()

    def _share(self) -> Share:
        """The values that this rank's part of the distributed optimiser moves. Where that is not used, all values.

        A parameter that does not train is the same in student and teacher.
        """
        fp8 = self.cfg["megatron_cfg"].get("fp8_cfg") or {}
        if fp8.get("enabled") and fp8.get("fp8_param"):
            raise ValueError(
                "policy.megatron_cfg.fp8_cfg.fp8_param=true: an EMA or frozen teacher scores in the student's place, "
                "and its weights have no place in 8 bits; set it false (the arithmetic may stay in 8 bits)"
            )
        optimizers = distributed_optimizers(self.optimizer)
        return optimizers_share(optimizers, self._names()) if optimizers else super()._share()

    def _main_weights(self) -> Iterable[tuple[str, Tensor]]:
        optimizers = distributed_optimizers(self.optimizer)
        return main_weights(optimizers, self._names()) if optimizers else super()._main_weights()

    def _gather(self) -> None:
        if distributed_optimizers(self.optimizer):
            self.model.start_param_sync(force_sync=True)

    def _names(self) -> dict[nn.Parameter, str]:
        """Of parameters. Experts are cut by axes of their own, and so named by them."""
        expert = parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_tensor_parallel_rank()
        pipeline = parallel_state.get_pipeline_model_parallel_rank()
        return {
            parameter: f"{self._shard_name()}.{name}"
            if getattr(parameter, "allreduce", True)
            else f"pp{pipeline}.ep{expert[0]}.et{expert[1]}.{name}"
            for name, parameter in self.model.named_parameters()
        }

    def _shard_name(self) -> str:
        pipeline = parallel_state.get_pipeline_model_parallel_rank()
        return f"pp{pipeline}.tp{parallel_state.get_tensor_model_parallel_rank()}"


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
    """Score the response tokens of this data-parallel rank's sequences. A prompt that several share is read once.

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
    core = _unwrapped(model)

    def process(head: ResponseHead) -> TopkLogitsPostProcessor:
        return _Hidden(cfg, k, head) if hidden else _ResponseScores(cfg, k, head, vocab_size, dtype)

    with ResponseHead(getattr(core, "output_layer", None), hidden) as head:  # not every pipeline stage has one
        if row_by_row(cfg):
            reading = _as_dealt(data, cfg, head, forward.get("straggler_timer"))
        else:
            reading = _by_prompt(data, cfg, head, core)
        with reading.inside:
            outputs = megatron_forward_backward(
                model=model,
                data_iterator=reading.microbatches,
                num_microbatches=reading.count,
                seq_length=reading.length,
                mbs=reading.size,
                post_processing_fn=process(head),
                forward_only=True,
                sampling_params=None,  # temperature 1: the sampler's temperature does not apply to the teacher
                **forward,
            )
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    sizes = (data["input_lengths"] - data["prompt_lengths"]).tolist()
    scores = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
    scores = {name: _as_given(part_T, reading.rows, sizes) for name, part_T in scores.items()}
    scores["counts"] = torch.tensor([reading.counts.positions, reading.counts.padding])
    return scores | {"head": head.weight_VH} if hidden else scores


@dataclass(slots=True)
class _Reading:
    """Micro-batches in NeMo-RL's form, and how they are to be read."""

    microbatches: Iterator[ProcessedMicrobatch]
    """Each sets the rows of the head when its forward pass takes it."""
    count: int
    size: int
    """Sequences of a micro-batch, as Megatron counts them."""
    length: int
    """Positions of a micro-batch, which pipeline stages must know."""
    rows: Sequence[int]
    """The sequences in the order in which they are read."""
    counts: TokenCounts
    inside: AbstractContextManager[Any]


KERNEL_MULTIPLE = 128
"""What blockwise FP8 and a kernel that sends tokens to experts want a rank's positions to divide by."""


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


def _as_given(part_T: Tensor, rows: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Scores of `rows`, one after the other, in the rows' order. What follows them is left out.

    Args:
        sizes: response tokens of each row.
    """
    parts = part_T[: sum(sizes)].split([sizes[row] for row in rows])
    return torch.cat([parts[place] for place in sorted(range(len(rows)), key=rows.__getitem__)])


def _as_dealt(data: Any, cfg: Any, head: ResponseHead, timer: Any) -> _Reading:
    """Every sequence whole, in the micro-batches that NeMo-RL has dealt."""
    counts = TokenCounts()
    microbatches, count, size, _, length = get_microbatch_iterator(
        data, cfg, cfg["logprob_batch_size"], straggler_timer=timer
    )

    def choosing() -> Iterator[ProcessedMicrobatch]:
        for microbatch in microbatches:
            prompts, lengths = (microbatch.data_dict[f"{part}_lengths"].tolist() for part in ("prompt", "input"))
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
            counts.positions += microbatch.input_ids.numel()
            counts.padding += microbatch.input_ids.numel() - sum(lengths)
            yield microbatch

    return _Reading(choosing(), count, size, length, range(data.size), counts, nullcontext())


def _by_prompt(data: Any, cfg: Any, head: ResponseHead, model: Any) -> _Reading:
    """Sequences with one prompt after this prompt, in packed rows of the budget of scoring.

    All ranks read as many rows: with expert parallelism, data-parallel ranks take part in each other's.
    """
    groups = by_prompt(data["input_ids"], data["prompt_lengths"].tolist(), data["input_lengths"].tolist())
    reason = cannot_share(model)
    if reason:
        say(reason)
        groups = [row for group in groups for row in group.parts(len(group.rows))]
    bins = in_bins(groups, cfg["sequence_packing"]["logprob_mb_tokens"])
    multiple = _length_multiple(cfg)
    lengths = [-(-sum(group.tokens for group in members) // multiple) * multiple for members in bins]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        lengths = [max(lengths)] * len(bins)
    rows = [shared_row(members, data["input_ids"], length) for members, length in zip(bins, lengths, strict=True)]
    spare = min(rows, key=lambda row: len(row.ids_S))
    read = rows + [spare] * (_most(len(rows)) - len(rows))
    positions = sum(len(row.ids_S) for row in read)
    sharing = None if reason else PromptSharing(model)
    return _Reading(
        _shared(read, data, head, sharing),
        len(read),
        1,
        max(lengths),
        [row for members in bins for group in members for row in group.rows],
        TokenCounts(positions, positions - sum(group.tokens for members in bins for group in members)),
        sharing or nullcontext(),
    )


def _shared(
    rows: Sequence[SharedRow], data: Any, head: ResponseHead, sharing: PromptSharing | None
) -> Iterator[ProcessedMicrobatch]:
    """Packed rows as NeMo-RL's micro-batches. Each sets what the hooks do when its forward pass takes it."""
    for row in rows:
        head.rows = row.responses
        if sharing:
            sharing.row = row
        given = {"candidates": [data["candidates"][i] for i in row.rows]} if "candidates" in data else {}
        ids_1S = row.ids_S.to("cuda").unsqueeze(0)
        # Rotary embeddings go by these ends: of the whole row, where hooks say the positions.
        ends = torch.tensor([0, len(row.ids_S)], dtype=torch.int32) if sharing else row.query_ends
        longest, ends = int(ends.diff().max()), ends.to("cuda")
        sequences = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            cu_seqlens_q_padded=ends,
            cu_seqlens_kv_padded=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            total_tokens=len(row.ids_S),
        )
        yield ProcessedMicrobatch(
            data_dict=BatchedDataDict(given),
            input_ids=ids_1S,
            input_ids_cp_sharded=ids_1S,
            attention_mask=None,
            position_ids=None,
            packed_seq_params=sequences,
            cu_seqlens_padded=ends,
        )


def _length_multiple(cfg: Any) -> int:
    """What the length of a packed row must divide by."""
    megatron = cfg["megatron_cfg"]
    kernels = (megatron.get("fp8_cfg") or {}).get("enabled") or megatron.get("moe_token_dispatcher_type") == "flex"
    wanted = KERNEL_MULTIPLE * megatron["tensor_model_parallel_size"] if kernels else 1
    return math.lcm(cfg["make_sequence_length_divisible_by"], wanted)


def _most(count: int) -> int:
    """The largest number that a rank has."""
    most = torch.tensor([count]).to("cuda")
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _unwrapped(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model
