"""The engine's calls, on a policy that records them. On the real one: tests/integration/nemo/test_engine.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mopd_nemo.chat import Chat, with_prompt_ids
from mopd_nemo.config import UserError
from mopd_nemo.config.load import config_from
from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.nemo import engine as module
from mopd_nemo.engines.nemo.batches import NO_ROW
from mopd_nemo.engines.nemo.launch import Runtime
from mopd_nemo.losses.objectives import Divergence, Objective, SampledReverseKL
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.preflight.choice import choose
from mopd_nemo.types import TrainExample
from mopd_nemo.verifiers.pool import VerifierPool
from tests.conftest import EMBEDDED
from tests.engines.scripted_server import ScriptedServer
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
        for number, rollouts in enumerate(
            self._model.generate(Request(prompts, num_samples, Sampling(max_tokens), seed))
        ):
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


SERVED = {
    "engine": "nemo",
    "model": {"path": str(EMBEDDED)},
    "rollout": {"max_response_tokens": 12},
    "data": {"max_prompt_tokens": 20},
    "peers": {"max_context_tokens": 60},
    "divergence": {"support": "teacher_topk", "k": 5},
}


@pytest.mark.parametrize("objective", [Divergence(support="teacher_topk", k=5), SampledReverseKL()], ids=str)
def test_servers_are_asked_by_the_driver_each_for_its_rows(
    objective: Objective, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker is asked for anything, and the update is given ids and log-probabilities as from any other teacher."""
    monkeypatch.setattr(module, "check_surroundings", lambda backend: None)
    sampled = {"divergence": {"support": "sampled", "kind": "reverse_kl"}} if objective == SampledReverseKL() else {}
    rows = [TrainExample(0, i, (5, 6), (7, 8, 9 + i), (), (4, 5, 6), teacher="ab"[i % 2]) for i in range(4)]
    rows.append(TrainExample(1, 0, (5, 6), (7,), ()))
    with ScriptedServer(EMBEDDED) as one, ScriptedServer(random_model) as other:
        teachers = {name: {"kind": "server", "urls": [server.url]} for name, server in (("a", one), ("b", other))}
        config = config_from(SERVED | sampled | {"teachers": teachers, "nemo": {"target_dtype": "float16"}}, "test")
        engine: Any = module.NemoEngine(config, launch=lambda *_: pytest.fail("no GPU is needed to score"))
        targets, metrics = engine.score(TrainBatch(rows, [LossTerm(objective, (0, 1, 2, 3))]))
    assert metrics == {"score/retries": 0, "score/replicas": 2}
    assert targets.here[4] is None and targets.keys == [NO_ROW] * 5
    for i, server in enumerate([one, other, one, other]):
        with torch.no_grad():
            logits_TV = server._model(input_ids=torch.tensor([[4, 5, 6, 7, 8, 9 + i]])).logits[0, 2:-1]
        found, logprobs_TV = targets.here[i], logits_TV.log_softmax(-1)
        assert (found.ids_TK.dtype, found.logprobs_TK.dtype) == (torch.int32, torch.float16)
        ids_TK = logprobs_TV.topk(5).indices if sampled == {} else torch.tensor([[7], [8], [9 + i]])
        assert torch.equal(found.ids_TK, ids_TK.int())
        torch.testing.assert_close(found.logprobs_TK.float(), logprobs_TV.gather(-1, ids_TK), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nemo": {"teacher_gpus": 4}}, "nemo.teacher_gpus=4 are for an external teacher, not for kind server"),
        ({"divergence": {"support": "student_topk"}}, "divergence.support=student_topk does not go with"),
        (
            {"teacher": {}, "teachers": {"a": {"kind": "frozen"}}},
            "teachers.a.kind=frozen: several teachers of engine=nemo are all served",
        ),
    ],
)
def test_what_a_served_teacher_does_not_go_with_on_a_cluster(settings: dict[str, Any], message: str) -> None:
    served = {"teacher": {"kind": "server", "urls": ["http://127.0.0.1:1"]}}
    with pytest.raises(UserError, match=message):
        config_from(SERVED | served | settings, "test")


def test_a_long_context_of_a_served_teacher_needs_no_room_in_a_micro_batch() -> None:
    served = {"teacher": {"kind": "server", "urls": ["http://127.0.0.1:1"]}, "train": {"tokens_per_micro_batch": 64}}
    long = {"peers": {"max_context_tokens": 9000}}
    assert config_from(SERVED | served | long, "test").peers.max_context_tokens == 9000
    with pytest.raises(UserError, match=r"peers\.max_context_tokens=9000"):
        config_from(SERVED | long | {"train": {"tokens_per_micro_batch": 64}}, "test")
