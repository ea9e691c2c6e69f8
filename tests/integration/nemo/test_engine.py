"""The engine over real Ray, real `Policy` groups and real Megatron workers; only the sampler is a stand-in."""

from __future__ import annotations

import os
import random
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mopd_nemo.config import Config, TeacherConfig, UserError
from mopd_nemo.engines.base import Request, Sampling
from tests.conftest import EMBEDDED
from tests.integration.nemo import cpu
from tests.integration.nemo.ranks import nemo_config

WORKERS = {
    "megatron": "tests.integration.nemo.cpu_worker.CpuWorker",
    "dtensor": "tests.integration.nemo.cpu_dtensor_worker.CpuDTensorWorker",
}


class Scribe:
    """Writes random responses in place of vLLM; takes weights and GPUs as vLLM does, by NeMo-RL's own calls."""

    def __init__(self, colocated: bool) -> None:
        self._colocated = colocated
        self.calls: list[str] = []
        self.student: Any = None
        self.received: list[dict[str, Any]] = []
        """What each worker sent at the last refit."""
        self.may_draw = threading.Event()
        self.may_draw.set()

    def wake(self, refit: bool) -> None:
        self.calls.append("refit" if refit else "wake")
        if refit:  # as `refit_policy_generation` does
            if self._colocated:
                self.student.offload_before_refit()
            self.received = self.student.run_all_workers_single_data("exported")
            if self._colocated:
                self.student.offload_after_refit()

    def sleep(self) -> None:
        self.calls.append("sleep")

    def sample(
        self, prompts: Sequence[Any], on_samples: Any, num_samples: int, max_tokens: int, seed: str, **_: Any
    ) -> None:
        assert self.may_draw.wait(120)
        draw = random.Random(seed)
        for number in range(len(prompts)):
            for index in range(num_samples):
                size = draw.randint(1, max_tokens)
                on_samples([(number, index, ([draw.randrange(3, 428) for _ in range(size)], [-6.0] * size, True))])

    def connect(self, student: Any, training: Any, generating: Any) -> None:
        self.student = student
        self.calls.append(f"connected to {training.world_size()} GPUs")

    def shutdown(self) -> None:
        pass


def launch_on_cpu(config: Config, tokenizer: Any, checkpoint: Path | None) -> Any:
    """`launch` itself, with CPUs for GPUs, `WORKERS` for its worker and a `Scribe` for vLLM."""
    from nemo_rl.distributed import virtual_cluster

    from mopd_nemo.engines.nemo import launch

    on_cpu = {name: replace(backend, worker=WORKERS[name]) for name, backend in launch.BACKENDS.items()}
    with (
        mock.patch.object(virtual_cluster, "init_ray"),  # Ray runs already
        mock.patch.object(
            virtual_cluster, "RayVirtualCluster", partial(on_cpus, real=virtual_cluster.RayVirtualCluster)
        ),
        mock.patch.dict(launch.BACKENDS, on_cpu),
        mock.patch.object(launch, "start_vllm", lambda *_: Scribe(colocated=config.nemo.generation.gpus == 0)),
    ):
        return launch.launch(config, tokenizer, checkpoint)


def on_cpus(*, real: Any, use_gpus: bool, **arguments: Any) -> Any:
    """A cluster of as many CPUs as GPUs were asked for."""
    assert use_gpus
    return real(use_gpus=False, **arguments)


@pytest.fixture(scope="module", autouse=True)
def on_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray of our own, whose workers find NeMo-RL, and an interpreter for them where NeMo-RL's container has one."""
    cpu.order_path()
    import ray

    from mopd_nemo.engines.nemo.launch import BACKENDS

    venvs = tmp_path_factory.mktemp("venvs")
    for backend in BACKENDS.values():
        built = venvs / backend.theirs / "bin" / "python"
        built.parent.mkdir(parents=True)
        prepared = "-m tests.integration.nemo.cpu" if "megatron" in backend.theirs else ""
        built.write_text(
            f'#!/bin/sh\n[ "$1" = -m ] && exec {sys.executable} {prepared} "$@"\nexec {sys.executable} "$@"\n'
        )
        built.chmod(0o755)
    environment = {
        "PYTHONPATH": cpu.source_path(),
        "OMP_NUM_THREADS": "1",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "NEMO_RL_VENV_DIR": str(venvs),
        "RAY_worker_niceness": "0",  # Ray's own 15 makes these tests wait for whatever else runs
    }
    os.environ.update(environment)
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    yield
    for engine in ENGINES:  # of tests that failed
        end(engine)
    ray.shutdown()


ENGINES: list[Any] = []


def make(settings: Config) -> Any:
    from mopd_nemo.engines.nemo.engine import NemoEngine

    ENGINES.append(NemoEngine(settings, launch=launch_on_cpu))
    return ENGINES[-1]


def end(engine: Any) -> None:
    """Shut workers down for good: a `Policy` does so again when it is collected, when Ray may be gone."""
    runtime = engine._running
    if runtime is not None:
        runtime.shutdown()
        for policy in (runtime.student, runtime.teacher):
            if policy is not None:
                del policy.worker_group
    engine._running = None


def make_batch(engine: Any, seed: str, objectives: Any = None) -> Any:
    """Two groups of rollouts and what a teacher reads before them."""
    from mopd_nemo.losses.objectives import Divergence
    from mopd_nemo.methods.batch import LossTerm, TrainBatch
    from mopd_nemo.types import TrainExample

    prompts = [tuple(range(10, 18)), tuple(range(30, 42))]
    groups = engine.generate(Request(prompts, 3, Sampling(12), seed))
    examples = [
        TrainExample(
            g, r, prompts[g], rollout.response_ids, rollout.logprobs, (5, 6, *prompts[g], 7), advantage=r - 1.0
        )
        for g, group in enumerate(groups)
        for r, rollout in enumerate(group)
    ]
    terms = [LossTerm(objective, tuple(range(6))) for objective in objectives or (Divergence(k=8),)]
    return TrainBatch(examples, terms)


def exported(engine: Any) -> list[dict[str, Any]]:
    """The student as a Hugging Face model, by worker."""
    return engine._runtime.student.run_all_workers_single_data("exported")


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with the embedded model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("llama")
    tokenizer: Any = AutoTokenizer.from_pretrained(EMBEDDED)
    model = LlamaConfig(
        vocab_size=428,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(model).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def local_twin(settings: Config) -> Any:
    """The local engine on the same model and config."""
    from mopd_nemo.engines.local.engine import LocalEngine

    return LocalEngine(settings.model_copy(update={"engine": "local"}))


@pytest.mark.parametrize(("backend", "batching"), [("megatron", "packed"), ("dtensor", "dynamic")])
def test_steps_equal_those_of_the_local_engine(backend: str, batching: str) -> None:
    """Two steps of EMA self-distillation on two data-parallel ranks and in one process: the same losses."""
    settings = nemo_config(nemo={"gpus_per_node": 2, "backend": backend, "batching": batching})
    engine, twin = make(settings), local_twin(settings)
    for number in range(2):
        batch = make_batch(engine, str(number))
        targets, read = engine.score(batch)
        tokens = sum(len(row.teacher_prompt_ids or ()) + len(row.response_ids) for row in batch.examples)
        assert read["score/tokens_alone"] == tokens
        assert batching != "packed" or read["score/tokens"] < 0.8 * tokens
        assert targets.keys == list(range(6 * number, 6 * number + 6)), "every row of every step has a key of its own"
        found = engine.update(batch, targets, 1e-3)
        engine.update_teacher()
        expected = twin.update(batch, twin.score(batch)[0], 1e-3)
        twin.update_teacher()
        for name in ("loss", "grad_norm", "student/entropy", "student/topk_mass", "teacher/topk_mass", "sampler/gap"):
            assert found[name] == pytest.approx(expected[name], rel=2e-3), name
    prompts, responses = [row.prompt_ids for row in batch.examples], [row.response_ids for row in batch.examples]
    for ours, theirs in zip(
        engine.response_logprobs(prompts, responses), twin.response_logprobs(prompts, responses), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-2)
    generation = engine._runtime.generation
    assert generation.calls == ["connected to 2 GPUs", *["refit", "sleep"] * 2]
    engine.generate(Request(prompts[:1], 1, Sampling(3), "after the updates"))
    one, other = generation.received  # of two data-parallel ranks, each of which sends to its own vLLM
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    end(engine)


def test_weights_and_contrasts_equal_those_of_the_local_engine() -> None:
    """Two teacher prompts for some rows, one for the others; then the weights of tokens."""
    from mopd_nemo.losses.objectives import Divergence

    settings = nemo_config(teacher={"kind": "frozen"})
    engine, twin = make(settings), local_twin(settings)
    for number, objective in enumerate(
        [Divergence(k=8, contrast=0.7), Divergence("reverse_kl", k=8, tail=False, weights="sharper")]
    ):
        batch = make_batch(engine, str(number), [objective])
        for i, row in enumerate(batch.examples[:4]):
            batch.examples[i] = replace(row, contrast_prompt_ids=(9, 9, 8, *row.prompt_ids))
        found = engine.update(batch, engine.score(batch)[0], 1e-3)
        expected = twin.update(batch, twin.score(batch)[0], 1e-3)
        for name in {"loss", "grad_norm", "teacher/sharper"} & expected.keys():
            assert found[name] == pytest.approx(expected[name], rel=2e-3), (objective, name)
        assert found["loss"] != pytest.approx(twin.update(batch, twin.score(batch)[0], 0.0)["loss"], rel=1e-6)
    end(engine)


@pytest.mark.parametrize("teacher", [{"kind": "ema"}, {"kind": "external"}])
def test_a_step_that_teaches_nothing_leaves_the_engine_whole(teacher: dict[str, str], random_model: Path) -> None:
    """Preferences without a mixed group, successes where there are none: generation has the GPUs, and nobody trains."""
    if teacher["kind"] == "external":
        teacher |= {"path": str(random_model)}
    engine = make(nemo_config(teacher=teacher))
    taught = make_batch(engine, "0")
    nothing = type(taught)([], [])
    before = engine._runtime.generation.received[0]
    for scored in (nothing, taught):
        assert engine.update(nothing, engine.score(scored)[0], 1e-3) == {"update/skipped": 1.0}
        engine.update_teacher()
        make_batch(engine, "1")
        received = engine._runtime.generation.received[0]
        assert all(torch.equal(value, before[name]) for name, value in received.items())
    assert engine.update(taught, engine.score(taught)[0], 1e-3)["grad_norm"] > 0
    end(engine)


@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
def test_every_objective_under_tensor_parallelism_equals_the_local_engine(backend: str, random_llama: Path) -> None:
    """Preferences, policy gradients over two updates a step, the sampled divergence: tp=2 against one process."""
    from mopd_nemo.losses.objectives import Dpo, LogLikelihood, PolicyGradient, SampledReverseKL, Simpo
    from mopd_nemo.methods.batch import LossTerm, TrainBatch

    settings = nemo_config(
        model={"path": str(EMBEDDED if backend == "megatron" else random_llama)},
        teacher={"kind": "frozen"},
        divergence={"support": "sampled", "kind": "reverse_kl", "k": 4},
        train={"num_updates_per_step": 2},
        nemo={"gpus_per_node": 2, "backend": backend, "student": {"tensor": 2}},
    )
    engine, twin = make(settings), local_twin(settings)
    pairs = (2, 0, 5, 3, 2, 1)
    batch = TrainBatch([], [])
    for number, objective in enumerate(
        [SampledReverseKL(), PolicyGradient(), Dpo(0.5), Simpo(2.0, 0.5), LogLikelihood()]
    ):
        batch = make_batch(engine, str(number), [objective])
        if objective.pairs:
            batch = type(batch)(batch.examples, [LossTerm(objective, pairs)])
        found = engine.update(batch, engine.score(batch)[0], 1e-3)
        expected = twin.update(batch, twin.score(batch)[0], 1e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-3), objective
        if not isinstance(objective, SampledReverseKL):  # whose value means nothing
            assert found["loss"] == pytest.approx(expected["loss"], rel=5e-3, abs=1e-6), objective
    assert engine.update(type(batch)([], []), [], 1e-3) == {"update/skipped": 1.0}
    if backend == "megatron":
        check_calls_on_workers(engine)
    end(engine)


def test_dtensor_refuses_to_cut_models_that_it_would_train_wrong() -> None:
    settings = nemo_config(nemo={"gpus_per_node": 2, "backend": "dtensor", "student": {"tensor": 2}})
    with pytest.raises(UserError, match=r"nemo.student.tensor=2 .* a qwen3: set nemo.student.tensor=1 or nemo.backend"):
        make(settings)


def check_calls_on_workers(engine: Any) -> None:
    """`VllmRollouts` sends prompts to workers and hands their answers on one by one, on NeMo-RL's own worker group."""
    from types import SimpleNamespace

    from mopd_nemo.engines.nemo import launch
    from tests.integration.nemo import echo

    student = engine._runtime.student
    generation = SimpleNamespace(
        worker_group=student.worker_group,
        sharding_annotations=student.sharding_annotations,
        cfg={"colocated": {"enabled": True}},
    )
    real = launch.sample_on_worker
    launch.sample_on_worker = echo.echo_on_worker  # type: ignore[assignment]
    try:
        portions: list[list[Any]] = []
        launch.VllmRollouts(generation).sample([(3, 4), (5,), (6, 7)], portions.append, num_samples=2)
    finally:
        launch.sample_on_worker = real  # type: ignore[assignment]
    assert len([portion for portion in portions if portion]) > 1, "the first ones come before the last"
    assert sorted(answer for portion in portions for answer in portion) == [
        (number, index, ("CpuWorker", ids)) for number, ids in enumerate([[3, 4], [5], [6, 7]]) for index in range(2)
    ]


@pytest.mark.parametrize("backend", ["megatron", "dtensor"])
def test_a_run_continues_from_its_checkpoint_exactly_and_becomes_a_model(backend: str, tmp_path: Path) -> None:
    """Also with another learning rate in its config: the trainer gives every step its own."""
    from mopd_nemo.run.checkpoints import save_checkpoint

    nemo = {"gpus_per_node": 2, "backend": backend}
    engine = make(nemo_config(nemo=nemo))

    def step(engine: Any, number: int) -> dict[str, float]:
        batch = make_batch(engine, str(number))
        metrics = engine.update(batch, engine.score(batch)[0], 1e-3)
        engine.update_teacher()
        return metrics

    step(engine, 0)
    checkpoint = save_checkpoint(tmp_path / "run" / "checkpoints", 1, engine, {"step": 1})
    assert sorted(file.name for file in (checkpoint / "teacher").iterdir()) == ["rank_00000.pt", "rank_00001.pt"]
    saved = exported(engine)[0]
    expected = [step(engine, 1), step(engine, 2)]
    final = exported(engine)[0]
    end(engine)
    again = make(nemo_config(nemo=nemo, optimizer={"learning_rate": 3e-6}))
    again.load(checkpoint)
    found = [step(again, 1), step(again, 2)]
    assert [m["loss"] for m in found] == [m["loss"] for m in expected]
    assert all(torch.equal(value, final[name]) for name, value in exported(again)[0].items())
    end(again)
    check_export(tmp_path, saved)


def check_export(directory: Path, expected: dict[str, Any]) -> None:
    """`mopd export` of the run makes a model that transformers loads, with these weights and the tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from typer.testing import CliRunner

    from mopd_nemo.cli import app

    output = directory / "model"
    result = CliRunner().invoke(app, ["export", str(directory / "run"), "-o", str(output)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items() if name in expected)
    tokenizers: list[Any] = [AutoTokenizer.from_pretrained(directory) for directory in (output, EMBEDDED)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_external_teacher_of_dtensor_on_the_same_gpus_equals_the_local_engine(random_llama: Path) -> None:
    """On two ranks, over which the teacher's matrices are cut: it does not train."""
    settings = nemo_config(
        teacher={"kind": "external", "path": str(random_llama)},
        divergence={"support": "teacher_topk"},
        nemo={"gpus_per_node": 2, "teacher": {"tensor": 2}, "backend": "dtensor", "batching": "dynamic"},
    )
    engine, twin = make(settings), local_twin(settings)
    from mopd_nemo.losses.objectives import Divergence

    batch = make_batch(engine, "0", [Divergence(support="teacher_topk", k=8)])
    found = engine.update(batch, engine.score(batch)[0], 1e-3)
    expected = twin.update(batch, twin.score(batch)[0], 1e-3)
    for name in ("loss", "grad_norm", "topk_overlap"):
        assert found[name] == pytest.approx(expected[name], rel=2e-3), name
    end(engine)


@pytest.mark.parametrize("support", ["teacher_topk", "sampled"])
def test_a_served_teacher_equals_the_local_engine_with_the_same_model_in_its_process(
    support: str, random_model: Path
) -> None:
    """The driver asks, and two data-parallel ranks learn; the student alone is on the GPUs."""
    from mopd_nemo.losses.objectives import Divergence, SampledReverseKL
    from tests.engines.scripted_server import ScriptedServer

    sampled = support == "sampled"
    divergence = {"support": support, "kind": "reverse_kl", **({} if sampled else {"k": 8})}
    with ScriptedServer(random_model) as server:
        settings = nemo_config(
            teacher={"kind": "server", "urls": [server.url]}, divergence=divergence, nemo={"gpus_per_node": 2}
        )
        engine = make(settings)
        external = TeacherConfig(kind="external", path=str(random_model))
        twin = local_twin(settings.model_copy(update={"teacher": external}))
        objective = SampledReverseKL() if sampled else Divergence("reverse_kl", support=support, k=8)
        for number in range(2):
            batch = make_batch(engine, str(number), [objective])
            targets, read = engine.score(batch)
            assert read == {"score/retries": 0, "score/replicas": 1}
            found = engine.update(batch, targets, 1e-3)
            expected = twin.update(batch, twin.score(batch)[0], 1e-3)
            for name in ("grad_norm", "student/entropy", *(() if sampled else ("loss", "topk_overlap"))):
                assert found[name] == pytest.approx(expected[name], rel=2e-3), name  # sampled: its value means nothing
    assert engine._runtime.teacher is None
    end(engine)


def test_scoring_and_training_go_on_while_rollouts_are_drawn() -> None:
    """Real workers score, train and move the teacher; the sampler, on GPUs of its own, is not finished before they are.

    It draws with the weights that it was given at its start, and gets those of the update when it is free again.
    """
    settings = nemo_config(rollout={"lag": 1}, nemo={"gpus_per_node": 2, "generation": {"gpus": 1, "seeded": True}})
    engine = make(settings)
    batch = make_batch(engine, "0")
    generation = engine._runtime.generation
    before = generation.received[0]
    generation.may_draw.clear()
    arrived: dict[tuple[int, int], Any] = {}
    prompts = [tuple(range(10, 18)), tuple(range(30, 42))]
    request = Request(prompts, 3, Sampling(12), "1")
    in_flight = engine.generate_ahead(
        request, lambda prompt, index, rollout: arrived.update({(prompt, index): rollout})
    )
    drawing_with = generation.received[0]
    assert engine.update(batch, engine.score(batch)[0], 1e-3)["grad_norm"] > 0
    engine.update_teacher()
    after = exported(engine)[0]
    assert not arrived and not all(torch.equal(value, after[name]) for name, value in before.items())
    assert generation.received[0] is drawing_with
    assert all(torch.equal(value, before[name]) for name, value in drawing_with.items())
    generation.may_draw.set()
    groups = in_flight.wait()
    assert arrived == {(p, i): rollout for p, group in enumerate(groups) for i, rollout in enumerate(group)}
    assert engine.generate(request) == groups
    assert all(torch.equal(value, after[name]) for name, value in generation.received[0].items())
    assert generation.calls[1:] == ["refit", "sleep", "wake", "sleep", "refit", "sleep"]
    end(engine)


def test_a_run_one_step_off_continues_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop with rollouts in flight, from the checkpoint after its first step, as if killed in its third."""
    import io

    from rich.console import Console

    from mopd_nemo import trainer
    from mopd_nemo.files import read_rows
    from mopd_nemo.run.directory import RunDirectory

    monkeypatch.setattr(trainer, "make_engine", make)
    settings = nemo_config(
        data={"train": "arithmetic", "num_train": 8, "max_prompt_tokens": 64},
        peers={"max_context_tokens": 300, "failures": 1, "when_no_success": "failure_only"},
        rollout={"lag": 1},
        train={
            "num_steps": 3,
            "eval_every": 0,
            "checkpoint_every": 1,
            "keep_checkpoints": 9,
            "tokens_per_micro_batch": 400,
        },
        nemo={"gpus_per_node": 2, "generation": {"gpus": 1, "seeded": True}},
        run_dir=str(tmp_path / "run"),
    )
    whole = trainer.Trainer.new(settings, Console(file=io.StringIO()))
    assert whole.fit()
    run = RunDirectory.open(tmp_path / "run")
    expected, weights = read_rows(run.metrics_file), exported(whole.engine)[0]
    end(whole.engine)
    for step in (2, 3):
        shutil.rmtree(run.checkpoints / f"step_{step:06d}")
    again = trainer.Trainer.resumed(run, [], Console(file=io.StringIO()))
    assert again.fit()
    found = read_rows(run.metrics_file)
    for name in ("loss", "grad_norm", "response/tokens", "rollout/lag"):
        assert [row[name] for row in found] == [row[name] for row in expected], name
    assert [row["rollout/lag"] for row in found] == [0, 1, 1]
    assert all(torch.equal(value, weights[name]) for name, value in exported(again.engine)[0].items())
    end(again.engine)


@pytest.mark.parametrize("apart", [False, True])
def test_an_external_teachers_targets_go_from_worker_to_worker(apart: bool, random_model: Path) -> None:
    """To a student cut over two GPUs, from a teacher that is whole on each of them, or on one of its own."""
    import ray

    from mopd_nemo.losses.objectives import Divergence

    settings = nemo_config(
        teacher={"kind": "external", "path": str(random_model)},
        divergence={"support": "full"},
        nemo={
            "gpus_per_node": 3 if apart else 2,
            "teacher_gpus": 1 if apart else 0,
            "student": {"tensor": 2},
            "batching": "packed",
        },
    )
    engine, twin = make(settings), local_twin(settings)
    teacher, handed = engine._runtime.teacher, []
    real = teacher.run_all_workers_single_data
    teacher.run_all_workers_single_data = lambda method, **own: handed.extend(real(method, **own)) or handed
    for number, objective in enumerate(
        [
            Divergence("jsd", support="full"),
            Divergence("reverse_kl", support="full"),  # the head is there already
            Divergence("forward_kl", support="student_topk", k=8, contrast=0.7),
            Divergence("jsd", support="teacher_topk", k=8, contrast=0.7),
        ]
    ):
        batch = make_batch(engine, str(number), [objective])
        if objective.reads_contrast:
            batch.examples[1] = replace(batch.examples[1], contrast_prompt_ids=(9, 9, 8, *batch.examples[1].prompt_ids))
        handed.clear()
        targets, _ = engine.score(batch)
        assert targets.here == [None] * 6
        heads, rows = ([one for found in handed for one in found[name]] for name in ("head", "rows"))
        assert len(heads) == (number == 0) and len(rows) == (1 if apart else 2)
        assert all(isinstance(reference, ray.ObjectRef) for _, reference in (*heads, *rows))
        found = engine.update(batch, targets, 1e-3)
        expected = twin.update(batch, twin.score(batch)[0], 1e-3)
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5 if not number else 2e-3), (objective, name)
    end(engine)


def test_the_trainer_runs_and_resumes_on_this_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole loop: rollouts, verifier, peers, teacher, update, evaluation, checkpoint; stopped and continued."""
    import io

    from rich.console import Console

    from mopd_nemo import trainer
    from mopd_nemo.files import read_rows
    from mopd_nemo.run.directory import RunDirectory

    monkeypatch.setattr(trainer, "make_engine", make)
    settings = nemo_config(
        data={"train": "arithmetic", "eval": "arithmetic", "num_train": 8, "num_eval": 2, "max_prompt_tokens": 64},
        peers={"max_context_tokens": 300, "failures": 1, "when_no_success": "failure_only"},
        train={"num_steps": 1, "eval_every": 1, "checkpoint_every": 1, "tokens_per_micro_batch": 400},
        nemo={"gpus_per_node": 1},
        run_dir=str(tmp_path / "run"),
    )
    first = trainer.Trainer.new(settings, Console(file=io.StringIO()))
    assert first.fit()
    end(first.engine)
    run = RunDirectory.open(tmp_path / "run")
    again = trainer.Trainer.resumed(run, ["train.num_steps=2"], Console(file=io.StringIO()))
    assert again.fit()
    end(again.engine)
    rows = read_rows(run.metrics_file)
    assert [row["step"] for row in rows] == [1, 2] and all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert [row["step"] for row in read_rows(run.eval_file)] == [0, 1, 2]
    assert {"seconds/generate", "seconds/score", "seconds/update", "tokens_per_second"} <= rows[0].keys()
