"""Code written for CUDA on a machine without it: its calls and devices become the CPU's. Used by tests only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _CpuForCuda(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if _is_cuda(device) or isinstance(device, int):  # a number is a GPU's
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        number = func is torch.Tensor.to and len(args) > 1 and type(args[1]) is int
        return func(*("cpu" if _is_cuda(a) or (number and a is args[1]) else a for a in args), **kwargs)


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


def redirect_cuda() -> None:
    """From now on, in this process and, but for devices, in all its threads."""
    cuda: Any = torch.cuda
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    # What is pinned is a copy of what was on the GPU, whose memory is then given up.
    torch.Tensor.pin_memory = lambda self, *_, **__: self.clone()  # type: ignore[method-assign]
    # Megatron's optimizer recognises parameters by this name of their type.
    own_type = torch.Tensor.type
    torch.Tensor.type = lambda self, *a, **k: (  # type: ignore[method-assign]
        own_type(self, *a, **k) if a or k else f"torch.cuda.{own_type(self).rsplit('.', 1)[-1]}"
    )
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
    cuda.get_device_name = lambda *_: "CPU"
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda *_, **__: None
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda.Stream = _Idle
    cuda.current_stream = _Idle
    cuda.stream = lambda *_: nullcontext()
    cuda.memory_allocated = cuda.max_memory_allocated = cuda.memory_reserved = lambda *_, **__: 0
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, lambda *_, **__: None)  # one for each: torch.compile keeps a rule for every function
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: 0
    redirect_devices()


class _Idle:
    """A stream whose work is done when it is asked for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    synchronize = wait_stream = wait_event = record_event = lambda *_: None


def redirect_megatron_generator() -> None:
    """Megatron reads and sets CUDA's generator by functions of its own."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = _nothing


def redirect_megatron_mappings() -> None:
    """They make tensors on a GPU in the backward pass too, which torch runs outside of the mode below."""
    from megatron.core.tensor_parallel import mappings

    def on_cpu(own: Callable[..., Any], *args: Any, **named: Any) -> Any:
        with _CpuForCuda():
            return own(*args, **named)

    for name in ("_gather_along_first_dim", "_reduce_scatter_along_first_dim"):
        setattr(mappings, name, partial(on_cpu, getattr(mappings, name)))


def redirect_devices() -> None:
    """Tensors asked for on a GPU come to the CPU; for this thread, and for good."""
    _CpuForCuda().__enter__()


def _nothing(*_: Any, **__: Any) -> None:
    return None
