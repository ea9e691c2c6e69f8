"""What follows the last attention is computed where hidden states are wanted, not for contexts that only gave keys.

Shape suffixes: S positions, R wanted ones, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def last_feed_forward(module: Any) -> nn.Module | None:
    """The feed-forward block of a model's last layer, where the architecture has it under its usual name."""
    layers = getattr(module.base_model, "layers", None)
    return getattr(layers[-1], "mlp", None) if isinstance(layers, nn.ModuleList) and len(layers) else None


@contextmanager
def computed_at(block: nn.Module | None, wanted_R: Tensor) -> Iterator[None]:
    """Inside, the block maps [1, S, H] to [1, S, H]: zeros everywhere but at the wanted positions, each given once."""
    if block is None:
        yield
        return
    length = 0

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal length
        length = inputs[0].shape[1]
        return (inputs[0].index_select(1, wanted_R), *inputs[1:])

    def spread(_: nn.Module, __: tuple[Tensor, ...], found_1RH: Tensor) -> Tensor:
        return found_1RH.new_zeros(1, length, found_1RH.shape[-1]).index_copy_(1, wanted_R, found_1RH)

    hooks = block.register_forward_pre_hook(select), block.register_forward_hook(spread)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
