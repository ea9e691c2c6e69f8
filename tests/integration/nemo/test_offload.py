"""An external teacher on the student's GPUs leaves them, by NeMo-RL's own calls on a model without an optimiser."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.integration.nemo import cpu


class Teacher(nn.Linear):
    """A model whose GPU is the meta device."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.moves: list[str] = []

    def to(self, device: Any) -> Any:
        self.moves.append(device)
        return self.to_empty(device="meta" if device == "cuda" else "cpu")


@pytest.fixture
def worker() -> Any:
    cpu.prepare()
    from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl

    from mopd_nemo.engines.nemo.workers.megatron import MegatronTeacherMethods

    class Worker(MegatronTeacherMethods, MegatronPolicyWorkerImpl):
        def __init__(self) -> None:
            self.model, self.optimizer = Teacher(), None
            self.cfg = {"megatron_cfg": {"empty_unused_memory_level": 1}}
            self.fp8_cfg = self.draft_model = None
            self.optimizer_cpu_offload = self.offload_optimizer_for_logprob = False
            self.offload_optimizer_for_refit = True
            self.timer, self.rank = SimpleNamespace(), 0
            # NeMo-RL's main branch waits for an asynchronous save before it offloads.
            self._async_checkpoint_cuda_cache_active = False
            checkpoint = SimpleNamespace(async_save=False)
            self.mcore_state = SimpleNamespace(cfg=SimpleNamespace(checkpoint=checkpoint))

    return Worker()


def test_every_parameter_leaves_the_gpu_and_comes_back(worker: Any) -> None:
    worker.prepare_for_lp_inference()
    assert {weight.device.type for weight in worker.model.parameters()} == {"meta"}
    worker.offload_after_refit()
    assert {weight.device.type for weight in worker.model.parameters()} == {"cpu"}
    worker.prepare_for_lp_inference()
    assert worker.model.moves == ["cuda", "cpu", "cuda"] and not worker.model.training


def test_a_model_with_an_optimizer_is_left_to_nemo_rl(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl

    seen: list[Any] = []
    monkeypatch.setattr(MegatronPolicyWorkerImpl, "move_model", lambda _, *a, **k: seen.append((*a[1:], k)) or a[0])
    worker.optimizer = object()
    assert worker.move_model(worker.model, "cpu", move_grads=False) is worker.model
    assert seen == [("cpu", {"move_params": True, "move_grads": False})] and not worker.model.moves


def test_student_and_teacher_take_turns_on_shared_gpus() -> None:
    from mopd_nemo.config.load import config_from
    from mopd_nemo.engines.base import TokenCounts
    from mopd_nemo.engines.nemo.scorer import Scorer
    from mopd_nemo.losses.objectives import Divergence
    from mopd_nemo.types import TrainExample

    calls: list[str] = []

    class Policy:
        data_parallel_size = 1

        def __init__(self, name: str) -> None:
            self.name = name

        def __getattr__(self, name: str) -> Any:
            return lambda: calls.append(f"{self.name}.{name}")

    def score(self: Any, policy: Any, *_: Any, **__: Any) -> tuple[list[Any], TokenCounts]:
        calls.append(f"{policy.name} scores")
        return [SimpleNamespace(ids_TK=torch.zeros(1, 1))], TokenCounts()

    config = config_from({"engine": "nemo", "teacher": {"kind": "external", "path": "some/teacher"}}, "test")
    row = TrainExample(0, 0, (1,), (2,), (), (3, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "_scores", score)
        Scorer(Policy("student"), Policy("teacher"), config, 0, 428).teach([row], Divergence())
    assert calls == [
        "student.prepare_for_lp_inference",
        "student scores",
        "student.offload_after_refit",
        "teacher.prepare_for_lp_inference",
        "teacher scores",
        "teacher.offload_after_refit",
    ]
