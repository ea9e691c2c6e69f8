"""What crosses Ray, cut by NeMo-RL's own sharding: as many bytes as there are numbers in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mopd_nemo.engines.nemo.batches import score_batch, split_scores, train_batch
from mopd_nemo.losses.logits import TopK
from mopd_nemo.types import TrainExample
from tests.integration.nemo import cpu
from tests.integration.nemo.ranks import num_bytes

RANKS, ROWS, LENGTH, K = 4, 256, 24, 16
PACKED = {
    "sequence_packing_args": {
        "algorithm": "modified_first_fit_decreasing",
        "input_key": "input_ids",
        "input_lengths_key": "input_lengths",
        "sequence_length_pad_multiple": 4,
        "max_tokens_per_microbatch": 512,
    }
}
DYNAMIC = {
    "dynamic_batching_args": {
        "input_key": "input_ids",
        "input_lengths_key": "input_lengths",
        "sequence_length_round": 4,
        "max_tokens_per_microbatch": 512,
    }
}


@pytest.fixture(scope="module", autouse=True)
def importable() -> None:
    cpu.order_path()


def batches() -> dict[str, dict[str, Any]]:
    """A training batch with all that one can carry, and one of candidates, from the scores of all ranks."""
    prompt, response = tuple(range(8)), tuple(range(LENGTH))
    rows = [TrainExample(0, n, prompt, response, (-1.0,) * LENGTH, advantage=0.5) for n in range(ROWS)]
    generator = np.random.default_rng(0)
    size = ROWS // RANKS * LENGTH
    scores = [
        {"ids": generator.integers(0, 99, (size, K), np.int32), "logprobs": generator.random((size, K), np.float32)}
        for _ in range(RANKS)
    ]
    order = [number for rank in range(RANKS) for number in range(rank, ROWS, RANKS)]
    targets = split_scores(scores, order, [LENGTH] * ROWS)
    sizes = {"pad_id": 0, "length_multiple": 4}
    every_row = torch.rand(ROWS, 1, LENGTH)
    return {
        "train": train_batch(rows, list(every_row), targets, list(every_row[:, 0]), **sizes),
        "candidates": score_batch([(prompt, response)] * ROWS, [target.ids_TK for target in targets], **sizes),
    }


def shards_of(batch: dict[str, Any], way: dict[str, Any]) -> list[Any]:
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    shards = BatchedDataDict(batch).shard_by_batch_size(RANKS, batch_size=ROWS, **way)
    return list(shards[0] if way else shards)


@pytest.mark.parametrize("way", [PACKED, DYNAMIC, {}], ids=["packed", "dynamic", "padded"])
@pytest.mark.parametrize("name", ["train", "candidates"])
def test_a_pickled_shard_is_as_large_as_its_tensors(name: str, way: dict[str, Any]) -> None:
    import ray.cloudpickle

    for shard in shards_of(batches()[name], way):
        size = len(ray.cloudpickle.dumps(shard))
        assert size <= 1.2 * sum(map(num_bytes, shard.values()))


def test_views_of_tensors_would_be_many_times_as_large() -> None:
    """What the test above would see if rows travelled as tensors that were cut from those of a rank."""
    import ray.cloudpickle

    batch = batches()["train"]
    for key in ("teacher_ids", "teacher_logprobs"):
        batch[key] = list(torch.from_numpy(np.concatenate(batch[key])).split(LENGTH))
    shard = shards_of(batch, PACKED)[0]
    assert len(ray.cloudpickle.dumps(shard)) > 50 * sum(map(num_bytes, shard.values()))


def test_workers_read_shards_and_the_driver_scores_where_ray_keeps_them() -> None:
    """Nothing is copied on reading, and what is made of it can be written to and outlives it."""
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    try:
        batch = batches()["train"]
        shard = ray.get(ray.put(shards_of(batch, PACKED)[0]))
        assert not any(part.flags.owndata or part.flags.writeable for part in shard["teacher_ids"])
        scores = {"ids": np.ones((LENGTH, K), np.int32), "logprobs": np.zeros((LENGTH, K), np.float32)}
        kept = split_scores([ray.get(ray.put(scores))], [0], [LENGTH])[0]
        assert owns(kept.ids_TK) and owns(kept.logprobs_TK)
    finally:
        ray.shutdown()
    assert isinstance(kept, TopK) and kept.ids_TK.sum() == LENGTH * K


def owns(part: Tensor) -> bool:
    part += 0
    return part.untyped_storage().nbytes() == part.nbytes
