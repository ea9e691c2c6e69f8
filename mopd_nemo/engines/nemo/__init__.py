"""NeMo-RL: Megatron training, vLLM rollouts, Ray. The only room that imports nemo_rl, megatron or ray.

These modules run in the trainer's process; those in `workers` in the processes of NeMo-RL's policies.
"""

from __future__ import annotations

import importlib.util


def has_nemo_rl() -> bool:
    """Whether NeMo-RL is importable. The package of that name on PyPI is empty and does not count."""
    return all(importlib.util.find_spec(name) is not None for name in ("nemo_rl", "nemo_rl.algorithms"))
