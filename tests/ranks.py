"""Processes joined by gloo, for tests. No pytest here: it is imported in every process."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def spawn(ranks: int, work: Callable[[], Any]) -> list[Any]:
    """Run `work` in `ranks` processes of one gloo group; what each returned, by rank. An error in one is raised."""
    with TemporaryDirectory() as name:
        return in_processes(ranks, partial(_joined, ranks, Path(name) / "store", work))


def in_processes(ranks: int, work: Callable[[int], Any], method: str = "spawn") -> list[Any]:
    """Run `work(rank)` in `ranks` new processes; what each returned, by rank. An error in one is raised."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        multiprocessing.start_processes(_enter, (directory, work), nprocs=ranks, start_method=method)
        return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _enter(rank: int, directory: Path, work: Callable[[int], Any]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.save(work(rank), directory / f"{rank}.pt")


def _joined(ranks: int, store: Path, work: Callable[[], Any], rank: int) -> Any:
    dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
    result = work()
    dist.barrier()
    dist.destroy_process_group()
    return result
