"""These tests use NeMo-RL's own code and skip, with the reason, where it is not importable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.integration.nemo import cpu


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = cpu.nemo_rl_missing() if own else None
    for item in own if reason is not None else []:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def converted_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where workers keep models that were imported from Hugging Face."""
    with mock.patch.dict(os.environ, {"NRL_MEGATRON_CHECKPOINT_DIR": str(tmp_path_factory.mktemp("megatron"))}):
        yield
