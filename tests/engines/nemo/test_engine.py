"""The engine's calls, on a policy that records them. On the real one: tests/integration/nemo/test_engine.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.config.load import config_from
from mopd_nemo.engines.nemo import engine as module
from mopd_nemo.engines.nemo.launch import Runtime
from tests.conftest import EMBEDDED


class Policy:
    """Remembers what it was asked for, and has what is newer than NeMo-RL v0.7.0 only where told so."""

    def __init__(self, asynchronous: bool) -> None:
        self.calls: list[str] = []
        if asynchronous:
            self.finalize_async_save = lambda: self.calls.append("finalize_async_save")

    def prepare_for_training(self) -> None:
        self.calls.append("prepare_for_training")

    def save_checkpoint(self, weights_path: str, **_: Any) -> None:
        self.calls.append("save_checkpoint")
        Path(weights_path).mkdir(parents=True)

    def run_all_workers_single_data(self, method: str, **_: Any) -> None:
        self.calls.append(method)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_is_whole_when_save_returns(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory is renamed next, so what NeMo-RL still writes behind the call is waited for, where it may."""
    monkeypatch.setattr(module, "check_surroundings", lambda backend: None)
    settings = {
        "model": {"path": str(EMBEDDED)},
        "rollout": {"max_response_tokens": 12},
        "data": {"max_prompt_tokens": 20},
    }
    config = config_from({"engine": "nemo", **settings, "peers": {"max_context_tokens": 60}}, "test")
    student = Policy(asynchronous)
    module.NemoEngine(config, launch=lambda *_: Runtime(student, None, None, [])).save(tmp_path)
    waited = ["finalize_async_save"] if asynchronous else []
    assert student.calls == ["start_teacher", "prepare_for_training", "save_checkpoint", *waited, "save_teacher"]
    assert (tmp_path / "policy" / "config.yaml").is_file() and (tmp_path / "policy" / "tokenizer").is_dir()
