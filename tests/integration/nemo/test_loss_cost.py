"""What the loss costs beside arithmetic: memory under NeMo-RL's packing wrapper, as `engines.nemo.memory` counts it,
from the allocator's own record; and waits for the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mopd_nemo.engines.nemo.memory import LOGITS_BYTES
from mopd_nemo.losses.objectives import Divergence
from tests.integration.nemo import cpu

LENGTH, VOCABULARY, K = 256, 4096, 4


@pytest.fixture(scope="module", autouse=True)
def importable() -> None:
    cpu.prepare()


@pytest.mark.parametrize("sequences", [1, 16])
def test_logits_and_gradients_of_a_packed_row_take_what_is_counted(sequences: int) -> None:
    """One sequence's gradient is the row's; with several the wrapper adds up a whole row's gradient for each."""
    logits = torch.randn(1, sequences * LENGTH, VOCABULARY, dtype=torch.bfloat16, requires_grad=True)
    loss, data, ends = packed(sequences)
    peak = peak_bytes(lambda: step(loss, logits, data, ends))
    assert logits.grad is not None and logits.grad.abs().sum() > 0
    entries = logits.numel()
    counted = (LOGITS_BYTES if sequences > 1 else 4) * entries
    widened = 6 * 4 * LENGTH * VOCABULARY  # one sequence's chunk in float32, a few times
    assert counted <= 2 * entries + peak <= counted + widened


def test_a_call_waits_for_the_gpu_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the sizes of its sequences and for its figures; every number that is fetched alone would be one more."""
    loss, data, _ = packed(2)
    waits: list[str] = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(Tensor, name, noted(name, getattr(Tensor, name), waits))
    logits = torch.randn(2, LENGTH, VOCABULARY, requires_grad=True)
    value, metrics = loss(data, torch.tensor(1.0), torch.tensor(1.0), logits=logits)
    assert waits.count("tolist") == 2 and set(waits) <= {"tolist", "nonzero"}, waits
    assert waits.count("nonzero") == 1  # of weights that are on the CPU
    monkeypatch.undo()
    assert metrics["loss"] == pytest.approx(value.item()) and metrics["loss"] == metrics["loss/0"] != 0


def noted(name: str, own: Any, waits: list[str]) -> Any:
    inside: list[None] = []

    def call(tensor: Tensor, *arguments: Any) -> Any:
        if not inside:  # the harness takes every call of torch's once more
            waits.append(name)
        inside.append(None)
        try:
            return own(tensor, *arguments)
        finally:
            inside.pop()

    return call


def packed(sequences: int) -> tuple[Any, dict[str, Any], Tensor]:
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    from mopd_nemo.engines.nemo.workers.loss import BatchLoss

    size = LENGTH - 1
    data: Any = BatchedDataDict(
        {
            "input_ids": torch.randint(0, VOCABULARY, (sequences, LENGTH)),
            "input_lengths": torch.full((sequences,), LENGTH),
            "prompt_lengths": torch.ones(sequences, dtype=torch.long),
            "advantages": torch.zeros(sequences),
            "weights": [np.ones((1, size), np.float32)] * sequences,
            "teacher_ids": [np.tile(np.arange(K, dtype=np.int32), (size, 1))] * sequences,
            "teacher_logprobs": [np.full((size, K), -2.0, np.float32)] * sequences,
        }
    )
    objective = Divergence("reverse_kl", support="teacher_topk", k=K)
    loss = BatchLoss([objective], None, VOCABULARY, watch=None, student_support=True, backend="dtensor")
    return loss, data, torch.arange(0, sequences * LENGTH + 1, LENGTH)


def step(loss: Any, logits: Tensor, data: Any, ends: Tensor) -> None:
    from nemo_rl.algorithms.loss.wrapper import SequencePackingLossWrapper

    wrapped = SequencePackingLossWrapper(
        loss, lambda logits, data, **_: ({"logits": logits}, data), cu_seqlens_q=ends, cu_seqlens_q_padded=ends
    )
    wrapped(logits, data, torch.tensor(1.0), torch.tensor(1.0))[0].backward()


def peak_bytes(work: Any) -> int:
    """Most that was allocated at once beyond what was there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    profiler: Any = profile.profiler
    records = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(records, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())
