"""Processes joined by gloo, for tests. No pytest here: it is imported in every process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def spawn(ranks: int, work: Callable[[], Any]) -> list[Any]:
    """Run `work` in `ranks` processes of one gloo group; what each returned, by rank. An error in one is raised."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        multiprocessing.start_processes(_enter, (ranks, directory, work), nprocs=ranks, start_method="spawn")
        return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _enter(rank: int, ranks: int, directory: Path, work: Callable[[], Any]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.save(work(), directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
