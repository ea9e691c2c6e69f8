"""The past self beside a sharded Megatron model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.conftest import EMBEDDED
from tests.integration.nemo.ranks import run_ranks


def live(directory: Path, tp: int, pp: int) -> Any:
    """An EMA through two updates, a save, a third update, and the same from the save; whole flattened weights."""
    import torch.distributed as dist

    from mopd_nemo.engines.nemo.teacher_worker import TeacherMethods
    from tests.integration.nemo.qwen3 import build, start_megatron

    start_megatron(tp, pp)
    model = build(EMBEDDED).bfloat16()

    class Worker(TeacherMethods):
        should_disable_forward_pre_hook = False

        def __init__(self) -> None:
            self.model = model

    def weights() -> torch.Tensor:
        return torch.cat([p.detach().float().flatten() for p in model.parameters()])

    def step() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.03125)

    worker = Worker()
    worker.start_teacher(kind="ema", directory=None)
    past = weights()
    expected = past.clone()
    for _ in range(2):
        step()
        worker.follow_student(rate=0.25)
        expected.lerp_(weights(), 0.25)
    worker.save_teacher(directory=str(directory))
    shadow = torch.cat([worker._shadow._weights[name].flatten() for name, _ in model.named_parameters()])
    torch.testing.assert_close(shadow, expected)  # float32, though the model is bfloat16
    student = weights()
    with worker._shadow.in_place_of(model):
        torch.testing.assert_close(weights(), expected.bfloat16().float())
    assert torch.equal(weights(), student)
    try:
        with worker._shadow.in_place_of(model):
            raise KeyError
    except KeyError:
        assert torch.equal(weights(), student)
    again = Worker()
    again.start_teacher(kind="ema", directory=str(directory))
    for one, other in ((worker, again),):
        step()
        one.follow_student(rate=0.25)
        other.follow_student(rate=0.25)
        for name, value in one._shadow._weights.items():
            assert torch.equal(value, other._shadow._weights[name])
    dist.barrier()
    return sorted(file.name for file in directory.iterdir())


def load_cut_differently(directory: Path) -> str:
    from mopd_nemo.engines.nemo.teacher_worker import TeacherMethods
    from tests.integration.nemo.qwen3 import build, start_megatron

    start_megatron(1, 1)
    worker = type("Worker", (TeacherMethods,), {"should_disable_forward_pre_hook": False})()
    worker.model = build(EMBEDDED)
    try:
        worker.start_teacher(kind="ema", directory=str(directory))
    except ValueError as error:
        return str(error)
    return "loaded"


def test_average_is_exact_survives_a_save_and_leaves_the_student_alone(tmp_path: Path) -> None:
    saved = tmp_path / "teacher"
    for files in run_ranks(live, 2, saved, 2, 1):
        assert files == ["shard_pp00_tp00_ep00.pt", "shard_pp00_tp01_ep00.pt"]
    (message,) = run_ranks(load_cut_differently, 1, saved)
    assert "resume with the parallel sizes that the run was saved with" in message


def test_data_parallel_ranks_write_a_shard_once(tmp_path: Path) -> None:
    for files in run_ranks(live, 2, tmp_path / "teacher", 1, 1):
        assert files == ["shard_pp00_tp00_ep00.pt"]
