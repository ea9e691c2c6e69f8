"""What a step costs on a cluster of GPUs: floating-point operations, bytes and collectives, by phase.

Units: FLOP (a multiplication and an addition are two), bytes, seconds. Everything here is arithmetic on sizes.
`Machine` and `Lengths` hold all assumptions about the machine and about the lengths of a task.

Sources: Kaplan et al. 2020, section 2.1 (FLOP per token; backward = 2 × forward), attention and LM head counted apart;
Korthikanti et al. 2022, section 4.2.2 (sequence parallelism's collectives); Rajbhandari et al. 2020 (sharded
optimiser); Pope et al. 2022 (decoding is bound by memory); NVIDIA's data sheet of the H100 SXM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mopd_nemo.config.cluster import ParallelConfig
from mopd_nemo.engines.architecture import Architecture

ACTIVE_EXPERTS = 8
"""Experts that a token goes to: Qwen3's mixtures of experts."""
BF16, FP32 = 2, 4
"""Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One GPU, its links, and the fraction of the peak that a program reaches. Defaults: an H100 SXM in a node of 8."""

    flops: float = 989e12
    """Dense bfloat16 FLOP/s at its peak."""
    bandwidth: float = 3.35e12
    """Bytes/s of the GPU's memory."""
    memory: float = 80e9
    """Bytes."""
    nvlink: float = 450e9
    """Bytes/s to the other GPUs of the node, one direction."""
    network: float = 50e9
    """Bytes/s to other nodes, one direction: 400 Gb/s a GPU."""
    host_link: float = 20e9
    """Bytes/s between a GPU and pageable memory of its node."""
    pinned_link: float = 40e9
    """The same for pinned memory, where all GPUs of the node copy at once; PCIe 5 gives one of them 55e9."""
    driver: float = 2e9
    """Bytes/s of objects through the driver."""
    mfu_update: float = 0.40
    """Share of `flops` in forward and backward passes, collectives not counted."""
    mfu_score: float = 0.45
    """The same for forward passes alone."""
    mfu_prefill: float = 0.50
    """The same for reading prompts in vLLM."""
    mfu_decode: float = 0.30
    """The same for decoding: only binding with large batches."""
    bandwidth_share: float = 0.60
    """Share of `bandwidth` while decoding."""
    link_share: float = 0.70
    """Share of a link's bandwidth in a collective."""
    refit_share: float = 0.20
    """Share of a link's bandwidth while weights go to vLLM, tensor by tensor."""
    decode_overhead: float = 3e-3
    """Seconds of a decoding step beside memory and arithmetic: scheduler, sampler, launches."""
    allreduce_latency: float = 15e-6
    """Seconds of a small all-reduce within a node."""
    exposed_tensor: float = 1.0
    """Share of tensor- and expert-parallel collectives that no computation hides."""
    exposed_data: float = 1.0
    """The same for the optimiser's collectives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean numbers of tokens of a task. Guesses until a run has measured `response/tokens`, `context/tokens`."""

    prompt: float
    response: float
    longest: float = 1.0
    """Longest response of a step over `rollout.max_response_tokens`: it ends the generation phase."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Sequences of equal length that a model reads.

    Args:
        count: how many.
        tokens: new tokens of each, which attend to themselves and to `cached` earlier ones.
        head_rows: positions of each that the LM head is applied to.
    """

    count: float
    tokens: float
    head_rows: float = 0.0
    cached: float = 0.0

    @property
    def pairs(self) -> float:
        """Query-key pairs under a causal mask, of one sequence and head: cached·n + n·(n + 1) / 2."""
        return self.cached * self.tokens + self.tokens * (self.tokens + 1) / 2


# ---------------------------------------------------------------------------------------------------- arithmetic


def layer_parameters(model: Architecture) -> float:
    """Weights of all layers' matrices that one token is multiplied by."""
    mlp = model.mlp + 3 * model.hidden * model.ffn * ACTIVE_EXPERTS if model.experts else model.mlp
    return model.layers * (model.attention + mlp)


def linear_flops(model: Architecture, reading: Reading) -> float:
    """FLOP of the layers' matrices: 2 per weight and token."""
    return reading.count * 2 * layer_parameters(model) * reading.tokens


def attention_flops(model: Architecture, reading: Reading) -> float:
    """FLOP of QKᵀ and PV: 2·head_dim each per layer, head and pair."""
    return reading.count * 4 * model.layers * model.heads * model.head_dim * reading.pairs


def head_flops(model: Architecture, reading: Reading) -> float:
    """FLOP of logits: 2·hidden·vocab per row."""
    return reading.count * 2 * model.hidden * model.vocab * reading.head_rows


def forward_flops(model: Architecture, readings: Sequence[Reading]) -> float:
    """FLOP of a forward pass over all sequences."""
    return sum(linear_flops(model, r) + attention_flops(model, r) + head_flops(model, r) for r in readings)


def update_flops(model: Architecture, readings: Sequence[Reading], recompute: bool) -> float:
    """FLOP of forward and backward pass. `recompute`: the layers run a second time, the head does not."""
    again = sum(linear_flops(model, r) + attention_flops(model, r) for r in readings) if recompute else 0.0
    return 3 * forward_flops(model, readings) + again


def tokens_of(readings: Sequence[Reading]) -> float:
    """New tokens of all sequences."""
    return sum(r.count * r.tokens for r in readings)


# ---------------------------------------------------------------------------------------------------- generation


def cache_bytes(model: Architecture) -> float:
    """Bytes of the keys and values of a token."""
    return 2 * model.layers * model.kv_heads * model.head_dim * BF16


def prefill_seconds(model: Architecture, machine: Machine, prompts: float, tokens: float, gpus: int) -> float:
    """Seconds to read prompts. Each distinct prompt is read once, however many responses it gets."""
    return forward_flops(model, [Reading(prompts, tokens, 1)]) / (gpus * machine.flops * machine.mfu_prefill)


def decode_seconds(
    model: Architecture, machine: Machine, sequences: float, lengths: Lengths, longest: float, gpus: int, tensor: int
) -> float:
    """Seconds to decode. Each step reads all weights once, whatever the batch, and the cache of every sequence.

    There are as many steps as the longest response has tokens. The arithmetic only counts where it takes longer than
    reading the weights. Caches that do not fit would add waves of sequences; see `cache_room`.
    """
    engines = gpus // tensor
    read = machine.bandwidth * machine.bandwidth_share
    weights = BF16 * (model.parameters - (0 if model.tied else model.embedding)) / tensor  # the embedding is looked up
    arithmetic = forward_flops(model, [Reading(sequences / engines, 1, 1)]) / tensor
    reductions = 2 * model.layers * machine.allreduce_latency if tensor > 1 else 0.0
    step = max(weights / read, arithmetic / (machine.flops * machine.mfu_decode)) + machine.decode_overhead + reductions
    cached = sequences * (lengths.response * lengths.prompt + lengths.response**2 / 2) * cache_bytes(model)
    return longest * step + cached / (gpus * read)


def cache_room(
    model: Architecture, machine: Machine, sequences: float, tokens: float, gpus: int, tensor: int, share: float
) -> float:
    """Memory for caches, divided by the need of all sequences at this length. Below 1, vLLM lets some wait.

    Args:
        share: of the GPU's memory that vLLM may take, weights included.
    """
    room = gpus * machine.memory * share - gpus / tensor * BF16 * model.parameters
    return room / (sequences * tokens * cache_bytes(model))


def refit_seconds(
    model: Architecture, machine: Machine, parallel: ParallelConfig, apart: bool, nodes_apart: bool
) -> float:
    """Seconds until every GPU has gathered the shards it lacks, in bfloat16.

    Args:
        apart: vLLM has GPUs of its own, which lack all of them.
        nodes_apart: these are other nodes.
    """
    missing = BF16 * model.parameters * (1 if apart else 1 - 1 / parallel.tensor / max(parallel.expert, 1))
    return missing / ((machine.network if apart and nodes_apart else machine.nvlink) * machine.refit_share)


# --------------------------------------------------------------------------------------------------- collectives


def tensor_seconds(
    model: Architecture, machine: Machine, tokens: float, gpus: int, parallel: ParallelConfig, passes: int
) -> float:
    """All-gathers and reduce-scatters of tensor (with sequence) parallelism: 4 of tokens × hidden a layer and pass.

    A ring sends (t - 1) / t of them from every GPU. A mixture of experts sends each token to its experts and back.

    Args:
        passes: 1 forward, 2 with its backward, 3 with the recomputation.
    """
    size = parallel.tensor
    on_copy = tokens / (gpus / size)  # tokens of one group of tensor-parallel GPUs
    sent = 4 * model.layers * on_copy * model.hidden * BF16 * (size - 1) / size
    if model.experts and parallel.expert > 1:
        sent += 2 * model.layers * tokens / gpus * ACTIVE_EXPERTS * model.hidden * BF16 * (1 - 1 / parallel.expert)
    return passes * sent / (machine.nvlink * machine.link_share) * machine.exposed_tensor


def data_seconds(model: Architecture, machine: Machine, gpus: int, per_node: int, parallel: ParallelConfig) -> float:
    """Float32 gradients are reduce-scattered and bfloat16 weights gathered once an update."""
    return machine.exposed_data * _shares_seconds(FP32 + BF16, model, machine, gpus, per_node, parallel)


def _shares_seconds(
    size: int, model: Architecture, machine: Machine, gpus: int, per_node: int, parallel: ParallelConfig
) -> float:
    """`size` bytes a weight among the d ranks that share the optimiser, (d - 1) / d of them sent.

    Within a node over NVLink; over several nodes the network is the narrow part.
    """
    copies = gpus // parallel.tensor
    dense = model.parameters - model.layers * model.all_experts
    sent = size * dense / parallel.tensor * (copies - 1) / copies
    if model.experts:
        same = max(gpus // parallel.expert, 1)
        sent += size * model.layers * model.all_experts / parallel.expert * (same - 1) / same
    link = machine.nvlink if gpus <= per_node else machine.network
    return sent / (link * machine.link_share)


def optimizer_seconds(model: Architecture, machine: Machine, gpus: int) -> float:
    """AdamW on its shard: gradient, weight and two moments read, three written in float32, and the bfloat16 weight."""
    return (7 * FP32 + BF16) * model.parameters / gpus / (machine.bandwidth * machine.bandwidth_share)


# --------------------------------------------------------------------------------------------- turns on the same GPUs


def handover_seconds(model: Architecture, machine: Machine, gpus: int, parallel: ParallelConfig) -> float:
    """Where vLLM shares the GPUs, weights and the optimiser's float32 shard wait in the node's memory: out and in."""
    optimizer = 3 * FP32 * model.parameters / gpus
    return 2 * (BF16 * _on_gpu(model, parallel) + optimizer) / machine.host_link


def swap_seconds(model: Architecture, machine: Machine, gpus: int, per_node: int, parallel: ParallelConfig) -> float:
    """Seconds of a self-teacher in the student's place: a GPU's share of it in as float32, then two gathers."""
    gathers = _shares_seconds(2 * BF16, model, machine, gpus, per_node, parallel)
    return FP32 * model.parameters / gpus / machine.pinned_link + gathers


def guest_seconds(
    student: Architecture, teacher: Architecture, machine: Machine, cut: ParallelConfig, teacher_cut: ParallelConfig
) -> float:
    """Seconds to swap an external teacher with the student on the GPUs: both models' weights out and in."""
    return 2 * BF16 * (_on_gpu(student, cut) + _on_gpu(teacher, teacher_cut)) / machine.host_link


def follow_seconds(model: Architecture, machine: Machine, gpus: int) -> float:
    """Seconds of the moving average: a GPU's share of it in and out as float32."""
    return 2 * FP32 * model.parameters / gpus / machine.pinned_link


def _on_gpu(model: Architecture, parallel: ParallelConfig) -> float:
    """Number of weights on one GPU."""
    experts = model.layers * model.all_experts
    return (model.parameters - experts) / parallel.tensor + experts / parallel.expert
