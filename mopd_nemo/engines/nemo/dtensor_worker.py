"""What NeMo-RL's DTensor policy worker (the second version, on Automodel) learns to do for this package."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mopd_nemo.engines.nemo.dtensor_scoring import score_responses
from mopd_nemo.engines.nemo.past_self import PastSelfMethods
from mopd_nemo.engines.nemo.rows import Scores


class DTensorTeacherMethods(PastSelfMethods):
    """Mixed into `DTensorPolicyWorkerV2Impl`, whose attributes it uses."""

    def _score(self, data: Any, k: int, vocab_size: int, dtype: torch.dtype) -> Scores:
        return score_responses(self, data, k=k, vocab_size=vocab_size, dtype=dtype)

    def _shard_name(self) -> str:
        """Every rank holds a part of its own: what tensor parallelism leaves is cut over the data-parallel ranks."""
        return f"shard_{dist.get_rank():05d}_of_{dist.get_world_size():05d}.pt"
