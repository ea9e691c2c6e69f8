"""Start Ray, the clusters of GPUs and the groups of workers on them, with NeMo-RL's own classes.

The order is that of NeMo-RL's distillation example: models that are offloaded to host memory start first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mopd_nemo
from mopd_nemo.config import Config, UserError
from mopd_nemo.config.cluster import NemoConfig, training_gpus
from mopd_nemo.engines.nemo.policy_config import student_policy, teacher_policy
from mopd_nemo.engines.vllm import Numbered, sample_on_worker

REPORTED_EVERY = 0.1
"""Seconds between two looks for responses that vLLM has finished."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One of NeMo-RL's training backends."""

    worker: str
    """This package's worker, a dotted name."""
    theirs: str
    """NeMo-RL's own worker, which it extends."""
    checkpointing: Mapping[str, Any]
    """Arguments of `Policy.save_checkpoint`, with which the checkpoint is complete when the call returns."""


BACKENDS = {
    "megatron": Backend(
        "mopd_nemo.engines.nemo.workers.megatron.MegatronTeacherWorker",
        "nemo_rl.models.policy.workers.megatron_policy_worker.MegatronPolicyWorker",
        {},
    ),
    "dtensor": Backend(
        "mopd_nemo.engines.nemo.workers.dtensor.DTensorTeacherWorker",
        "nemo_rl.models.policy.workers.dtensor_policy_worker_v2.DTensorPolicyWorkerV2",
        {"checkpointing_cfg": {"model_save_format": "safetensors", "save_consolidated": True, "is_async": False}},
    ),
}


@dataclass
class Runtime:
    """Running groups of workers."""

    student: Any
    """NeMo-RL `Policy` whose workers have `TeacherMethods`."""
    teacher: Any | None
    """The policy of an external teacher."""
    generation: Any
    """The sampler, such as `VllmRollouts`."""
    clusters: Sequence[Any]
    """Their GPUs."""

    def shutdown(self) -> None:
        """Give the GPUs back."""
        for part in (self.generation, self.teacher, self.student, *self.clusters):
            if part is not None:
                part.shutdown()


Launch = Callable[[Config, Any, Path | None], Runtime]
"""(config, tokenizer, checkpoint to continue from) → running workers."""


def launch(config: Config, tokenizer: Any, checkpoint: Path | None) -> Runtime:
    """Start all workers of a config. See `Launch`."""
    make_package_visible()
    from nemo_rl.distributed.virtual_cluster import init_ray
    from nemo_rl.models.policy.lm_policy import Policy

    register_workers()
    init_ray()
    worker = BACKENDS[config.nemo.backend].worker
    nemo, colocated = config.nemo, config.nemo.generation.gpus == 0
    shared_teacher = config.teacher.kind == "external" and not nemo.teacher_gpus
    training = _cluster("mopd_train", training_gpus(nemo), nemo, 1 + colocated + shared_teacher)
    clusters = [training]
    teacher = None
    if config.teacher.kind == "external":
        place = training if shared_teacher else _cluster("mopd_teacher", nemo.teacher_gpus, nemo, 1)
        clusters.append(place)
        teacher = Policy(
            cluster=place,
            config=teacher_policy(config),
            tokenizer=tokenizer,
            name_prefix="teacher",
            init_optimizer=False,
            init_reference_model=False,
            worker_extension_cls_fqn=worker,
        )
        teacher.offload_after_refit()
    generating = training if colocated else _cluster("mopd_generate", nemo.generation.gpus, nemo, 1)
    clusters.append(generating)
    settings = student_policy(config)
    generation = start_vllm(generating, settings, tokenizer)
    student = Policy(
        cluster=training,
        config=settings,
        tokenizer=tokenizer,
        name_prefix="student",
        init_reference_model=False,
        worker_extension_cls_fqn=worker,
        **resume_paths(checkpoint),
    )
    generation.connect(student, training, generating)
    return Runtime(student, teacher, generation, list(dict.fromkeys(clusters)))


def resume_paths(checkpoint: Path | None) -> dict[str, Any]:
    """Arguments of `Policy` that continue a checkpoint. Megatron reads the second only as a flag."""
    if checkpoint is None:
        return {}
    return {
        "weights_path": str(checkpoint / "policy" / "weights"),
        "optimizer_path": str(checkpoint / "policy" / "optimizer"),
    }


def register_workers() -> None:
    """Run our workers in the interpreter of NeMo-RL's own worker.

    Otherwise NeMo-RL would build another environment on every node, Transformer Engine included.
    """
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY

    for name, backend in BACKENDS.items():
        built = worker_python(name)
        python = str(built) if built else ACTOR_ENVIRONMENT_REGISTRY[backend.theirs]
        ACTOR_ENVIRONMENT_REGISTRY[backend.worker] = python


def worker_python(backend: str) -> Path | None:
    """The interpreter that NeMo-RL has built for its worker of a backend; None: not built."""
    from nemo_rl.utils.venvs import DEFAULT_VENV_DIR

    python = Path(os.environ.get("NEMO_RL_VENV_DIR", DEFAULT_VENV_DIR)) / BACKENDS[backend].theirs / "bin" / "python"
    return python if python.exists() else None


def make_package_visible() -> None:
    """Put this checkout on the PYTHONPATH that Ray passes to workers.

    Raises:
        UserError: the package is installed in a directory with others, which would shadow the workers' own packages.
    """
    root = str(Path(mopd_nemo.__file__).resolve().parents[1])
    if Path(root).name in ("site-packages", "dist-packages"):
        raise UserError(
            f"engine=nemo: mopd_nemo is installed in {root}, whose other packages would shadow those of the workers. "
            "Run from a checkout of the project, on storage that every node sees (docs/nemo.md)"
        )
    others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != root]
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *others])


def _cluster(name: str, gpus: int, nemo: NemoConfig, groups: int) -> Any:
    """GPUs for groups of workers that take turns on them."""
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster

    nodes = max(gpus // nemo.gpus_per_node, 1)
    per_node = gpus // nodes
    return RayVirtualCluster(
        name=name,
        bundle_ct_per_node_list=[per_node] * nodes,
        use_gpus=True,
        num_gpus_per_node=per_node,
        max_colocated_worker_groups=groups,
    )


def start_vllm(cluster: Any, settings: dict[str, Any], tokenizer: Any) -> VllmRollouts:
    """vLLM on a cluster, asleep and without weights until the first refit."""
    from nemo_rl.models.generation import configure_generation_config
    from nemo_rl.models.generation.vllm import VllmGeneration

    settings["generation"] = configure_generation_config(settings["generation"], tokenizer)
    generation = VllmGeneration(cluster=cluster, config=settings["generation"])
    generation.finish_generation()
    return VllmRollouts(generation)


class VllmRollouts:
    """Rollouts of the student by NeMo-RL's vLLM workers."""

    def __init__(self, generation: Any) -> None:
        from ray.util.queue import Queue

        self._generation = generation
        self._colocated: bool = generation.cfg["colocated"]["enabled"]
        self._student: Any = None
        self._reports: Any = Queue(actor_options={"num_cpus": 0})
        """Responses on their way here from the workers."""

    def connect(self, student: Any, training: Any, generating: Any) -> None:
        """Prepare the transfer of the student's weights."""
        import ray

        self._student = student
        self._generation.prepare_refit_info(student.prepare_refit_info())
        if not self._colocated:
            address, port = training.get_master_address_and_port()
            train, world = training.world_size(), training.world_size() + generating.world_size()
            joining = [
                *student.init_collective(address, port, world, train_world_size=train),
                *self._generation.init_collective(address, port, world, train_world_size=train),
            ]
            ray.get(joining)

    def wake(self, refit: bool) -> None:
        """Bring vLLM back to the GPUs; with `refit`, load the student's present weights."""
        from nemo_rl.algorithms.grpo import refit_policy_generation

        if refit:
            refit_policy_generation(self._student, self._generation, self._colocated)
        else:
            self._generation.prepare_for_generation()

    def sample(
        self, prompts: Sequence[tuple[int, ...]], on_samples: Callable[[Sequence[Numbered]], None], **settings: Any
    ) -> None:
        """Draw responses for each prompt.

        Args:
            on_samples: is given responses soon after they are finished, each once, and in between an empty list.
            settings: those of `sample_on_worker`.
        """
        import ray

        group = self._generation.worker_group
        size = self._generation.sharding_annotations.get_axis_size("data_parallel")
        numbered = [(number, list(ids)) for number, ids in enumerate(prompts)]
        futures = group.run_all_workers_sharded_data(
            "__ray_call__",
            prompts=[numbered[rank::size] for rank in range(size)],
            in_sharded_axes=["data_parallel"],
            common_kwargs={"fn": sample_on_worker, "reports": self._reports, **settings},
        )
        at_work = futures.futures
        while at_work:
            _, at_work = ray.wait(at_work, num_returns=len(at_work), timeout=REPORTED_EVERY)
            count = self._reports.qsize()
            on_samples(self._reports.get_nowait_batch(count) if count else [])
        group.get_all_worker_results(futures)  # raises what a worker has raised

    def sleep(self) -> None:
        """Free the GPUs' memory for training."""
        self._generation.finish_generation()

    def shutdown(self) -> None:
        """End the workers."""
        self._generation.shutdown()
        self._reports.shutdown()
