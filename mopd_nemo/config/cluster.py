"""Settings of runs on a cluster: the `nemo` block for NeMo-RL, and the `cluster` block for the Slurm job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from mopd_nemo.config.base import ConfigBlock, Duration


class ParallelConfig(ConfigBlock):
    """Sharding of one model. The GPUs of several copies are data parallel."""

    tensor: PositiveInt = 1
    """Tensor-parallel size: GPUs that share each matrix."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size: stages of layers."""
    context: PositiveInt = 1
    """Context-parallel size: GPUs that share each sequence. Needs `nemo.batching: packed`."""
    expert: PositiveInt = 1
    """Expert-parallel size, for mixture-of-experts models."""
    sequence: bool = False
    """Sequence parallelism: the tensor-parallel GPUs also share the activations between matrices."""

    @property
    def model_gpus(self) -> int:
        """GPUs of one copy of the model."""
        return self.tensor * self.pipeline * self.context


class VllmConfig(ConfigBlock):
    """Sampling with vLLM."""

    gpus: NonNegativeInt = 0
    """GPUs reserved for vLLM (whole nodes on multi-node runs). 0: vLLM and training take turns on the same GPUs."""
    tensor: PositiveInt = 1
    """GPUs of one vLLM engine."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.6
    """Fraction of a GPU's memory that vLLM may take while it generates."""
    seeded: bool = False
    """Draw each prompt's responses from a seed of their own, the same in every run. It costs each decoding step one
    small kernel per response (docs/nemo.md). `false`: draw from the generator of the vLLM engine."""


class NemoConfig(ConfigBlock):
    """The cluster and NeMo-RL, for `engine: nemo`."""

    num_nodes: PositiveInt = 1
    """Nodes of the cluster."""
    gpus_per_node: PositiveInt = 8
    """GPUs of each node."""
    backend: Literal["megatron", "dtensor"] = "megatron"
    """The backend for training and scoring: Megatron-Core, or torch's FSDP2 and DTensor through NeMo-RL's second
    DTensor policy. `dtensor` supports `tensor` as its only parallel size, and no packing."""
    student: ParallelConfig = ParallelConfig()
    """Sharding of the student, and of EMA and frozen teachers."""
    teacher: ParallelConfig = ParallelConfig()
    """Sharding of an external teacher."""
    teacher_gpus: NonNegativeInt = 0
    """GPUs reserved for an external teacher (whole nodes on multi-node runs). 0: share the student's GPUs and offload
    the teacher to host memory when idle."""
    generation: VllmConfig = VllmConfig()
    batching: Literal["packed", "dynamic", "padded"] = "packed"
    """Layout of a micro-batch of `train.tokens_per_micro_batch`. `packed`: sequences end to end, without padding.
    `dynamic`: sequences of similar length, padded to the longest. `padded`: one sequence each."""
    activation_checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in host memory while the student scores as a teacher."""
    target_dtype: Literal["float32", "float16"] = "float32"
    """Type of a teacher's log-probabilities on their way between GPUs."""
    policy: dict[str, Any] = Field(default_factory=dict)
    """Settings of NeMo-RL's `policy` block that override those of this package, for the student and, except its
    `generation` part, for the teacher."""


MEGATRON_LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Linear layers of a Megatron block, which an adapter can be beside. Those of `lora.targets: all`."""


def training_gpus(nemo: NemoConfig) -> int:
    """GPUs of the student: those of the cluster that are not reserved for vLLM or a teacher."""
    return nemo.num_nodes * nemo.gpus_per_node - nemo.generation.gpus - nemo.teacher_gpus


def sequence_multiple(parallel: ParallelConfig) -> int:
    """Sequence lengths are padded to a multiple of this, divisible by 2·CP and by TP, as in NeMo-RL's own configs."""
    return 2 * parallel.tensor * parallel.context


class ClusterConfig(ConfigBlock):
    """The Slurm job, for `mopd submit`. Nodes and GPUs are those of `nemo`.

    Account, partition, image and paths depend on the cluster, not on the experiment; they are in the site file
    (`slurm/site.example.yaml`).
    """

    time_limit: Duration = "4:00:00"
    """Wall-clock limit of one attempt, `hours:minutes:seconds` or `days-hours:minutes:seconds`."""
    stop_minutes: PositiveInt = 15
    """Minutes before the limit at which the run is told to finish its step and save. A step, an evaluation and a
    checkpoint must fit into them."""
    max_restarts: NonNegativeInt = 20
    """Maximum number of automatic requeues after a time limit. 0: never requeue."""
    start_minutes: PositiveInt = 30
    """Minutes that a node has to join, including the time to fetch a container image. After that the job ends."""
    silent_seconds: Annotated[int, Field(ge=6)] = 30
    """Seconds without a sign of life from a node after which the job ends. A node that does not see the log directory
    by then ends it, too."""
    port: PositiveInt = 1200
    """First port of Ray, which takes port to port + 7 and port + 800 to port + 1799. Avoid NeMo-RL's ports (3000 to
    8999) and the nodes' ephemeral range."""


def scoring_tokens(nemo: NemoConfig, tokens: int) -> int:
    """Most tokens of a micro-batch that is only scored, given those of an update's.

    Packed rows get twice as many: responses share a long prompt within one row alone. Where an update fits, so do they,
    since they have 2 bytes for a logit of a response token where an update has 6 for that of any token, and one layer's
    activations at a time.
    """
    return 2 * tokens if nemo.batching == "packed" else tokens


def keeps_hidden(nemo: NemoConfig, support: str, num_updates: int) -> bool:
    """Whether workers keep a teacher's hidden states, from which the loss has any support of a divergence.

    They are the only way to the whole vocabulary. They spare the pass for the student's likeliest tokens where these
    are the same in that pass and in the update, which is in the first update after it.
    """
    return nemo.backend == "megatron" and (support == "full" or (support == "student_topk" and num_updates == 1))
