"""NeMo-RL's real Megatron worker in processes of their own, as Ray starts it, and what each returns. Tests only.

def what_to_do(settings: Config) -> Any:        # a module's function: processes find it by name
    worker = start(settings)
    ...
    return worker.exported()

by_rank = run_ranks(what_to_do, 2, settings)
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mopd_nemo.config.load import config_from
from tests.conftest import EMBEDDED
from tests.ranks import in_processes

RUNS_ON_CPU = {
    "megatron_cfg": {"apply_rope_fusion": False, "bias_activation_fusion": False, "moe_permute_fusion": False}
}
"""`nemo.policy` without the kernels that are CUDA's."""


def nemo_config(**changes: Any) -> Any:
    """A small config of the engine on the embedded model in float32; sections are merged, `policy` too."""
    values: dict[str, Any] = {
        "engine": "nemo",
        "method": "mopd",
        "model": {"path": str(EMBEDDED), "dtype": "float32"},
        "rollout": {"num_prompts_per_step": 2, "num_rollouts_per_prompt": 3, "max_response_tokens": 12},
        "data": {"max_prompt_tokens": 20},
        "peers": {"max_context_tokens": 60},
        "divergence": {"k": 8},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"tokens_per_micro_batch": 80},
        "nemo": {
            "gpus_per_node": 1,
            "batching": "padded",
            "activation_checkpointing": False,
            "generation": {"seeded": True},
            "policy": RUNS_ON_CPU,
        },
    }
    return config_from(_merged(values, changes), "test")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        own = merged.get(key)
        merged[key] = _merged(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return merged


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """`function(*args)` in `world` processes with what Ray would set; results by rank. An error in one is raised."""
    # All are forked from one process that has imported NeMo-RL, which takes far longer than all else, and done nothing.
    multiprocessing.set_forkserver_preload(["tests.integration.nemo.cpu_worker"])
    work = partial(_prepared, function, args, world, _free_ports(STARTS), dict(os.environ))
    return in_processes(world, work, "forkserver")


STARTS = 8
"""Workers that a process may start one after the other."""
_ports: list[int] = []


def _free_ports(count: int) -> list[int]:
    """Below those that a system gives to connections (Linux: from 32768), which may take a port before it is used."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            own = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # taken
                port = random.SystemRandom().randrange(20000, 32768)
                own.bind(("127.0.0.1", port))
                ports.append(port)
    return ports


def _prepared(
    function: Callable[..., Any], args: tuple[Any, ...], world: int, ports: list[int], env: dict[str, str], rank: int
) -> Any:
    import torch

    from tests.integration.nemo import cpu

    _ports[:] = ports
    os.environ.update(
        env,
        RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        TORCH_CUDA_ARCH_LIST="9.0",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    cpu.prepare()
    result = function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return result


def start(settings: Any, *, checkpoint: Path | None = None, trains: bool = True) -> Any:
    """The student's worker of this process, as `Policy` makes it; a worker that was started here before is over.

    Args:
        checkpoint: a step's directory to continue from.
        trains: an external teacher's does not, and has no optimiser.
    """
    import numpy as np
    import torch
    from nemo_rl.distributed.named_sharding import NamedSharding
    from transformers import AutoTokenizer

    from mopd_nemo.engines.nemo.launch import resume_paths
    from mopd_nemo.engines.nemo.policy_config import student_policy
    from tests.integration.nemo import cpu
    from tests.integration.nemo.cpu_worker import CpuWorkerImpl

    policy = student_policy(settings)
    sizes = [policy["megatron_cfg"][f"{axis}_parallel_size"] for axis in ("pipeline_model", "context", "tensor_model")]
    pipeline, context, tensor = sizes
    world = int(os.environ["WORLD_SIZE"])
    layout = np.arange(world).reshape(pipeline, -1, context, tensor)
    names = [f"{axis}_parallel" for axis in ("pipeline", "data", "context", "tensor")]
    if torch.distributed.is_initialized():
        cpu.forget_megatron()
    os.environ["MASTER_PORT"] = str(_ports.pop())  # one for each: a rank must not meet the others' last meeting
    return CpuWorkerImpl(
        policy,
        AutoTokenizer.from_pretrained(EMBEDDED),
        init_optimizer=trains,
        init_reference_model=False,
        worker_sharding_annotations=NamedSharding(layout=layout, names=names),
        pre_init_communication_queue=None,
        **resume_paths(checkpoint),
    )


def dealt(worker: Any, batch: dict[str, Any], tokens: int = 40, batch_size: int | None = None) -> tuple[Any, list[int]]:
    """A worker's share of a batch as `Policy` deals and packs it, up to `tokens`; and the order of all ranks' rows."""
    from megatron.core import parallel_state
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    data: Any = BatchedDataDict(batch)
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    if not worker.cfg["sequence_packing"]["enabled"]:
        return data.shard_by_batch_size(size, batch_size=batch_size)[rank], list(range(data.size))
    packing = {
        "algorithm": "modified_first_fit_decreasing",
        "input_key": "input_ids",
        "input_lengths_key": "input_lengths",
        "sequence_length_pad_multiple": worker.cfg["make_sequence_length_divisible_by"],
        "max_tokens_per_microbatch": tokens,
    }
    shares, order = data.shard_by_batch_size(size, batch_size=batch_size, sequence_packing_args=packing)
    return shares[rank], order


def cut(
    world: int, tensor: int = 1, pipeline: int = 1, context: int = 1, packed: bool = False, sequence: bool = False
) -> dict[str, Any]:
    """`nemo` of `nemo_config`."""
    return {
        "gpus_per_node": world,
        "batching": "packed" if packed else "padded",
        "student": {"tensor": tensor, "pipeline": pipeline, "context": context, "sequence": sequence},
    }


def engine_of(settings: Any, checkpoint: Path | None = None) -> Any:
    """The engine, whose student's worker of this rank is in this process: every rank is the driver, too."""
    from mopd_nemo.engines.nemo.engine import NemoEngine
    from mopd_nemo.engines.nemo.launch import Runtime

    return NemoEngine(settings, launch=lambda *_: Runtime(Here(start(settings, checkpoint=checkpoint)), None, None, []))


def num_bytes(value: Any) -> int:
    """Of the numbers in a column of a batch."""
    return sum(map(num_bytes, value)) if isinstance(value, list) else value.nbytes


class Here:
    """NeMo-RL's `Policy` as far as the engine calls it, with one worker, that of this process, without Ray."""

    def __init__(self, worker: Any) -> None:
        from megatron.core import parallel_state

        self.worker, self.cfg = worker, worker.cfg
        self.data_parallel_size = parallel_state.get_data_parallel_world_size()
        self.worker_group = self
        self.sent: list[tuple[str, dict[str, int]]] = []
        """Each call with the bytes of every column of the part of a batch that it brought to this worker."""
        multiple = self.cfg["make_sequence_length_divisible_by"]
        keys = {"input_key": "input_ids", "input_lengths_key": "input_lengths"}
        algorithm = self.cfg["sequence_packing"].get("algorithm")
        self.sequence_packing_args = keys | {"algorithm": algorithm, "sequence_length_pad_multiple": multiple}
        self.dynamic_batching_args = keys | {"sequence_length_round": multiple}

    def prepare_for_lp_inference(self) -> None:
        self.worker.prepare_for_lp_inference()

    def prepare_for_training(self) -> None:
        self.worker.prepare_for_training()

    def run_all_workers_single_data(self, method: str, **arguments: Any) -> list[Any]:
        return [getattr(self.worker, method)(**arguments)]

    def run_all_workers_sharded_data(self, method: str, *, data: Any, common_kwargs: Any, **_: Any) -> Any:
        """The answers of all data-parallel ranks."""
        import torch
        from megatron.core import parallel_state

        own = data[parallel_state.get_data_parallel_rank()]
        self.sent.append((method, {name: num_bytes(column) for name, column in own.items()}))
        answer = getattr(self.worker, method)(data=own, **common_kwargs)
        answers = [None] * self.data_parallel_size
        group = parallel_state.get_data_parallel_group()
        torch.distributed.all_gather_object(answers, answer, group=group)
        return answers

    def get_all_worker_results(self, answers: Any) -> Any:
        return answers

    def train(self, data: Any, loss_fn: Any, gbs: int, mbs: int) -> dict[str, Any]:
        size, packing, dynamic = self.data_parallel_size, self.cfg["sequence_packing"], self.cfg["dynamic_batching"]
        way = {}
        if packing["enabled"]:
            budget = {"max_tokens_per_microbatch": packing["train_mb_tokens"]}
            way["sequence_packing_args"] = self.sequence_packing_args | budget
        elif dynamic["enabled"]:
            budget = {"max_tokens_per_microbatch": dynamic["train_mb_tokens"]}
            way["dynamic_batching_args"] = self.dynamic_batching_args | budget
        shards = data.shard_by_batch_size(size, batch_size=gbs, **way)
        shards = shards[0] if way else shards
        arguments = {"loss_fn": loss_fn, "gbs": gbs, "mbs": mbs}
        results = self.run_all_workers_sharded_data("train", data=shards, common_kwargs=arguments)
        sums: dict[str, list[float]] = {}
        for result in results:
            for name, values in result["all_mb_metrics"].items():
                sums.setdefault(name, []).extend(values)
        return {"grad_norm": results[0]["grad_norm"], "all_mb_metrics": sums}
