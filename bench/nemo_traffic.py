"""The cost of sending a step's targets to the workers: bytes, and seconds to write them to Ray's store and read them.

    PYTHONPATH=nemo-rl python bench/nemo_traffic.py [--rows 64] [--tokens 256] [--k 100] [--ranks 4]

`nemo-rl` is a checkout of NeMo-RL, whose own sharding is used, and Ray is real. The same targets are sent in three
ways: as views of everything that a rank has scored (for comparison only), as separate tensors, and as `train_batch`
sends them where they do not stay in the workers; the last line is a batch whose targets do. The size of views grows
with the square of the rows: 64 rows of 256 tokens need a gigabyte.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.cloudpickle
import torch

sys.path.insert(1, str(Path(__file__).parents[1]))
from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from mopd_nemo.engines.nemo.batches import joined, split_scores, train_batch
from mopd_nemo.types import TrainExample

KEYS = ("teacher_ids", "teacher_logprobs")
STORE = 4 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rows": 64, "tokens": 256, "k": 100, "ranks": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    batch = train(arguments.rows, arguments.tokens, arguments.k, arguments.ranks)
    whole = {key: joined(batch[key]) for key in KEYS}
    views = {key: list(whole[key].split(arguments.tokens)) for key in KEYS}
    ways = {
        "tensors, views": views,
        "tensors, copies": {key: [part.clone() for part in views[key]] for key in KEYS},
        "NumPy, as sent": {},
        "kept in the workers": {"keys": torch.arange(arguments.rows)},
    }
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=STORE)
    needed = sum(part.nbytes for key in KEYS for part in batch[key])
    print(f"{arguments.rows} rows x {arguments.tokens} tokens x {arguments.k}: targets of {needed / 1e6:.1f} MB")
    print("| way | MB serialised | of the targets | put, s | read, s |\n|---|---|---|---|---|")
    for name, changed in ways.items():
        left_out = KEYS if "keys" in changed else ()
        sent = {key: column for key, column in (batch | changed).items() if key not in left_out}
        stored, put, read = travel(shards(sent, arguments.ranks))
        print(f"| {name} | {stored / 1e6:.1f} | {stored / needed:.1f} | {put:.3f} | {read:.3f} |", flush=True)
    ray.shutdown()


def train(rows: int, tokens: int, k: int, ranks: int) -> dict[str, Any]:
    """A training batch with random targets."""
    draw = np.random.default_rng(0)
    shape = (rows * tokens, k)
    scores = {"ids": draw.integers(0, 151936, shape, np.int32), "logprobs": -draw.random(shape, np.float32)}
    targets = split_scores([scores], range(rows), [tokens] * rows)
    taught = [TrainExample(0, n, (0,) * 16, (1,) * tokens, (-1.0,) * tokens, advantage=0.0) for n in range(rows)]
    weights = [torch.ones(1, tokens)] * rows
    return train_batch(taught, weights, targets, None, pad_id=0, length_multiple=4)


def shards(batch: dict[str, Any], ranks: int) -> list[Any]:
    packing = {
        "algorithm": "modified_first_fit_decreasing",
        "input_key": "input_ids",
        "input_lengths_key": "input_lengths",
        "sequence_length_pad_multiple": 4,
        "max_tokens_per_microbatch": 16384,
    }
    data: Any = BatchedDataDict(batch)
    return data.shard_by_batch_size(ranks, batch_size=data.size, sequence_packing_args=packing)[0]


def travel(parts: list[Any]) -> tuple[float, float, float]:
    """Bytes, seconds to write, seconds to read."""
    stored, put, read = 0.0, 0.0, 0.0
    for part in parts:
        stored += len(ray.cloudpickle.dumps(part))
        start = time.perf_counter()
        reference = ray.put(part)
        done = time.perf_counter()
        ray.get(reference)
        put, read = put + done - start, read + time.perf_counter() - done
    return stored, put, read


if __name__ == "__main__":
    main()
