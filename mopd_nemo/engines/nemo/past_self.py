"""What a policy worker learns to do for this package, on whichever of NeMo-RL's backends.

Each method is called on every worker of a policy, in the same order everywhere: they are collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from mopd_nemo.engines.nemo.batches import Scored
from mopd_nemo.engines.nemo.rows import Scores
from mopd_nemo.engines.nemo.shadow import Shadow

DTYPES = {"float32": torch.float32, "float16": torch.float16}


class PastSelfMethods:
    """Mixed into a policy worker of NeMo-RL, whose attributes it uses."""

    model: Any
    optimizer: Any
    _shadow: Shadow | None = None

    def start_teacher(self, *, kind: Literal["ema", "frozen"], directory: str | None) -> None:
        """Keep a past self beside the student: its weights now, or those saved in `directory`."""
        with self._whole_parameters():
            self._shadow = Shadow(self.model, torch.float32 if kind == "ema" else None)
        if directory is not None:
            self._shadow.load(Path(directory) / self._shard_name())

    def follow_student(self, *, rate: float) -> None:
        """Move the teacher towards the student by `rate`."""
        assert self._shadow is not None
        with self._whole_parameters():
            self._shadow.follow(self.model, rate)

    def save_teacher(self, *, directory: str) -> None:
        """Write the teacher, each shard once."""
        assert self._shadow is not None
        name = self._shard_name()
        names: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(names, name)
        if names.index(name) == dist.get_rank():  # the first of those that hold this shard
            self._shadow.save(Path(directory) / name)
        dist.barrier()

    def score_responses(self, *, data: Any, k: int, vocab_size: int, past_self: bool, dtype: str) -> Scored | None:
        """Scores of response tokens by this model or by its past self, as the backend's scoring module gives them."""
        with self._past_self() if past_self else nullcontext():
            scores = self._score(data, k, vocab_size, DTYPES[dtype])
        return None if scores is None else {name: part.numpy() for name, part in scores.items()}

    def set_learning_rate(self, *, rate: float) -> None:
        """Rate of the next update; the backend's own schedule speaks up again after it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)

    @contextmanager
    def _past_self(self) -> Iterator[None]:
        assert self._shadow is not None
        with self._whole_parameters(), self._shadow.in_place_of(self.model):
            yield

    def _score(self, data: Any, k: int, vocab_size: int, dtype: torch.dtype) -> Scores | None:
        raise NotImplementedError

    def _shard_name(self) -> str:
        """File of this rank's part of the weights; the same for ranks that hold the same part."""
        raise NotImplementedError

    def _whole_parameters(self) -> AbstractContextManager[None]:
        """Parameters that are neither stale nor gathered behind our back."""
        return nullcontext()
