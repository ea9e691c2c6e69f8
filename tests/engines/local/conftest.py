from pathlib import Path

import pytest

from mopd_nemo.config import Config
from mopd_nemo.config.load import load_config
from mopd_nemo.engines.local.engine import LocalEngine
from tests.conftest import QUICKSTART


@pytest.fixture
def make(random_model: Path):
    """Build a local engine on the random model with overrides of the quickstart config."""

    def build(*overrides: str) -> LocalEngine:
        return LocalEngine(config(random_model, *overrides))

    return build


def config(model: Path, *overrides: str) -> Config:
    return load_config(QUICKSTART, [f"model.path={model}", *overrides])
