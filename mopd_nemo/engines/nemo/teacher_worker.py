"""What a NeMo-RL Megatron policy worker learns to do for this package, apart from where it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state

from mopd_nemo.engines.nemo.past_self import PastSelfMethods
from mopd_nemo.engines.nemo.rows import Scores
from mopd_nemo.engines.nemo.scoring import score_responses


class TeacherMethods(PastSelfMethods):
    """Mixed into `MegatronPolicyWorkerImpl`, whose attributes it uses."""

    cfg: Any
    mcore_state: Any
    defer_fp32_logits: Any
    should_disable_forward_pre_hook: bool

    def move_model(self, model: Any, device: str, move_params: bool = True, move_grads: bool = True) -> Any:
        """NeMo-RL's, which every offload and every return to the GPU calls, for a model without an optimiser as well.

        Such a model, an external teacher, is not in Megatron's DDP. NeMo-RL v0.7.0 copies its weights to the other
        device and from there back into the parameters where they are, so that nothing moves.
        """
        if self.optimizer is not None:
            return super().move_model(model, device, move_params=move_params, move_grads=move_grads)  # type: ignore[misc]
        return model.to(device) if move_params else model

    def _score(self, data: Any, k: int, vocab_size: int, dtype: torch.dtype) -> Scores | None:
        return score_responses(
            self.model,
            data,
            self.cfg,
            k=k,
            vocab_size=vocab_size,
            dtype=dtype,
            straggler_timer=self.mcore_state.straggler_timer,
            defer_fp32_logits=self.defer_fp32_logits,
        )

    @contextmanager
    def _whole_parameters(self) -> Iterator[None]:
        """With `overlap_param_gather`, what an update did reaches a layer only when its next forward starts.

        Reading parameters before that, or writing them, needs that mechanism off, which also makes it catch up.
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
