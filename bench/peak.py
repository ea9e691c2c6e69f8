"""The peak memory of tensors: as a GPU's allocator counts it, or tracked on a CPU, where torch counts nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak:
    """Inside, the most bytes that tensors take at once: all that the allocator holds on a GPU, all that operations
    make inside on a CPU. What an operation takes for itself while it runs is seen on a GPU alone.

    Args:
        limit: bytes that a CPU is taken to have; more raises `torch.OutOfMemoryError`.
    """

    def __init__(self, device: str, limit: int | None = None) -> None:
        self.bytes = 0
        self._tracked = None if device.startswith("cuda") else _Tracked(limit)

    def restart(self) -> None:
        """Forget the peak so far: it begins with what is there now."""
        if self._tracked is not None:
            self._tracked.peak = self._tracked.live
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before, too, as a GPU's allocator does."""
        if self._tracked is not None:
            for tensor in tensors:
                self._tracked.add(tensor.untyped_storage())

    def read(self) -> int:
        """The peak since the start or `restart`."""
        return self._tracked.peak if self._tracked is not None else torch.cuda.max_memory_allocated()

    def __enter__(self) -> Self:
        if self._tracked is not None:
            self._tracked.__enter__()
        self.restart()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bytes = self.read()
        if self._tracked is not None:
            self._tracked.__exit__(*error)


class _Tracked(TorchDispatchMode):
    """Counts the storages that operations return, until they are freed."""

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._limit = limit
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given:  # the rest was counted when it was made, or is from before
                self.add(storage)
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, once."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        if self._limit is not None and self.live + size > self._limit:
            raise torch.OutOfMemoryError(f"{self.live + size} bytes, of {self._limit}")
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]
    return [leaf.untyped_storage() for leaf in leaves]
