"""The self-teacher beside the model of a real worker: an average of the optimiser's weights, kept in shares."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mopd_nemo.engines.nemo.batches import score_batch
from mopd_nemo.engines.nemo.workers.self_teacher import main_weight
from tests.integration.nemo.ranks import cut, dealt, nemo_config, run_ranks, start
from tests.integration.nemo.test_checkpoint import update
from tests.integration.nemo.test_loss import VOCAB, K
from tests.integration.nemo.test_scoring import LENGTHS, sequences

RATE = 0.25


def started(world: int, dtype: str, trains: bool = True, tensor: int = 1) -> Any:
    optimizer = {"use_precision_aware_optimizer": False}  # Transformer Engine's
    policy = {"megatron_cfg": {"optimizer": optimizer}}
    nemo = cut(world, tensor=tensor) | {"policy": policy}
    return start(nemo_config(model={"dtype": dtype}, nemo=nemo), trains=trains)


def whole(worker: Any, values: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """All ranks' values of all weights, in float32 or what they are."""
    import torch.distributed as dist

    share = worker._share()
    mine = [(name, share[name].start, part.clone()) for name, part in values]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    found: dict[str, list[Any]] = {}
    for name, first, part in (entry for rank in every for entry in rank):
        found.setdefault(name, []).append((first, part))
    return {
        name: torch.cat([part for _, part in sorted(parts, key=lambda own: own[0])]) for name, parts in found.items()
    }


def kept(worker: Any) -> dict[str, Tensor]:
    return whole(worker, [(name, part.values) for name, part in worker._self_teacher._parts.items()])


def scores(worker: Any, self_teacher: bool) -> dict[str, Tensor]:
    rows = [(ids[:prompt], ids[prompt:]) for ids, (prompt, _) in zip(sequences(), LENGTHS, strict=True)]
    data, _ = dealt(worker, score_batch(rows, None, pad_id=0, length_multiple=1))
    worker.prepare_for_lp_inference()
    return worker.score_responses(data=data, k=K, vocab_size=VOCAB, self_teacher=self_teacher, dtype="float32")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[n]), torch.as_tensor(other[n])) for n in one
    )


def updated_alone(dtype: str) -> dict[str, Tensor]:
    """The student after the updates of `averaged`, without a teacher beside it."""
    worker = started(2, dtype)
    for number in range(3):
        update(worker, number)
    return worker.exported()


def averaged(directory: Path, dtype: str) -> dict[str, Tensor]:
    """An EMA through three updates, a step without one, and its scores. The EMA."""
    alone = updated_alone(dtype)
    worker = started(2, dtype)
    worker.start_teacher(kind="ema", directory=None)
    plain = whole(worker, worker._main_weights())
    for number in range(3):
        update(worker, number)
        main = whole(worker, worker._main_weights())
        names = {name.split(".", 2)[2]: values for name, values in main.items()}
        for name, parameter in worker.weights().items():  # the optimiser's weights, rounded, are the model's
            assert torch.equal(names[name].to(parameter.dtype), parameter.flatten())
        worker.follow_student(rate=RATE)
        plain = {name: values.lerp(main[name], RATE) for name, values in plain.items()}
        student = worker.weights()
        by_teacher = scores(worker, self_teacher=True)
        assert same(worker.weights(), student)
        with pytest.raises(KeyError), worker._self_teacher_inside():
            raise KeyError
        assert same(worker.weights(), student)
    assert same(worker.exported(), alone)
    worker.offload_after_refit()  # a step that teaches nothing leaves the student there
    worker.prepare_for_training()
    worker.follow_student(rate=RATE)
    plain = {name: values.lerp(main[name], RATE) for name, values in plain.items()}
    average = kept(worker)
    assert {values.dtype for values in average.values()} == {torch.float32}
    for name, values in average.items():
        torch.testing.assert_close(values, plain[name], atol=1e-6, rtol=0)
    by_teacher = scores(worker, self_teacher=True)
    with torch.no_grad():
        for name, parameter in worker.model.named_parameters():
            parameter.copy_(average[f"pp0.tp0.{name}"].view_as(parameter))
    assert same(by_teacher, scores(worker, self_teacher=False)) and not same(worker.weights(), student)
    worker.save_teacher(directory=str(directory))
    return average


def continued(directory: Path, world: int, dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The saved EMA, and after a further step."""
    worker = started(world, dtype)
    worker.start_teacher(kind="ema", directory=str(directory))
    average = kept(worker)
    worker.follow_student(rate=RATE)
    return average, kept(worker)


def refused(directory: Path) -> str:
    worker = started(2, "float32", trains=False, tensor=2)
    with pytest.raises(ValueError, match="resume with the parallel sizes") as error:
        worker.start_teacher(kind="ema", directory=str(directory))
    return str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_average_of_the_optimisers_weights_in_shares_of_two_ranks(dtype: str, tmp_path: Path) -> None:
    directory = tmp_path / "teacher"
    (average, _) = run_ranks(averaged, 2, directory, dtype)
    sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
    assert set(sizes) == {"rank_00000.pt", "rank_00001.pt"}
    half = 4 * sum(values.numel() for values in average.values()) / 2
    assert all(half < size < 1.05 * half for size in sizes.values()), (sizes, half)
    after = {}
    for world in (2, 1):
        for loaded, moved in run_ranks(continued, world, directory, world, dtype):
            assert same(loaded, average)
            after[world] = moved
    assert same(after[1], after[2])
    assert str(directory) in run_ranks(refused, 2, directory)[0]


def frozen(directory: Path) -> list[str]:
    """A frozen teacher beside a student that moves; then a model without an optimiser, of which each rank has all."""
    worker = started(2, "bfloat16")
    worker.start_teacher(kind="frozen", directory=None)
    first = scores(worker, self_teacher=False)
    update(worker, 0)
    assert same(scores(worker, self_teacher=True), first) and not same(scores(worker, self_teacher=False), first)
    assert {values.dtype for values in kept(worker).values()} == {torch.bfloat16}
    worker = started(2, "bfloat16", trains=False)
    worker.start_teacher(kind="ema", directory=None)
    past = worker.weights()
    with torch.no_grad():
        for parameter in worker.model.parameters():
            parameter.mul_(1.03125)
    student = worker.weights()
    worker.follow_student(rate=RATE)
    with worker._self_teacher_inside():
        now = worker.weights()
    for name, values in past.items():
        torch.testing.assert_close(
            now[name].float(), values.float().lerp(student[name].float(), RATE).bfloat16().float()
        )
    assert same(worker.weights(), student)
    worker.save_teacher(directory=str(directory))
    return sorted(file.name for file in directory.iterdir())


def test_frozen_teacher_stays_and_a_model_without_an_optimiser_has_one_too(tmp_path: Path) -> None:
    assert run_ranks(frozen, 2, tmp_path / "teacher") == [["rank_00000.pt"]] * 2  # each weight once


def test_weights_of_transformer_engines_adam() -> None:
    """It keeps the low half of a float32 beside the bfloat16 that the float32 is rounded to."""
    main = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    bits = main.view(torch.int32)
    low = bits.to(torch.int16)  # the low half; where it is half or more, the bfloat16 is the next one
    values = ((bits >> 16) + (low < 0).int()).to(torch.int16).view(torch.bfloat16)
    torch.testing.assert_close(values, main.bfloat16(), atol=0, rtol=2**-8)
    assert low.min() < 0 < low.max()
    parameter = torch.nn.Parameter(values)
    inner = SimpleNamespace(state={}, get_unscaled_state=lambda of, name: inner.state[of][name])
    optimizer = SimpleNamespace(optimizer=inner)
    assert torch.equal(main_weight(optimizer, parameter, values), values)  # before the first update
    inner.state[values] = {"master_param": low}
    assert torch.equal(main_weight(optimizer, parameter, values), main)
    inner.state[values] = {"master_param": main}
    assert main_weight(optimizer, parameter, values) is main
