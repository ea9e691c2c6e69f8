"""The engine's calls, on a policy that records them. On the real one: tests/integration/nemo/test_engine.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.chat import Chat, with_prompt_ids
from mopd_nemo.config.load import config_from
from mopd_nemo.engines.base import Sampling
from mopd_nemo.engines.nemo import engine as module
from mopd_nemo.engines.nemo.launch import Runtime
from mopd_nemo.preflight.choice import choose
from mopd_nemo.verifiers.pool import VerifierPool
from tests.conftest import EMBEDDED
from tests.preflight.planted import PlantedEngine, arithmetic


class Policy:
    """Remembers what it was asked for, and has what is newer than NeMo-RL v0.7.0 only where told so."""

    def __init__(self, asynchronous: bool) -> None:
        self.calls: list[str] = []
        if asynchronous:
            self.finalize_async_save = lambda: self.calls.append("finalize_async_save")

    def prepare_for_lp_inference(self) -> None:
        self.calls.append("prepare_for_lp_inference")

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


class Generation:
    """Answers as a planted model does, and remembers what vLLM would have been asked for."""

    def __init__(self, model: PlantedEngine) -> None:
        self._model = model
        self.refits: list[bool] = []

    def wake(self, refit: bool) -> None:
        self.refits.append(refit)

    def sleep(self) -> None:
        pass

    def sample(self, prompts: Any, on_samples: Any, num_samples: int, max_tokens: int, seed: str, **_: Any) -> None:
        for number, rollouts in enumerate(self._model.generate(prompts, num_samples, Sampling(max_tokens), seed)):
            for index, r in reversed(list(enumerate(rollouts))):
                on_samples([(number, index, (r.response_ids, r.logprobs, r.finished))])


def test_a_choice_of_peers_asks_the_students_sampler_alone(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's prompts are answered by vLLM with the student's weights, which are sent to it once."""
    monkeypatch.setattr(module, "check_surroundings", lambda backend: None)
    settings = {
        "model": {"path": str(EMBEDDED)},
        "rollout": {"max_response_tokens": 24, "num_prompts_per_step": 8, "batch_size": 64},
        "data": {"max_prompt_tokens": 128},
        "peers": {"choose": "measured", "choose_problems": 16, "max_context_tokens": 1024},
    }
    config = config_from({"engine": "nemo", **settings}, "test")
    problems = with_prompt_ids(arithmetic(32), chat, 128)
    student, generation = Policy(asynchronous=False), Generation(PlantedEngine(chat, problems, both=0.2))
    engine: Any = module.NemoEngine(config, launch=lambda *_: Runtime(student, None, generation, []))
    with VerifierPool(config.verifier, {"arithmetic"}) as verifiers:
        row = choose(0, problems, engine, verifiers, config)
    assert row["context"] == "1s" and row["clear"]
    assert student.calls == ["start_teacher", "prepare_for_lp_inference"]
    assert generation.refits[0] and not any(generation.refits[1:])
