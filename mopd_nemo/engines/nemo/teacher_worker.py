"""What a NeMo-RL Megatron policy worker learns to do for this package, apart from where it runs.

Each method is called on every worker of a policy, in the same order everywhere: they are collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mopd_nemo.engines.nemo.scoring import Scores, score_responses
from mopd_nemo.engines.nemo.shadow import Shadow

DTYPES = {"float32": torch.float32, "float16": torch.float16}


class TeacherMethods:
    """Mixed into `MegatronPolicyWorkerImpl`, whose attributes it uses."""

    cfg: Any
    model: Any
    optimizer: Any
    mcore_state: Any
    defer_fp32_logits: Any
    should_disable_forward_pre_hook: bool
    _shadow: Shadow | None = None

    def start_teacher(self, *, kind: Literal["ema", "frozen"], directory: str | None) -> None:
        """Keep a past self beside the student: its weights now, or those saved in `directory`."""
        with self._whole_parameters():
            self._shadow = Shadow(self.model, torch.float32 if kind == "ema" else None)
        if directory is not None:
            self._shadow.load(_shard_file(Path(directory)))

    def follow_student(self, *, rate: float) -> None:
        """Move the teacher towards the student by `rate`."""
        assert self._shadow is not None
        with self._whole_parameters():
            self._shadow.follow(self.model, rate)

    def save_teacher(self, *, directory: str) -> None:
        """Write the teacher, each shard once."""
        assert self._shadow is not None
        file = _shard_file(Path(directory))
        names: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(names, file.name)
        if names.index(file.name) == dist.get_rank():  # the first of those that hold this shard
            self._shadow.save(file)
        dist.barrier()

    def score_responses(self, *, data: Any, k: int, vocab_size: int, past_self: bool, dtype: str) -> Scores | None:
        """As `scoring.score_responses`, by this model or by its past self."""
        forward = {"straggler_timer": self.mcore_state.straggler_timer, "defer_fp32_logits": self.defer_fp32_logits}
        arguments = {"k": k, "vocab_size": vocab_size, "dtype": DTYPES[dtype], **forward}
        if not past_self:
            return score_responses(self.model, data, self.cfg, **arguments)
        assert self._shadow is not None
        with self._whole_parameters(), self._shadow.in_place_of(self.model):
            return score_responses(self.model, data, self.cfg, **arguments)

    def set_learning_rate(self, *, rate: float) -> None:
        """Rate of the next update; Megatron's own schedule speaks up again after it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)

    @contextmanager
    def _whole_parameters(self) -> Iterator[None]:
        """Parameters that are neither stale nor gathered behind our back.

        With `overlap_param_gather`, what an update did reaches a layer only when its next forward starts; reading
        parameters before that, or writing them, needs that mechanism off, which also makes it catch up.
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


def _shard_file(directory: Path) -> Path:
    """Where this rank's part of the weights is kept; the same for ranks that hold the same part."""
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    tensor = parallel_state.get_tensor_model_parallel_rank()
    expert = parallel_state.get_expert_model_parallel_rank()
    return directory / f"shard_pp{pipeline:02d}_tp{tensor:02d}_ep{expert:02d}.pt"
