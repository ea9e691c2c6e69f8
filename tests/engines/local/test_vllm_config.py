"""What is refused before anything expensive; drawing itself is in tests/integration/test_vllm_backend.py."""

import importlib.util
from collections.abc import Callable

import pytest

from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.engines.local.engine import LocalEngine
from tests.conftest import QUICKSTART


def test_missing_vllm_is_an_error_before_any_model(
    make: Callable[..., LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("mopd_nemo.engines.local.engine.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    with pytest.raises(UserError, match=r"generation.backend=vllm: vllm is not installed.*pip install vllm"):
        make("generation.backend=vllm")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["generation.backend=sglang"], r"generation.backend"),
        (["generation.gpu_memory_utilization=1.5"], r"generation.gpu_memory_utilization"),
        (["engine=nemo", "generation.backend=vllm"], r"generation is for engine=local"),
    ],
)
def test_settings_that_cannot_be(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(QUICKSTART, overrides)
