"""These tests use NeMo-RL's own code and skip, with the reason, where it is not importable."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.integration.nemo import cpu


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = cpu.nemo_rl_missing()
    if reason is None and not all(importlib.util.find_spec(name) for name in ("megatron", "megatron.core")):
        reason = "megatron-core is not installed: pip install megatron-core==0.16.1"
    if reason is not None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
