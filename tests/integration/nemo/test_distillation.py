"""NeMo-RL's own distillation loop with a teacher that shows peers, against this project's trainer and engine."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from mopd_nemo.data.arithmetic import make_problems
from mopd_nemo.data.load import problems_of_step
from mopd_nemo.types import Problem
from tests.conftest import EMBEDDED
from tests.integration.nemo import cpu, test_engine
from tests.integration.nemo.ranks import nemo_config
from tests.integration.nemo.test_engine import local_twin, on_ray  # noqa: F401  (a fixture)

NAME = "distillation-peers-qwen3-4b-self-1n8g-megatron-tp2-pack"
RECIPES = Path(__file__).parents[3] / "recipes" / "nemo_rl"
STEPS, PROMPTS, ROLLOUTS, RATE = 3, 2, 4, 1e-3
PROMPT, CONTEXT, RESPONSE = 64, 400, 64
"""Most tokens of each."""
PEERS = {"successes": 2, "failures": 1, "max_context_tokens": CONTEXT}
MEGATRON = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "activation_checkpointing": False,
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "moe_permute_fusion": False,
    "optimizer": {"lr": RATE, "min_lr": RATE, "bf16": False, "use_precision_aware_optimizer": False},
    "scheduler": {"lr_warmup_iters": 0, "lr_warmup_init": 0.0},
}
MODEL = {
    "precision": "float32",
    "sequence_packing": {"train_mb_tokens": 256, "logprob_mb_tokens": CONTEXT + RESPONSE},
    "megatron_cfg": MEGATRON,
}
VISITED = [
    problem
    for step in range(1, STEPS + 1)
    for problem in problems_of_step(make_problems("train", 12), step, PROMPTS, seed=0)
]
"""The problems of the trainer's steps, in their order."""


def recipe_config(
    directory: Path,
    block: Mapping[str, Any],
    problems: Sequence[Problem] = VISITED,
    teacher: Mapping[str, Any] | None = None,
) -> Path:
    """The recipe's config, made small: the embedded model in float32 on two ranks, without what is CUDA's.

    Args:
        block: of `peer_teacher`.
        problems: in the order in which steps take them.
        teacher: NeMo-RL's block, where it is used.
    """
    data = directory / "arithmetic.jsonl"
    rows = [{"input": problem.messages[-1]["content"], "output": problem.answer} for problem in problems]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_name": "ResponseDataset", "data_path": str(data)}
    values = {
        "defaults": str(RECIPES / f"{NAME}.yaml"),
        "distillation": {
            "num_prompts_per_step": PROMPTS,
            "num_generations_per_prompt": ROLLOUTS,
            "max_num_steps": len(problems) // PROMPTS,
            "max_num_epochs": 1,
            "topk_logits_k": 8,
            "val_period": 0,
            "val_at_start": False,
            "val_at_end": True,
            "val_batch_size": 2,
            "max_val_samples": 2,
            "seed": 0,
        },
        "peer_teacher": {"peers": PEERS, **block},
        "policy": {
            "model_name": str(EMBEDDED),
            "train_global_batch_size": PROMPTS * ROLLOUTS,
            "max_total_sequence_length": PROMPT + RESPONSE + 32,  # and what the environment says
            "generation": {"max_new_tokens": RESPONSE},
            **MODEL,
        },
        "teacher": teacher or {},
        "data": {
            "max_input_seq_length": PROMPT,
            "shuffle": False,
            "train": source,
            "validation": source,
            "default": {"prompt_file": None, "env_name": "mopd_arithmetic"},
        },
        "env": {"mopd_arithmetic": {"task": "arithmetic"}},
        "checkpointing": {"checkpoint_dir": str(directory / "checkpoints"), "save_period": 2, "metric_name": None},
        "logger": {"log_dir": str(directory / "logs"), "wandb_enabled": False, "monitor_gpus": False},
        "cluster": {"gpus_per_node": 2},
    }
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def run_recipe(config: Path) -> tuple[list[Any], dict[str, dict[int, float]]]:
    """Run it as the command does: the groups of each step, and what NeMo-RL's logger has written."""
    from nemo_rl.algorithms import distillation
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster

    from mopd_nemo.engines.nemo import launch
    from mopd_nemo.methods.mopd import Mopd
    from recipes.nemo_rl import run_peer_distillation
    from tests.integration.nemo.sampler import HuggingFaceGeneration

    steps: list[Any] = []
    started: list[Any] = []

    def build(self: Mopd, groups: Sequence[Any], step: int, own: Any = Mopd.build) -> Any:
        steps.append(groups)
        return own(self, groups, step)

    def setup(*arguments: Any, own: Any = run_peer_distillation.setup) -> Any:
        parts = own(*arguments)
        started[:0] = [policy for policy in parts[:2] if hasattr(policy, "worker_group")]
        return parts

    def cluster(**arguments: Any) -> Any:
        started.append(test_engine.on_cpus(real=RayVirtualCluster, **arguments))
        return started[-1]

    on_cpu = replace(launch.BACKENDS["megatron"], worker=test_engine.WORKERS["megatron"])
    with ExitStack() as patches:
        for target, name, value in (
            (Mopd, "build", build),
            (run_peer_distillation, "setup", setup),
            (run_peer_distillation, "init_ray", lambda: None),  # Ray runs already
            (distillation, "RayVirtualCluster", cluster),
            (distillation, "VllmGeneration", HuggingFaceGeneration),
        ):
            patches.enter_context(mock.patch.object(target, name, value))
        patches.enter_context(mock.patch.dict(launch.BACKENDS, {"megatron": on_cpu}))
        try:
            run_peer_distillation.main(["--config", str(config)])
        finally:
            for part in started:
                part.shutdown()
                vars(part).pop("worker_group", None)  # a `Policy` ends it again when it is collected
    return steps, logged(max((config.parent / "logs").iterdir()))


def logged(directory: Path) -> dict[str, dict[int, float]]:
    """Scalars of NeMo-RL's TensorBoard logs by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in directory.rglob("*tfevents*"):
        events: Any = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return found


class Replay(test_engine.Scribe):
    """Gives the rollouts of another run."""

    def __init__(self, steps: Sequence[Any], colocated: bool) -> None:
        super().__init__(colocated)
        self._steps = iter(steps)

    def sample(self, prompts: Sequence[Any], on_samples: Any, **_: Any) -> None:
        groups = {group.problem.prompt_ids: group.rollouts for group in next(self._steps)}
        for number, prompt in enumerate(prompts):
            for index, r in enumerate(groups[prompt]):
                on_samples([(number, index, (list(r.response_ids), [0.0] * len(r.response_ids), r.finished))])


def our_config(directory: Path, **changes: Any) -> Any:
    """The same run for this project's trainer."""
    return nemo_config(
        data={"train": "arithmetic", "num_train": 12, "max_prompt_tokens": PROMPT},
        rollout={
            "num_prompts_per_step": PROMPTS,
            "num_rollouts_per_prompt": ROLLOUTS,
            "max_response_tokens": RESPONSE,
            "importance_clip": None,
        },
        peers=PEERS,
        optimizer={"learning_rate": RATE, "warmup_steps": 0},
        nemo={"gpus_per_node": 2, "batching": "packed"},
        run_dir=str(directory / "run"),
        **changes,
    )


def trained_here(steps: Sequence[Any], settings: Any) -> list[dict[str, float]]:
    """Metrics of this project's trainer on the same rollouts."""
    from rich.console import Console

    from mopd_nemo import trainer
    from mopd_nemo.files import read_rows

    with (
        mock.patch.object(trainer, "make_engine", test_engine.make),
        mock.patch.object(test_engine, "Scribe", lambda colocated: Replay(steps, colocated)),
    ):
        run = trainer.Trainer.new(settings, Console(file=io.StringIO()))
        assert run.fit()
    test_engine.end(run.engine)
    return read_rows(Path(settings.run_dir) / "metrics.jsonl")


def test_three_steps_are_those_of_the_trainer_and_a_resumed_run_goes_on_as_the_whole_one(tmp_path: Path) -> None:
    divergence = {"kind": "jsd", "support": "student_topk"}
    config = recipe_config(tmp_path, {"teacher": {"kind": "ema"}, "divergence": divergence})
    steps, metrics = run_recipe(config)
    train = {"num_steps": STEPS, "eval_every": 0, "tokens_per_micro_batch": 600}
    rows = trained_here(steps, our_config(tmp_path, divergence=divergence, train=train))
    assert len(rows) == STEPS
    for row in rows:
        step = int(row["step"])
        assert metrics["peer_teacher/signal"][step] == pytest.approx(row["signal"])
        if not row["signal"]:  # no update, but a step of the EMA
            assert row["update/skipped"] and metrics["train/loss"][step] == metrics["train/grad_norm"][step] == 0.0
            continue
        assert row["loss"] > 1e-3 and metrics["train/loss"][step] == pytest.approx(row["loss"], abs=1e-5)
        for ours, theirs in (
            ("grad_norm", "train/grad_norm"),
            ("student/entropy", "train/student/entropy"),
            ("teacher/topk_mass", "train/teacher/topk_mass"),
            ("success_rate", "peer_teacher/success_rate"),
            ("context/tokens", "peer_teacher/context/tokens"),
        ):
            assert metrics[theirs][step] == pytest.approx(row[ours], rel=2e-3), ours
    first, second, third = (row["signal"] for row in rows)
    assert first == 1.0 and second == 0.0 and 0.0 < third < 1.0  # all learn, none does, some do
    assert metrics["validation/accuracy"].keys() == {STEPS} and "timing/train/peer_teacher/score" in metrics
    check_suite_script(tmp_path)

    checkpoints = tmp_path / "checkpoints"
    assert (checkpoints / "step_2" / "teacher" / "rank_00000.pt").is_file()
    shutil.rmtree(checkpoints / "step_3")
    again, resumed = run_recipe(config)
    assert len(again) == 1 and resumed["train/loss"] == {3: metrics["train/loss"][3]}
    assert [g.rollouts for g in again[0]] == [g.rollouts for g in steps[2]]


def check_suite_script(run: Path) -> None:
    """The script beside the config judges a finished run by NeMo-RL's own tools."""
    environment = {**os.environ, "NEMO_RL": os.environ[cpu.SOURCE], "PYTHON": sys.executable, "MAX_STEPS": str(STEPS)}
    answer = subprocess.run([RECIPES / f"{NAME}.sh", run], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "step 3 was reached" in answer.stdout and "PASS" in answer.stdout


def test_an_external_teacher_on_its_own_support_equals_the_local_engine(tmp_path: Path, random_model: Path) -> None:
    from mopd_nemo.methods.base import make_method

    divergence = {"kind": "reverse_kl", "support": "teacher_topk"}
    block = {"teacher": {"kind": "external"}, "divergence": divergence, "aggregation": "sequence_mean"}
    config = recipe_config(tmp_path, block, VISITED[:PROMPTS], teacher={"model_name": str(random_model), **MODEL})
    steps, metrics = run_recipe(config)
    settings = our_config(
        tmp_path,
        divergence=divergence,
        teacher={"kind": "external", "path": str(random_model)},
        train={"aggregation": "sequence_mean", "tokens_per_micro_batch": 600},
    )
    twin = local_twin(settings)
    method = make_method(settings, twin.chat)
    for step, groups in enumerate(steps, start=1):
        batch = method.build(groups, step)
        expected = twin.update(batch, twin.score(batch)[0], RATE)
        assert metrics["train/loss"][step] == pytest.approx(expected["loss"], rel=1e-5)
        assert metrics["train/grad_norm"][step] == pytest.approx(expected["grad_norm"], rel=2e-3)
