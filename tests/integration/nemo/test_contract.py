"""Every NeMo-RL name that this package uses exists with the shape that it is used with, and its configs load there."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mopd_nemo.config.load import config_from, load_config
from tests.integration.nemo import cpu
from tests.integration.nemo.hard_keys import missing_keys

CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "nemo").glob("*.yaml"))
POLICY = "nemo_rl.models.policy.lm_policy"
WORKER = "nemo_rl.models.policy.workers.megatron_policy_worker"
DTENSOR_WORKER = "nemo_rl.models.policy.workers.dtensor_policy_worker_v2"
CLUSTER = "nemo_rl.distributed.virtual_cluster"

USED = {
    f"{POLICY}:Policy": (
        "cluster config tokenizer name_prefix init_optimizer weights_path optimizer_path init_reference_model "
        "worker_extension_cls_fqn"
    ),
    f"{POLICY}:Policy.train": "data loss_fn gbs mbs",
    f"{POLICY}:Policy.run_all_workers_single_data": "method_name kwargs",
    f"{POLICY}:Policy.save_checkpoint": "weights_path optimizer_path tokenizer_path checkpointing_cfg",
    f"{POLICY}:Policy.prepare_for_lp_inference": "",
    f"{POLICY}:Policy.prepare_for_training": "",
    f"{POLICY}:Policy.offload_after_refit": "",
    f"{POLICY}:Policy.prepare_refit_info": "",
    f"{POLICY}:Policy.init_collective": "ip port world_size train_world_size",
    f"{POLICY}:Policy.shutdown": "",
    f"{DTENSOR_WORKER}:get_train_context": "cp_size cp_mesh cp_buffers sequence_dim dtype autocast_enabled",
    "nemo_rl.models.automodel.data:get_microbatch_iterator": "data cfg mbs dp_mesh tokenizer",
    "nemo_rl.models.automodel.train:forward_with_post_processing_fn": (
        "model post_processing_fn processed_mb allow_flash_attn_args sampling_params"
    ),
    "nemo_rl.models.automodel.train:TopkLogitsPostProcessor": "cfg device_mesh cp_mesh tp_mesh cp_size k",
    f"{WORKER}:MegatronPolicyWorkerImpl.disable_forward_pre_hook": "",
    f"{WORKER}:MegatronPolicyWorkerImpl.enable_forward_pre_hook": "",
    "nemo_rl.models.policy.utils:get_runtime_env_for_policy_worker": "policy_worker_name",
    f"{CLUSTER}:init_ray": "",
    f"{CLUSTER}:RayVirtualCluster": (
        "bundle_ct_per_node_list use_gpus num_gpus_per_node max_colocated_worker_groups name"
    ),
    f"{CLUSTER}:RayVirtualCluster.get_master_address_and_port": "",
    "nemo_rl.distributed.worker_groups:RayWorkerGroup.run_all_workers_sharded_data": (
        "method_name in_sharded_axes replicate_on_axes output_is_replicated common_kwargs kwargs"
    ),
    "nemo_rl.distributed.worker_groups:RayWorkerGroup.get_all_worker_results": "future_bundle",
    "nemo_rl.distributed.batched_data_dict:BatchedDataDict.shard_by_batch_size": (
        "shards batch_size dynamic_batching_args sequence_packing_args"
    ),
    "nemo_rl.models.generation:configure_generation_config": "config tokenizer",
    "nemo_rl.models.generation.vllm:VllmGeneration": "cluster config",
    "nemo_rl.models.generation.vllm:VllmGeneration.prepare_for_generation": "",
    "nemo_rl.models.generation.vllm:VllmGeneration.finish_generation": "",
    "nemo_rl.models.generation.vllm:VllmGeneration.prepare_refit_info": "state_dict_info",
    "nemo_rl.algorithms.grpo:refit_policy_generation": "policy policy_generation colocated_inference",
    "nemo_rl.models.megatron.data:get_microbatch_iterator": "data cfg mbs straggler_timer",
    "nemo_rl.models.megatron.train:megatron_forward_backward": (
        "model data_iterator num_microbatches seq_length mbs post_processing_fn forward_only defer_fp32_logits "
        "sampling_params straggler_timer"
    ),
    "nemo_rl.models.megatron.train:TopkLogitsPostProcessor": "cfg k",
    "nemo_rl.models.megatron.train:TopkLogitsPostProcessor.__call__": "data_dict cu_seqlens_padded",
    "nemo_rl.utils.venvs:DEFAULT_VENV_DIR": "",
}
"""What is used → the parameters that are given."""


@pytest.fixture(scope="module", autouse=True)
def importable() -> None:
    cpu.prepare()


@pytest.mark.parametrize("name", USED)
def test_name_takes_what_it_is_given(name: str) -> None:
    module, _, path = name.partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    if callable(value):
        known = inspect.signature(value).parameters
        assert not set(USED[name].split()) - set(known), f"{name}{inspect.signature(value)}"


def test_registry_knows_the_worker_that_ours_extends() -> None:
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY

    from mopd_nemo.engines.nemo.launch import BACKENDS, register_workers

    register_workers()
    for backend in BACKENDS.values():
        assert ACTOR_ENVIRONMENT_REGISTRY[backend.worker] == ACTOR_ENVIRONMENT_REGISTRY[backend.theirs]


def test_worker_is_an_actor_that_ray_can_send() -> None:
    """Ray pickles an actor class with all that it mentions; some of what NeMo-RL mentions cannot be."""
    import ray.cloudpickle
    from nemo_rl.models.policy.workers.dtensor_policy_worker_v2 import DTensorPolicyWorkerV2Impl
    from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl

    from mopd_nemo.engines.nemo.workers.dtensor import DTensorTeacherWorker
    from mopd_nemo.engines.nemo.workers.megatron import MegatronTeacherWorker

    for worker, base in (
        (MegatronTeacherWorker, MegatronPolicyWorkerImpl),
        (DTensorTeacherWorker, DTensorPolicyWorkerV2Impl),
    ):
        real = worker.__ray_metadata__.modified_class
        assert issubclass(real, base)
        assert real.score_responses.__module__ == "mopd_nemo.engines.nemo.workers.base"
        assert ray.cloudpickle.loads(ray.cloudpickle.dumps(real)).__name__ == real.__name__


def test_what_is_asked_of_an_asynchronous_save_is_a_call_without_arguments() -> None:
    from nemo_rl.models.policy.lm_policy import Policy

    wait = getattr(Policy, "finalize_async_save", None)
    if wait is None:
        pytest.skip("this NeMo-RL, as v0.7.0, saves before it returns")
    assert list(inspect.signature(wait).parameters) == ["self"]


def test_loss_travels_to_workers() -> None:
    import ray.cloudpickle

    from mopd_nemo.engines.nemo.workers.loss import BatchLoss
    from mopd_nemo.losses.objectives import Divergence

    loss = ray.cloudpickle.loads(ray.cloudpickle.dumps(BatchLoss([Divergence()], 2.0, 428, 8, True)))
    assert loss.objectives == (Divergence(),) and type(loss) is BatchLoss


def test_loss_follows_the_protocol() -> None:
    from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType

    from mopd_nemo.engines.nemo.workers.loss import BatchLoss

    assert BatchLoss.loss_type is LossType.TOKEN_LEVEL and BatchLoss.input_type is LossInputType.LOGIT


@pytest.fixture(params=CONFIGS, ids=lambda path: path.name)
def policies(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The student's policy block of a config of this repository, and that of an external teacher beside it."""
    from mopd_nemo.engines.nemo.policy_config import student_policy, teacher_policy

    config = load_config(request.param)
    external = {"teacher": {"kind": "external", "path": "some/teacher"}}
    taught = config_from(config.model_dump(exclude={"teacher"}) | external, "test")
    return [student_policy(config), teacher_policy(taught)]


def blocks(backend: str) -> list[dict[str, Any]]:
    """The student's policy block as it is when workers start, and that of an external teacher."""
    from nemo_rl.models.generation import configure_generation_config

    from mopd_nemo.engines.nemo.policy_config import student_policy, teacher_policy

    nemo = {"backend": backend} | ({"batching": "dynamic"} if backend == "dtensor" else {})
    teacher = {"kind": "external", "path": "some/teacher"}
    config = config_from({"engine": "nemo", "nemo": nemo, "teacher": teacher}, "test")
    student: Any = student_policy(config)
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    student["generation"] = configure_generation_config(student["generation"], tokenizer)
    return [student, teacher_policy(config)]


def test_dtensor_policy_blocks_have_the_types_that_nemo_rl_expects() -> None:
    from nemo_rl.models.policy import PolicyConfig
    from pydantic import TypeAdapter

    for policy in blocks("dtensor"):
        TypeAdapter(PolicyConfig).validate_python(policy)


def test_policy_blocks_have_the_types_that_nemo_rl_expects(policies: list[dict[str, Any]]) -> None:
    from nemo_rl.models.policy import PolicyConfig
    from pydantic import TypeAdapter

    for policy in policies:
        TypeAdapter(PolicyConfig).validate_python(policy)


UNUSED = (
    "_create_draft_pre_wrap_hook",  # speculative decoding's draft model
    "_require_remote_sparse_refit",  # weights to another cluster
    "materialize_vllm_video_config",
    "generate",  # NeMo-RL's own, by the trained model or one row a request
    "generate_text",
    "score",  # reward models
)
"""Functions that nobody calls with these blocks."""
DATA: dict[str, Any] = {"data_dict": {}}
"""Our batches have nothing optional that NeMo-RL asks for."""
READ_BY = {
    "megatron": ("megatron/*", "policy/workers/megatron_policy_worker"),
    "dtensor": ("automodel/*", "policy/workers/dtensor_policy_worker_v2"),
}
"""Modules under `nemo_rl/models` of each backend's policy; those that both have come on top."""


@pytest.mark.parametrize("backend", READ_BY)
def test_no_key_is_missing_that_nemo_rl_reads_without_a_default(backend: str) -> None:
    shared = ("policy/lm_policy", "policy/utils", "policy/workers/base_policy_worker")
    for policy in blocks(backend):
        assert missing_keys(modules(*READ_BY[backend], *shared), policy, UNUSED, DATA) == {}


def test_no_key_is_missing_that_nemo_rls_vllm_workers_read_without_a_default() -> None:
    student, _ = blocks("megatron")
    names = ("__init__", "config", "utils", "vllm_backend", "vllm_generation", "vllm_worker")
    assert missing_keys(modules(*(f"generation/vllm/{name}" for name in names)), student["generation"], UNUSED) == {}


def test_a_key_that_is_taken_away_is_missed() -> None:
    """Read by a chain from an argument, by one from the worker's own config, and for an assertion alone."""
    student, _ = blocks("megatron")
    files = modules(*READ_BY["megatron"], "policy/lm_policy")
    for key in ("use_fused_weighted_squared_relu", "empty_unused_memory_level", "sequence_parallel"):
        cut = student | {"megatron_cfg": {k: v for k, v in student["megatron_cfg"].items() if k != key}}
        assert list(missing_keys(files, cut, UNUSED, DATA)) == [f"megatron_cfg.{key}"]


def test_only_keys_on_the_way_of_the_block_are_missed(tmp_path: Path) -> None:
    file = tmp_path / "reader.py"
    file.write_text(
        """
def start(config, other):
    part = config["part"]
    if part["on"]:
        part["read through an alias"]
    else:
        part["the other way"]
    if "optional" in config and config["optional"]["unread"]:
        pass
    config["whole"]["given below"] if other else part.get("default", 1)
    if other:
        config["unknown test"]
    value = config["part"]["deep"] if part.get("missing") is None else config["not taken"]
    try:
        config["caught"]
    except KeyError:
        pass
    config["written"] = 1
    config["written"]
    if not part["on"]:
        return
    [part["in a loop"] for part in other]
    part["on"] or part["short circuit"]

class Worker:
    def run(self, config_of_another):
        config_of_another["nothing to do with it"]
        return self.cfg["attribute"]

def unused(config):
    config["unused"]
"""
    )
    found = missing_keys([file], {"part": {"on": True}}, ["unused"])
    assert list(found) == ["part.read through an alias", "whole", "unknown test", "part.deep", "attribute"]
    assert found["attribute"] == "reader.py:28"


def modules(*patterns: str) -> list[Path]:
    import nemo_rl

    return [file for pattern in patterns for file in (Path(nemo_rl.__path__[0]) / "models").glob(f"{pattern}.py")]
