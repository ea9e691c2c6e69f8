"""What lets NeMo-RL's and Megatron-Core's own code run on a machine without a GPU. Used by tests only.

Three things are replaced, none of which is under test: CUDA calls and devices become CPU ones; packages that exist only
for CUDA or only inside NeMo-RL's containers (Megatron-Bridge, megatron.training) become empty modules whose every name
is an empty class; and before Python 3.12 `typing.TypedDict` becomes the one that pydantic accepts.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any

import torch
import typing_extensions

from tests.integration.on_cpu import redirect_cuda

SOURCE = "NEMO_RL_SOURCE"

NEWER_MEGATRON = {
    "megatron.core.dist_checkpointing.strategies.torch": ("get_async_strategy",),
    "megatron.core.distributed.fsdp.mcore_fsdp_adapter": ("FullyShardedDataParallelV1", "FullyShardedDataParallelV2"),
    "megatron.core.inference.engines.dynamic_engine": ("EngineState",),
    "megatron.core.inference.utils": ("device_memory_summary",),
    "megatron.core.resharding.refit": ("prepare_swap_model_weights",),
    "megatron.core.transformer.enums": ("InferenceCudaGraphScope",),
}
"""What NeMo-RL's policy worker imports from a Megatron-Core newer than that on PyPI, for other purposes than ours."""


def nemo_rl_missing() -> str | None:
    """Why NeMo-RL cannot be imported here, or None."""
    source = os.environ.get(SOURCE)
    if source:
        return None if (Path(source) / "nemo_rl" / "algorithms").is_dir() else f"{SOURCE}={source}: no nemo_rl in it"
    if importlib.util.find_spec("nemo_rl") and importlib.util.find_spec("nemo_rl.algorithms"):
        return None
    return f"NeMo-RL is not importable; set {SOURCE} to a checkout of it"


def prepare(*, megatron: bool = True) -> None:
    """Make NeMo-RL importable in this process. With `megatron`, its Megatron modules too, on the CPU."""
    source = os.environ.get(SOURCE)
    if source and source not in sys.path:
        sys.path.insert(0, source)
    if sys.version_info < (3, 12):
        typing.TypedDict = typing_extensions.TypedDict  # pyrefly: ignore
    if megatron and importlib.util.find_spec("megatron") is None:
        raise RuntimeError("megatron-core is not installed")
    if megatron and not torch.cuda.is_available() and not any(isinstance(f, _Absent) for f in sys.meta_path):
        sys.meta_path.append(_Absent())
        redirect_cuda()
        for name, missing in NEWER_MEGATRON.items():
            module = importlib.import_module(name)
            for attribute in missing:
                if not hasattr(module, attribute):
                    setattr(module, attribute, type(attribute, (), {}))
        _widen_packed_seq_params()


def _widen_packed_seq_params() -> None:
    """Newer ones count their tokens, for Mamba's sake, and NeMo-RL fills that in."""
    from megatron.core import packed_seq_params

    older: Any = packed_seq_params.PackedSeqParams
    if "total_tokens" not in older.__dataclass_fields__:
        packed_seq_params.PackedSeqParams = dataclasses.make_dataclass(
            "PackedSeqParams", [("total_tokens", int | None, None)], bases=(older,)
        )


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, last of all finders, packages that need CUDA to exist."""

    ROOTS = (
        "megatron.bridge",
        "megatron.training",
        "megatron.core.inference.config",
        "megatron.core.inference.shards",
        "megatron.core.transformer.moe.moe_logging",
    )

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(name == root or name.startswith(f"{root}.") for root in self.ROOTS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Empty(spec.name)
        if spec.name == "megatron.training.utils":
            module.get_ltor_masks_and_position_ids = _causal_masks  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _causal_masks(data: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None, torch.Tensor]:
    """What megatron.training gives NeMo-RL for a padded micro-batch; True is masked."""
    size = data.shape[1]
    mask = torch.triu(torch.ones(1, 1, size, size, dtype=torch.bool), diagonal=1)
    return mask, None, torch.arange(size).expand_as(data)
