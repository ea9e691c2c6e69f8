"""Settings of the NeMo-RL engine: the `nemo` block of the config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mopd_nemo.config.base import ConfigBlock


class ParallelConfig(ConfigBlock):
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


class VllmConfig(ConfigBlock):
    """Rollouts with vLLM."""

    gpus: NonNegativeInt = 0
    """GPUs that only generate, whole nodes of them when there are several. 0: vLLM and training take turns on all."""
    tensor: PositiveInt = 1
    """GPUs of one vLLM engine."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
    """Share of a GPU's memory that vLLM may take while it generates."""
    enforce_eager: bool = False
    """Do without CUDA graphs."""
    seeded: bool = False
    """Draw each prompt's responses from a seed of their own, the same in every run: costs a step of decoding one small
    kernel for each response (docs/nemo.md). False: from the generator of the vLLM engine."""


class NemoConfig(ConfigBlock):
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
    generation: VllmConfig = VllmConfig()
    batching: Literal["packed", "dynamic", "padded"] = "packed"
    """How rows share a micro-batch of `train.tokens_per_micro_batch`: end to end without padding, padded with others of
    like length, or each alone."""
    activation_checkpointing: bool = True
    """Compute activations again in the backward pass instead of keeping them."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in the nodes' memory while the student scores as a teacher."""
    target_dtype: Literal["float32", "float16"] = "float32"
    """In which a teacher's log-probabilities travel between GPUs."""
    policy: dict[str, Any] = Field(default_factory=dict)
    """Settings of NeMo-RL's `policy` block that override what this package writes there, for the student and, but for
    the generation part, for the teacher."""


def training_gpus(nemo: NemoConfig) -> int:
    """GPUs of the student: those of the cluster that are nobody else's."""
    return nemo.num_nodes * nemo.gpus_per_node - nemo.generation.gpus - nemo.teacher_gpus


def sequence_multiple(parallel: ParallelConfig) -> int:
    """What sequence lengths are padded to a multiple of, as NeMo-RL's own configs do: divisible by 2·CP and by TP."""
    return 2 * parallel.tensor * parallel.context
