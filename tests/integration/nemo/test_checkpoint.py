"""A worker's own checkpoint: a new process continues from it bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mopd_nemo.engines.nemo.batches import train_batch
from tests.integration.nemo.ranks import cut, dealt, nemo_config, run_ranks, start
from tests.integration.nemo.test_loss import LESSONS, VOCAB, K, lesson_rows


def update(worker: Any, number: int) -> float:
    """One update on a lesson; the gradient's norm."""
    from mopd_nemo.engines.nemo.workers.loss import BatchLoss

    lesson = list(LESSONS)[number]
    batch = train_batch(*lesson_rows(lesson), None, pad_id=0, length_multiple=1)
    size = len(batch["weights"])
    data, _ = dealt(worker, batch, batch_size=size)
    worker.prepare_for_training()
    worker.set_learning_rate(rate=1e-3)
    result = worker.train(data, BatchLoss(LESSONS[lesson], 2.0, VOCAB, watch=K, student_support=True), gbs=size, mbs=1)
    return float(result["grad_norm"])


def saved_after_an_update(directory: Path) -> Any:
    """What follows an update, a save and two more updates."""
    worker = start(nemo_config(nemo=cut(2)))
    update(worker, 0)
    policy = directory / "policy"
    worker.save_checkpoint(weights_path=str(policy / "weights"), optimizer_path=str(policy / "optimizer"))
    return update(worker, 1), update(worker, 0), worker.exported()


def continued(directory: Path, rate: float, world: int = 2) -> Any:
    """The same two updates from the checkpoint."""
    worker = start(nemo_config(nemo=cut(world), optimizer={"learning_rate": rate}), checkpoint=directory)
    return update(worker, 1), update(worker, 0), worker.exported()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    directory = tmp_path_factory.mktemp("step_000001")
    return directory, run_ranks(saved_after_an_update, 2, directory)


@pytest.mark.parametrize("rate", [1e-3, 3e-6])
def test_two_ranks_continue_exactly_whatever_the_learning_rate_is_now(checkpoint: Any, rate: float) -> None:
    """The trainer gives every step its rate; the one in the config must not decide whether a checkpoint is known."""
    directory, expected = checkpoint
    for found, wanted in zip(run_ranks(continued, 2, directory, rate), expected, strict=True):
        assert found[:2] == wanted[:2]
        assert all(torch.equal(value, wanted[2][name]) for name, value in found[2].items())


def test_one_rank_continues_what_two_have_saved(checkpoint: Any) -> None:
    """The optimiser's state is dealt anew. Sums go another way, so the last bits may differ."""
    directory, ((*norms, exported), _) = checkpoint
    ((*found, weights),) = run_ranks(continued, 1, directory, 1e-3, 1)
    assert found == pytest.approx(norms, rel=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(value, exported[name], atol=5e-6, rtol=0)
