"""A stand-in for `sample_on_worker` that Ray can find by name."""

from __future__ import annotations

import time
from typing import Any


def echo_on_worker(worker: Any, reports: Any, prompts: list[tuple[int, list[int]]], num_samples: int) -> None:
    """Which worker got what, one after the other."""
    for number, ids in prompts:
        for index in range(num_samples):
            time.sleep(0.3)
            reports.put_nowait_batch([(number, index, (type(worker).__name__, ids))])
