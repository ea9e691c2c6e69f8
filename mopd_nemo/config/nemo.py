"""Settings of the NeMo-RL engine, and whether they fit together: all that can be known without a model or a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mopd_nemo.config.base import Section

if TYPE_CHECKING:
    from mopd_nemo.config import Config


class ParallelConfig(Section):
    """How one model is cut over GPUs. What is left over is data parallelism."""

    tensor: PositiveInt = 1
    """Tensor parallelism: GPUs that share each matrix."""
    pipeline: PositiveInt = 1
    """Pipeline parallelism: groups of layers."""
    context: PositiveInt = 1
    """Context parallelism: GPUs that share each sequence. Needs `nemo.batching=packed`."""
    expert: PositiveInt = 1
    """Expert parallelism of mixture-of-experts models."""
    sequence: bool = False
    """Sequence parallelism: the tensor-parallel GPUs also share what lies between matrices."""

    @property
    def model_gpus(self) -> int:
        """GPUs of one copy of the model."""
        return self.tensor * self.pipeline * self.context


class GenerationConfig(Section):
    """Rollouts with vLLM."""

    gpus: NonNegativeInt = 0
    """GPUs that only generate, whole nodes of them when there are several. 0: vLLM and training take turns on all."""
    tensor: PositiveInt = 1
    """GPUs of one vLLM engine."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
    """Share of a GPU's memory that vLLM may take while it generates."""
    enforce_eager: bool = False
    """Do without CUDA graphs."""


class NemoConfig(Section):
    """The cluster and NeMo-RL, for `engine: nemo`."""

    num_nodes: PositiveInt = 1
    """Nodes of the cluster."""
    gpus_per_node: PositiveInt = 8
    """GPUs of each node."""
    backend: Literal["megatron", "dtensor"] = "megatron"
    """What trains and scores: Megatron-Core, or torch's FSDP2 and DTensor through NeMo-RL's second DTensor policy. The
    latter is cut by `tensor` alone and does not pack."""
    student: ParallelConfig = ParallelConfig()
    """How the student is cut, and with it the teachers that are its past."""
    teacher: ParallelConfig = ParallelConfig()
    """How an external teacher is cut."""
    teacher_gpus: NonNegativeInt = 0
    """GPUs of an external teacher alone, whole nodes of them when there are several. 0: it shares the student's GPUs,
    and waits in the nodes' memory while it is not asked."""
    generation: GenerationConfig = GenerationConfig()
    batching: Literal["packed", "dynamic", "padded"] = "packed"
    """How rows share a micro-batch of `train.tokens_per_micro_batch`: end to end without padding, padded with others of
    like length, or each alone."""
    activation_checkpointing: bool = True
    """Compute activations again in the backward pass instead of keeping them."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in the nodes' memory while the student scores as a teacher."""
    target_dtype: Literal["float32", "float16"] = "float32"
    """In which a teacher's log-probabilities travel between GPUs."""
    policy: dict[str, Any] = Field({})
    """Settings of NeMo-RL's `policy` block that override what this package writes there, for the student and, but for
    the generation part, for the teacher."""


def training_gpus(nemo: NemoConfig) -> int:
    """GPUs of the student: those of the cluster that are nobody else's."""
    return nemo.num_nodes * nemo.gpus_per_node - nemo.generation.gpus - nemo.teacher_gpus


def check_nemo(config: Config) -> None:
    """Refuse settings that cannot run, before anything is started.

    Raises:
        ValueError: naming the keys, their values and the remedy.
    """
    nemo = config.nemo
    _check_gpus(nemo)
    _check_cut("student", nemo.student, training_gpus(nemo), nemo)
    if config.teacher.kind == "external":
        _check_cut("teacher", nemo.teacher, nemo.teacher_gpus or training_gpus(nemo), nemo)
    elif nemo.teacher_gpus:
        raise ValueError(
            f"nemo.teacher_gpus={nemo.teacher_gpus} are for an external teacher, not for kind {config.teacher.kind}: "
            "set nemo.teacher_gpus=0 or teacher.kind=external"
        )
    _check_backend(nemo)
    _check_overrides(nemo)
    _check_budgets(config)
    if config.divergence.support == "full":
        raise ValueError(
            "divergence.support=full would send whole vocabularies between GPUs: with engine=nemo set "
            "divergence.support=student_topk or teacher_topk"
        )
    if config.method == "gkd" and config.gkd.completions is None:
        raise ValueError(
            "method=gkd with engine=nemo learns from completions that are there already: make them with engine=local "
            "and name their directory in gkd.completions"
        )
    if config.model.device != "auto":
        raise ValueError(f"model.device={config.model.device!r} is for engine=local; with engine=nemo leave it at auto")


def teacher_prompt(config: Config) -> tuple[str, int]:
    """The key that limits what a teacher reads before a response, and its value."""
    if config.method in ("mopd", "sdpo"):
        return "peers.max_context_tokens", config.peers.max_context_tokens
    return "data.max_prompt_tokens", config.data.max_prompt_tokens


def sequence_multiple(parallel: ParallelConfig) -> int:
    """What sequence lengths are padded to a multiple of, as NeMo-RL's own configs do: divisible by 2·CP and by TP."""
    return 2 * parallel.tensor * parallel.context


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


def _check_cut(who: str, parallel: ParallelConfig, gpus: int, nemo: NemoConfig) -> None:
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


def _check_backend(nemo: NemoConfig) -> None:
    """What of NeMo-RL's DTensor policy this engine does not use."""
    if nemo.backend == "megatron":
        return
    if nemo.batching == "packed":
        raise ValueError("nemo.batching=packed needs nemo.backend=megatron: with dtensor set nemo.batching=dynamic")
    for who, parallel in (("student", nemo.student), ("teacher", nemo.teacher)):
        for name in ("pipeline", "context", "expert", "sequence"):
            value = getattr(parallel, name)
            if value > 1 or value is True:
                raise ValueError(
                    f"nemo.{who}.{name}={str(value).lower()} needs nemo.backend=megatron: with dtensor, which is cut "
                    "by tensor alone, leave it out"
                )


def _check_overrides(nemo: NemoConfig) -> None:
    """What `nemo.policy` may not say, because something else says it or would not work with it."""
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


def _check_budgets(config: Config) -> None:
    """No sequence may be longer than a micro-batch: NeMo-RL refuses to pack it, in the middle of a run."""
    response, budget = config.rollout.max_response_tokens, config.train.tokens_per_micro_batch
    teacher = config.nemo.teacher if config.teacher.kind == "external" else config.nemo.student
    for key, prompt, parallel in (
        ("data.max_prompt_tokens", config.data.max_prompt_tokens, config.nemo.student),
        (*teacher_prompt(config), teacher),
    ):
        multiple = sequence_multiple(parallel)
        longest = -(-(prompt + response) // multiple) * multiple
        if longest > budget:
            raise ValueError(
                f"{key}={prompt} + rollout.max_response_tokens={response}, padded to a multiple of {multiple}, are "
                f"{longest} tokens, more than train.tokens_per_micro_batch={budget}: raise the latter or lower one of "
                "the others"
            )
