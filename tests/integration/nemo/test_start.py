"""NeMo-RL's unchanged worker starts from this project's own block, and holds the Hugging Face model exactly."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import EMBEDDED
from tests.integration.nemo.ranks import nemo_config, run_ranks, start

CUTS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(2, 2)]}
"""World size → (tensor, pipeline)."""


SOURCES = {
    "nemo_rl.models.policy": "NEMO_RL_SOURCE",
    "megatron.bridge": "MEGATRON_BRIDGE_SOURCE",
    "megatron.core": "MEGATRON_LM_SOURCE",
}
"""Module → the variable that names a checkout for it."""


def origins() -> dict[str, str]:
    """The directory that each module comes from in this process."""
    return {name: importlib.import_module(name).__path__[0] for name in SOURCES}


def test_workers_run_the_checkouts_that_are_named() -> None:
    (found,) = run_ranks(origins, 1)
    for name, variable in SOURCES.items():
        if os.environ.get(variable):
            assert Path(found[name]).resolve().is_relative_to(Path(os.environ[variable]).resolve()), found[name]
        else:
            assert "site-packages" in found[name], found[name]


def there_and_back(world: int) -> list[tuple[str, str, dict[str, Any]]]:
    """For each cut: what was started, and the Hugging Face model that came back out of it."""
    found = []
    for tensor, pipeline in CUTS[world]:
        settings = nemo_config(
            nemo={
                "gpus_per_node": world,
                "student": {"tensor": tensor, "pipeline": pipeline, "sequence": False},
                "policy": {"megatron_cfg": {"force_reconvert_from_hf": True}},  # by this cut, not by another's
            }
        )
        worker = start(settings)
        found.append((type(worker.model).__name__, type(worker.optimizer).__name__, worker.exported()))
    return found


@pytest.mark.parametrize("world", CUTS)
def test_a_model_comes_through_megatron_bit_by_bit(world: int) -> None:
    source = load_file(EMBEDDED / "model.safetensors")
    for rank in run_ranks(there_and_back, world, world):
        assert len(rank) == len(CUTS[world])
        for model, optimizer, exported in rank:
            assert (model, optimizer) == ("DistributedDataParallel", "ChainedOptimizer")
            assert exported.keys() == source.keys()
            assert all(torch.equal(exported[name], value.float()) for name, value in source.items())
