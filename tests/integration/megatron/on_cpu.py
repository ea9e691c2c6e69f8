"""Let Megatron-Core run without CUDA, in a process made for it: its CUDA calls are turned to the CPU.

Megatron 0.16 asks for `device="cuda"`, for CUDA's generator state and streams, and compares tensor types with CUDA's.
Nothing of Megatron itself is changed but the two functions that read and set the generator state.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """Sends what is asked of a CUDA device to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def enter() -> None:
    """From now on, in this process."""
    warnings.filterwarnings("ignore")
    OnCpu().__enter__()
    idle = SimpleNamespace(synchronize=_nothing, wait_stream=_nothing, wait_event=_nothing, record_event=_nothing)
    replacements = {
        "current_device": lambda: torch.device("cpu"),
        "device_count": lambda: 1,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "current_stream": lambda *_: idle,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "manual_seed": torch.default_generator.manual_seed,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = _nothing
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    plain_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = plain_type(self, *args, **kwargs)
        return f"torch.cuda.{found.split('.')[-1]}" if isinstance(found, str) else found

    torch.Tensor.type = cuda_type  # type: ignore[method-assign]
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _nothing(*_: Any, **__: Any) -> None:
    return None
