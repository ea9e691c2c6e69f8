from collections.abc import Iterator
from pathlib import Path

import pytest

from mopd_nemo.engines import served
from tests.conftest import make_random_model
from tests.engines.scripted_server import ScriptedServer


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A served teacher is asked again at once."""
    monkeypatch.setattr(served, "FIRST_WAIT", 0.001)


@pytest.fixture(scope="module")
def teacher_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model than the student, with its vocabulary."""
    return make_random_model(tmp_path_factory.mktemp("teacher"), seed=7)


@pytest.fixture
def server(teacher_model: Path) -> Iterator[ScriptedServer]:
    with ScriptedServer(teacher_model) as server:
        yield server


@pytest.fixture
def second(teacher_model: Path) -> Iterator[ScriptedServer]:
    """A replica."""
    with ScriptedServer(teacher_model) as server:
        yield server
