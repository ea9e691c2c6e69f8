"""Rules of `engine: nemo`: sharding, GPUs, backends and budgets. Checks that need no model, file or GPU."""

from __future__ import annotations

from typing import Any

from mopd_nemo.config.cluster import MEGATRON_LAYERS, NemoConfig, ParallelConfig, sequence_multiple, training_gpus
from mopd_nemo.config.schema import Config, GenerationConfig


def check_nemo(config: Config, teacher_prompt: tuple[str, int]) -> None:
    """Refuse what NeMo-RL or this package's workers cannot do.

    Args:
        teacher_prompt: the key that limits a teacher's prompt, and its value.

    Raises:
        ValueError: names the keys, their values and the remedy.
    """
    nemo = config.nemo
    if config.reference.kl:
        raise ValueError(
            f"reference.kl={config.reference.kl}: engine=nemo keeps one teacher, and no copy of the initial weights "
            "beside it: set reference.kl=0, or engine=local"
        )
    if config.generation != GenerationConfig():
        raise ValueError("generation is for engine=local; engine=nemo has nemo.generation: remove generation")
    if config.teacher.offload:
        raise ValueError(
            "teacher.offload=true is for engine=local; engine=nemo keeps an ema or frozen teacher in host memory as it "
            "is, and an external one that shares the student's GPUs while it does not score: remove it"
        )
    for name, teacher in config.teachers.items():
        if teacher.kind != "server":
            raise ValueError(
                f"teachers.{name}.kind={teacher.kind}: several teachers of engine=nemo are all served: serve it "
                "(docs/teachers.md), or set engine=local"
            )
    _check_gpus(nemo)
    _check_sharding("student", nemo.student, training_gpus(nemo), nemo)
    if config.teacher.kind == "external":
        _check_sharding("teacher", nemo.teacher, nemo.teacher_gpus or training_gpus(nemo), nemo)
    elif nemo.teacher != ParallelConfig():
        raise ValueError(
            f"nemo.teacher shards an external teacher and is unused by teacher.kind={config.teacher.kind}: remove it, "
            "or set teacher.kind=external"
        )
    elif nemo.teacher_gpus:
        raise ValueError(
            f"nemo.teacher_gpus={nemo.teacher_gpus} are for an external teacher, not for kind {config.teacher.kind}: "
            "set nemo.teacher_gpus=0 or teacher.kind=external"
        )
    _check_backend(nemo)
    _check_lora(config)
    _check_overrides(nemo)
    _check_budgets(config, teacher_prompt)
    if config.divergence.support == "full" and nemo.backend != "megatron":
        raise ValueError(
            f"divergence.support=full needs hidden states, which nemo.backend={nemo.backend} does not give: set "
            "divergence.support=student_topk or teacher_topk, or nemo.backend=megatron"
        )
    if config.train.activation_checkpointing:
        raise ValueError(
            "train.activation_checkpointing=true is for engine=local; engine=nemo has nemo.activation_checkpointing: "
            "remove it"
        )
    if config.model.device != "auto":
        raise ValueError(f"model.device={config.model.device!r} is for engine=local; with engine=nemo leave it at auto")


def _check_gpus(nemo: NemoConfig) -> None:
    whole = nemo.num_nodes * nemo.gpus_per_node
    for key, gpus in (("nemo.generation.gpus", nemo.generation.gpus), ("nemo.teacher_gpus", nemo.teacher_gpus)):
        if nemo.num_nodes > 1 and gpus % nemo.gpus_per_node:
            raise ValueError(
                f"{key}={gpus} is not a number of whole nodes: make it a multiple of "
                f"nemo.gpus_per_node={nemo.gpus_per_node}"
            )
    if training_gpus(nemo) < 1:
        raise ValueError(
            f"nemo.generation.gpus={nemo.generation.gpus} + nemo.teacher_gpus={nemo.teacher_gpus} leave the student "
            f"none of the {whole} GPUs of nemo.num_nodes={nemo.num_nodes} × nemo.gpus_per_node={nemo.gpus_per_node}"
        )
    generating = nemo.generation.gpus or training_gpus(nemo)
    if generating % nemo.generation.tensor:
        raise ValueError(
            f"nemo.generation.tensor={nemo.generation.tensor} does not divide the {generating} GPUs that generate"
        )


def _check_sharding(who: str, parallel: ParallelConfig, gpus: int, nemo: NemoConfig) -> None:
    key = f"nemo.{who}"
    sizes = f"{key}.tensor={parallel.tensor} × pipeline={parallel.pipeline} × context={parallel.context}"
    if gpus % parallel.model_gpus:
        raise ValueError(
            f"{sizes} = {parallel.model_gpus} GPUs a copy do not divide its {gpus} GPUs: change the parallel sizes, "
            "nemo.num_nodes or nemo.gpus_per_node"
        )
    if gpus // parallel.pipeline % parallel.expert:
        raise ValueError(
            f"{key}.expert={parallel.expert} does not divide the {gpus // parallel.pipeline} GPUs of a pipeline stage"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ValueError(f"{key}.sequence=true shares work of tensor-parallel GPUs: raise {key}.tensor or set it false")
    if parallel.context > 1 and nemo.batching != "packed":
        raise ValueError(f"{key}.context={parallel.context} needs nemo.batching=packed, not {nemo.batching}")
    if parallel.pipeline > 1 and nemo.batching == "dynamic":
        raise ValueError(f"{key}.pipeline={parallel.pipeline} excludes nemo.batching=dynamic: set nemo.batching=packed")


def _check_lora(config: Config) -> None:
    """Refuse what NeMo-RL's adapters on Megatron do not offer."""
    rank, targets = config.lora.rank, config.lora.targets
    if not rank:
        return
    if config.nemo.backend != "megatron":
        raise ValueError(f"lora.rank={rank} with engine=nemo needs nemo.backend=megatron, not {config.nemo.backend}")
    if targets != "all" and not set(targets) <= set(MEGATRON_LAYERS):
        raise ValueError(
            f"lora.targets={list(targets)} with engine=nemo: the layers of Megatron are {', '.join(MEGATRON_LAYERS)}"
        )


def _check_backend(nemo: NemoConfig) -> None:
    """Refuse what the engine does not support on NeMo-RL's DTensor backend."""
    if nemo.backend == "megatron":
        return
    if nemo.batching == "packed":
        raise ValueError("nemo.batching=packed needs nemo.backend=megatron: with dtensor set nemo.batching=dynamic")
    for who, parallel in (("student", nemo.student), ("teacher", nemo.teacher)):
        for name in ("pipeline", "context", "expert", "sequence"):
            value = getattr(parallel, name)
            if value > 1 or value is True:
                raise ValueError(
                    f"nemo.{who}.{name}={str(value).lower()} needs nemo.backend=megatron: with dtensor, whose "
                    "only parallel size is tensor, leave it out"
                )


def _check_overrides(nemo: NemoConfig) -> None:
    """Refuse keys of `nemo.policy` that another setting decides, or that the engine cannot work with."""
    block: Any = nemo.policy
    for name in ("generation", "vllm_cfg"):
        block = block.get(name) if isinstance(block, dict) else None
    if isinstance(block, dict) and block.get("async_engine"):
        raise ValueError(
            "nemo.policy.generation.vllm_cfg.async_engine=true: rollouts are drawn several to a request from vLLM's "
            "synchronous engine, which NeMo-RL's asynchronous workers do not have: leave it out"
        )
    for name in ("megatron_cfg", "dtensor_cfg"):
        own = nemo.policy.get(name)
        if isinstance(own, dict) and "enabled" in own:
            raise ValueError(f"nemo.policy.{name}.enabled={own['enabled']}: choose with nemo.backend, and leave it out")


def _check_budgets(config: Config, teacher_prompt: tuple[str, int]) -> None:
    """No sequence may be longer than a micro-batch: NeMo-RL would refuse to pack it in the middle of a run."""
    response, budget = config.rollout.max_response_tokens, config.train.tokens_per_micro_batch
    longest = [("data.max_prompt_tokens", config.data.max_prompt_tokens, config.nemo.student)]
    if not config.has_teacher("server"):  # which has a limit of its own
        external = config.teacher.kind == "external"
        longest.append((*teacher_prompt, config.nemo.teacher if external else config.nemo.student))
    for key, prompt, parallel in longest:
        multiple = sequence_multiple(parallel)
        tokens = -(-(prompt + response) // multiple) * multiple
        if tokens > budget:
            raise ValueError(
                f"{key}={prompt} + rollout.max_response_tokens={response}, padded to a multiple of {multiple}, are "
                f"{tokens} tokens, more than train.tokens_per_micro_batch={budget}: raise the latter or lower one of "
                "the others"
            )
