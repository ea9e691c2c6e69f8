"""The self-teacher beside the model of a real worker, in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.nemo.ranks import cut, nemo_config, run_ranks, start


def started(tensor: int, world: int, dtype: str, expert_tensor: int = 1) -> Any:
    optimizer = {"use_precision_aware_optimizer": False}  # Transformer Engine's
    policy = {"megatron_cfg": {"optimizer": optimizer, "expert_tensor_parallel_size": expert_tensor}}
    settings = nemo_config(model={"dtype": dtype}, nemo=cut(world, tensor=tensor) | {"policy": policy})
    return start(settings, trains=False)


def live(directory: Path, tensor: int, expert_tensor: int) -> Any:
    """An EMA through two updates, a save, a third update, and the same from the save."""
    import torch.distributed as dist

    worker = started(tensor, 2, "bfloat16", expert_tensor)
    model = worker.model

    def weights() -> torch.Tensor:
        return torch.cat([p.detach().float().flatten() for p in model.parameters()])

    def step() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.03125)

    worker.start_teacher(kind="ema", directory=None)
    past = weights()
    expected = past.clone()
    for _ in range(2):
        step()
        worker.follow_student(rate=0.25)
        expected.lerp_(weights(), 0.25)
    worker.save_teacher(directory=str(directory))
    names = [name.removeprefix("module.") for name, _ in model.named_parameters()]
    kept = torch.cat([worker._self_teacher._weights[name].flatten() for name in names])
    torch.testing.assert_close(kept, expected)  # float32, though the model is bfloat16
    student = weights()
    with worker._self_teacher.in_place_of(model):
        torch.testing.assert_close(weights(), expected.bfloat16().float())
    assert torch.equal(weights(), student)
    try:
        with worker._self_teacher.in_place_of(model):
            raise KeyError
    except KeyError:
        assert torch.equal(weights(), student)
    step()
    worker.follow_student(rate=0.25)
    moved = worker._self_teacher._weights
    worker.start_teacher(kind="ema", directory=str(directory))
    worker.follow_student(rate=0.25)
    assert all(torch.equal(value, worker._self_teacher._weights[name]) for name, value in moved.items())
    dist.barrier()
    return sorted(file.name for file in directory.iterdir())


def load_cut_differently(directory: Path) -> str:
    worker = started(1, 1, "float32")
    try:
        worker.start_teacher(kind="ema", directory=str(directory))
    except ValueError as error:
        return str(error)
    return "loaded"


def test_average_is_exact_survives_a_save_and_leaves_the_student_alone(tmp_path: Path) -> None:
    saved = tmp_path / "teacher"
    for files in run_ranks(live, 2, saved, 2, 1):
        assert files == ["shard_pp00_tp00_ep00_et00.pt", "shard_pp00_tp01_ep00_et00.pt"]
    (message,) = run_ranks(load_cut_differently, 1, saved)
    assert "resume with the parallel sizes that the run was saved with" in message


@pytest.mark.parametrize(
    ("expert_tensor", "shards"),
    [(1, ["shard_pp00_tp00_ep00_et00.pt"]), (2, ["shard_pp00_tp00_ep00_et00.pt", "shard_pp00_tp00_ep00_et01.pt"])],
)
def test_data_parallel_ranks_write_a_shard_once(expert_tensor: int, shards: list[str], tmp_path: Path) -> None:
    """With experts cut finer than all else, two of them hold other parts of the experts."""
    for files in run_ranks(live, 2, tmp_path / "teacher", 1, expert_tensor):
        assert files == shards
