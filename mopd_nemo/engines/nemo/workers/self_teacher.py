"""A second set of weights for a sharded model, of which each rank keeps a share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Part:
    """The part of one weight that a rank keeps for a self-teacher.

    Args:
        values: [N], a view of the model's memory.
        start: index of the first among the weight's values.
        shape: of the weight, as model parallelism cuts it.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]


Share = Mapping[str, Part]
"""A rank's parts. Weights that model parallelism cuts have a name for each shard."""


class SelfTeacher:
    """This rank's share of a second set of weights. It lies in pinned memory of the host, which GPUs copy fastest.

    Args:
        share: of the student; the teacher starts with its present weights.
        dtype: of the teacher's weights. A moving average takes small steps and needs float32. None keeps each weight's
            own type, which suffices for a fixed copy.
    """

    def __init__(self, share: Share, dtype: torch.dtype | None) -> None:
        self._parts = {name: Part(_pinned(part.values, dtype), part.start, part.shape) for name, part in share.items()}

    @torch.no_grad()
    def follow(self, student: Iterable[tuple[str, Tensor]], rate: float) -> None:
        """teacher ← (1 - rate)·teacher + rate·student, on the student's device."""
        for name, values in student:
            own = self._parts[name].values
            own.copy_(own.to(values.device, non_blocking=True).lerp_(values.to(own.dtype), rate))

    def write(self, share: Share) -> None:
        """Put the teacher's weights in the place of the student's."""
        for name, part in share.items():
            own = self._parts[name].values
            part.values.copy_(own.to(part.values.device, non_blocking=True))

    def save(self, directory: Path) -> None:
        """Write a file of this rank's parts, without those that a rank before it has too. Collective."""
        kept = [(name, part.start) for name, part in self._parts.items()]
        held: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(held, kept)
        before = {key for rank in held[: dist.get_rank()] for key in rank}
        own = {
            name: (part.values, part.start, list(part.shape))
            for name, part in self._parts.items()
            if (name, part.start) not in before
        }
        if own:
            directory.mkdir(parents=True, exist_ok=True)
            torch.save(own, directory / f"rank_{dist.get_rank():05d}.pt")
        dist.barrier()

    def load(self, directory: Path) -> None:
        """Continue from `save`, also with another number of data-parallel ranks.

        Raises:
            ValueError: the model is cut otherwise than it was.
        """
        missing = {name: part.values.numel() for name, part in self._parts.items()}
        for file in sorted(directory.glob("rank_*.pt")):
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            for name, (values, start, shape) in saved.items():
                own = self._parts.get(name)
                if own is None or own.shape != tuple(shape):
                    continue
                first = max(start, own.start)
                count = min(start + len(values), own.start + len(own.values)) - first
                if count > 0:
                    own.values[first - own.start :][:count] = values[first - start :][:count]
                    missing[name] -= count
        incomplete = sorted(name for name, count in missing.items() if count)
        if incomplete:
            raise ValueError(
                f"{directory}: its teacher does not fit this model, {len(incomplete)} of {len(missing)} weights are "
                f"missing or cut otherwise, such as {incomplete[0]}; resume with the parallel sizes that the run was "
                "saved with (with nemo.backend=megatron the number of GPUs may change)"
            )


def _pinned(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy on the host."""
    pinned = torch.cuda.is_available()
    return torch.empty(values.shape, dtype=dtype or values.dtype, pin_memory=pinned, device="cpu").copy_(values)


def distributed_optimizers(optimizer: Any) -> list[Any]:
    """Megatron's, of dense weights and of experts; none if any weights have an optimiser of another kind."""
    every = getattr(optimizer, "chained_optimizers", [optimizer])
    own = [part for part in every if not getattr(part, "is_stub_optimizer", False)]
    return own if all(hasattr(part, "model_param_gbuf_map") for part in own) else []


def optimizers_share(optimizers: Iterable[Any], names: Mapping[nn.Parameter, str]) -> Share:
    """What this rank's part of the optimisers moves."""
    return {
        names[parameter]: Part(values.detach(), start, tuple(parameter.shape))
        for optimizer in optimizers
        for parameter, values, start in owned(optimizer)
    }


def main_weights(optimizers: Iterable[Any], names: Mapping[nn.Parameter, str]) -> Iterator[tuple[str, Tensor]]:
    """The same values as precisely as the optimisers have them."""
    for optimizer in optimizers:
        for parameter, values, _ in owned(optimizer):
            yield names[parameter], main_weight(optimizer, parameter, values)


def owned(optimizer: Any) -> Iterator[tuple[nn.Parameter, Tensor, int]]:
    """What this rank's part of a distributed optimiser moves.

    Yields:
        A parameter, this rank's values of it, a view [N] of the model's memory, and the index of the first.
    """
    for models, parts in (
        (optimizer.model_float16_groups, optimizer.shard_float16_groups),
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
    ):
        for parameter, values in zip(chain.from_iterable(models), chain.from_iterable(parts), strict=True):
            buffer, dtype, bucket = optimizer.model_param_gbuf_map[parameter]
            place = optimizer.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
            yield parameter, values, place.start


def main_weight(optimizer: Any, parameter: nn.Parameter, values: Tensor) -> Tensor:
    """The optimiser's own, most precise values [N] of a parameter.

    Megatron keeps them itself, or Transformer Engine's Adam keeps them in its state from the first update on.

    Args:
        values: of the parameter, as `owned` gives them.
    """
    main = getattr(parameter, "main_param", None)
    if main is not None:
        return main.detach()
    inner = optimizer.optimizer
    if "master_param" not in inner.state.get(values, {}):
        return values.detach()
    scaled = hasattr(inner, "get_unscaled_state")  # not in Megatron's own optimiser for the host
    main = inner.get_unscaled_state(values, "master_param") if scaled else inner.state[values]["master_param"]
    return with_low_bits(values.detach(), main) if main.dtype == torch.int16 else main


def with_low_bits(values: Tensor, low: Tensor) -> Tensor:
    """The float32 that Transformer Engine's Adam keeps as the bfloat16 it is rounded to and its own low 16 bits.

    Where the low bits are half or more, the bfloat16 is the next one. Source: `multi_tensor_adam_param_remainder`.
    """
    low = low.to(values.device).int()
    return ((values.view(torch.int16).int() - (low < 0).int() << 16) | (low & 0xFFFF)).view(torch.float32)
