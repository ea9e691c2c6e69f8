"""A second set of weights for a sharded model: the teacher that is the student's past.

Each rank keeps its own shard, on the CPU, and writes it to a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Shadow:
    """Weights beside those of a model, of which one set at a time is in the model.

    Args:
        model: its weights now become the shadow's.
        dtype: what the shadow is kept in. An average that moves by small steps needs float32; a fixed copy does not,
            and None keeps each weight's own type.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self._weights = {
            name: weight.to("cpu", dtype if weight.is_floating_point() else None, copy=True)
            for name, weight in _weights(model)
        }

    @torch.no_grad()
    def follow(self, model: nn.Module, rate: float) -> None:
        """shadow ← (1 - rate)·shadow + rate·model."""
        for name, weight in _weights(model):
            shadow = self._weights[name]
            if shadow.is_floating_point():
                shadow.lerp_(weight.to("cpu", shadow.dtype), rate)
            else:
                shadow.copy_(weight)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Put the shadow into the model, and the model's own weights back at the end, whatever happens."""
        own = {name: weight.to("cpu", copy=True) for name, weight in _weights(model)}
        try:
            _load(model, self._weights)
            yield
        finally:
            _load(model, own)

    def save(self, file: Path) -> None:
        """Write this rank's shard."""
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self._weights, file)

    def load(self, file: Path) -> None:
        """Continue from `save`.

        Raises:
            ValueError: the file holds another shard: the model is cut differently now.
        """
        saved = torch.load(file, map_location="cpu", weights_only=True)
        shapes = {name: weight.shape for name, weight in self._weights.items()}
        if {name: weight.shape for name, weight in saved.items()} != shapes:
            raise ValueError(
                f"{file}: its shards do not fit this model; resume with the parallel sizes that the run was saved with"
            )
        for name, weight in saved.items():
            self._weights[name].copy_(weight)


@torch.no_grad()
def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, weight in _weights(model):
        weight.copy_(weights[name])


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, without Transformer Engine's `_extra_state` (its scales, not weights).

    Of a DTensor, what this rank holds.
    """
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and "_extra_state" not in name:
            value = value.detach()
            yield name, value.to_local() if isinstance(value, DTensor) else value
