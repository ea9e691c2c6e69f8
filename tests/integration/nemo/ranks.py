"""Run a function on several processes joined by gloo and collect what each returns. Used by tests only."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.integration.nemo import cpu


def run_ranks(function: Callable[..., Any], world: int, directory: Path, *args: Any) -> list[Any]:
    """`function(*args)` on every rank; results by rank, through files."""
    directory.mkdir(parents=True, exist_ok=True)
    mp.start_processes(_rank, (function, world, directory, args), nprocs=world, start_method="spawn")
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, function: Callable[..., Any], world: int, directory: Path, args: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    cpu.prepare()
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{directory}/rendezvous")
        torch.save(function(*args), directory / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        traceback.print_exc(file=sys.stderr)
        raise
