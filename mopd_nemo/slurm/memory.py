"""The sizes of a model, and an estimate of GPU memory per phase that is computed from them. Nothing is measured.

With P the parameters on one GPU (layers divided by pipeline stages and tensor parallelism, experts by expert
parallelism, embedding and output layer on the stages that have them), D the GPUs that share the optimiser's state
(data × context parallelism; for experts those that hold the same ones) and T the tokens of a micro-batch on one GPU:

    weights       2·P                    bfloat16
    gradients     4·P                    float32 buffers
    optimiser     12·P / D               float32 weights and two moments, distributed
    activations   2·T·hidden·L·s / t  +  w·T   L layers of a stage kept at their inputs, s micro-batches in flight (the
                                         number of later stages, and one), t = tensor with sequence parallelism, else 1;
                                         w: one layer's working set, computed again
    logits        6·T·vocab / tensor   bfloat16 values, their gradient, and a sequence's part of it, which the packing
                                         wrapper's backward makes as large as the whole (4 unless packed); the loss
                                         widens a chunk at a time
    head          2·hidden·vocab / tensor   the teacher's, where the update computes its logits from hidden states
    generation    gpu_memory_utilization of the GPU, and the training weights while they are handed over

A scoring teacher has weights, one layer's working set and logits without gradients, of twice as many tokens where rows
are packed. On shared GPUs an external teacher and the student take turns: each is in host memory while the other
scores. The teacher also is while the student trains or vLLM generates. An EMA or frozen
teacher scores in the student's place, of whose weights each GPU sets its share aside, 2·P / D. Its share of the
teacher, 4·P / D or 2·P / D, is in host memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopd_nemo.config import Config
from mopd_nemo.config.cluster import NemoConfig, ParallelConfig, keeps_hidden, scoring_tokens, training_gpus

RESERVE_GB = 6.0
"""CUDA context, NCCL and Transformer Engine workspaces, chunks of the loss, fragmentation."""
LOGITS_BYTES = 6
"""Bytes an entry of a packed row's logits, as above; tests/integration/nemo/test_loss_cost.py measures it."""
OPTIMIZER_BYTES = 12
"""A float32 weight and two moments."""
_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder of the Llama family: grouped-query attention, gated MLP or experts."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of the MLP, or of one expert."""
    vocab: int
    tied: bool = False
    """Whether the output layer is the embedding."""
    experts: int = 0
    """0: a dense MLP."""
    qk_norm: bool = True

    @property
    def attention(self) -> int:
        """Parameters of one layer's attention."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def mlp(self) -> int:
        """Parameters of one layer's MLP, without its experts."""
        return self.hidden * self.experts if self.experts else 3 * self.hidden * self.ffn

    @property
    def all_experts(self) -> int:
        """Parameters of one layer's experts."""
        return 3 * self.hidden * self.ffn * self.experts

    @property
    def norms(self) -> int:
        """Parameters of one layer's norms."""
        return 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        layer = self.attention + self.mlp + self.all_experts + self.norms
        return self.layers * layer + self.hidden + self.embedding * (1 if self.tied else 2)


def _qwen3(layers: int, hidden: int, heads: int, ffn: int, tied: bool = False) -> Architecture:
    return Architecture(
        layers=layers, hidden=hidden, heads=heads, kv_heads=8, head_dim=128, ffn=ffn, vocab=151936, tied=tied
    )


KNOWN = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 16, 3072, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 16, 6144, tied=True),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 32, 9728, tied=True),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 32, 12288),
    "Qwen/Qwen3-14B": _qwen3(40, 5120, 40, 17408),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 64, 25600),
    "Qwen/Qwen3-30B-A3B": Architecture(
        layers=48, hidden=2048, heads=32, kv_heads=4, head_dim=128, ffn=768, vocab=151936, experts=128
    ),
    "meta-llama/Llama-3.1-8B-Instruct": Architecture(
        layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256, qk_norm=False
    ),
    "meta-llama/Llama-3.3-70B-Instruct": Architecture(
        layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab=128256, qk_norm=False
    ),
}
"""Sizes of models that may not be installed where a job is submitted."""


def architecture_of(path: str, hf_home: str | None) -> Architecture | None:
    """Sizes of a model directory, of a model in a Hugging Face cache, or of a known name. None: unknown."""
    directory = find_model(path, hf_home)
    if directory is not None:
        return from_config(json.loads((directory / "config.json").read_text()))
    return KNOWN.get(path)


def find_model(path: str, hf_home: str | None) -> Path | None:
    """The directory with the model's `config.json`. None: it is not on this machine."""
    if (Path(path) / "config.json").is_file():
        return Path(path)
    if hf_home is None:
        return None
    snapshots = Path(hf_home) / "hub" / f"models--{path.replace('/', '--')}" / "snapshots"
    return next((found.parent for found in sorted(snapshots.glob("*/config.json"))), None)


def from_config(config: Mapping[str, Any]) -> Architecture | None:
    """Sizes from a Hugging Face config. None: another family of models."""
    try:
        heads = config["num_attention_heads"]
        return Architecture(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ffn=config.get("moe_intermediate_size") or config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            experts=config.get("num_experts") or config.get("num_local_experts") or 0,
            qk_norm=config.get("model_type", "").startswith("qwen3"),
        )
    except KeyError:
        return None


@dataclass(frozen=True, slots=True)
class Estimate:
    """GB on the fullest GPU, by phase."""

    train: float
    score: float
    generate: float


def estimate(config: Config, student: Architecture, teacher: Architecture | None, gpu_gb: float) -> Estimate:
    """Peak memory of a step.

    Args:
        teacher: of `teacher.kind=external`, else None.
    """
    nemo, tokens = config.nemo, config.train.tokens_per_micro_batch
    train = RESERVE_GB + _training(student, nemo, tokens, config.nemo.activation_checkpointing)
    own = _weights(student, nemo.student)
    score, scored = 0.0, scoring_tokens(nemo, tokens)
    taught, support = not config.has_teacher("none", "server"), config.divergence.support
    hidden = keeps_hidden(nemo, support, config.train.num_updates_per_step)
    if taught and hidden:
        train += 2 * (teacher or student).hidden * student.vocab / nemo.student.tensor / _GB
    if taught and (teacher is None or (support == "student_topk" and not hidden)):
        optimizer = 0.0 if nemo.offload_optimizer else _shared(student, nemo, OPTIMIZER_BYTES)
        aside = _shared(student, nemo, 2) if config.teacher.kind in ("ema", "frozen") else 0.0
        score = RESERVE_GB + _scoring(student, nemo.student, scored) + optimizer + aside
    if teacher is not None:
        score = max(score, RESERVE_GB + _scoring(teacher, nemo.teacher, scored))
    handed_over = own if nemo.generation.gpus == 0 else 0.0
    generate = nemo.generation.gpu_memory_utilization * gpu_gb + handed_over + RESERVE_GB / 2
    return Estimate(train, score, generate)


def generation_weights(config: Config, student: Architecture) -> float:
    """GB of the student's weights on one GPU of a vLLM engine."""
    return 2 * student.parameters / config.nemo.generation.tensor / _GB


def check_divisible(who: str, model: Architecture, parallel: ParallelConfig) -> str | None:
    """Why the model cannot be sharded like this. None: it can."""
    key = f"nemo.{who}"
    if model.layers % parallel.pipeline:
        return f"{key}.pipeline={parallel.pipeline} does not divide the model's {model.layers} layers"
    if model.heads % parallel.tensor or model.kv_heads % parallel.tensor:
        return (
            f"{key}.tensor={parallel.tensor} does not divide the model's {model.heads} attention heads and "
            f"{model.kv_heads} key-value heads"
        )
    if parallel.expert > 1 and (not model.experts or model.experts % parallel.expert):
        return f"{key}.expert={parallel.expert} does not divide the model's {model.experts} experts"
    return None


def _training(model: Architecture, nemo: NemoConfig, tokens: int, recompute: bool) -> float:
    """The fuller of the first stage, which keeps most micro-batches, and the last, which has the logits."""
    parallel = nemo.student
    fixed = 3 * _weights(model, parallel) + _shared(model, nemo, OPTIMIZER_BYTES)  # weights 2 bytes, gradients 4
    stages, local = parallel.pipeline, tokens / parallel.context
    first = fixed + _activations(model, parallel, local, in_flight=stages, recompute=recompute)
    last = fixed + _activations(model, parallel, local, in_flight=1, recompute=recompute)
    logits = _logits(model, parallel, local, LOGITS_BYTES if nemo.batching == "packed" else 4)
    return max(first, last + logits)


def _scoring(model: Architecture, parallel: ParallelConfig, tokens: int) -> float:
    local = tokens / parallel.context
    return _weights(model, parallel) + (_layer(model, parallel) * local) / _GB + _logits(model, parallel, local, 2)


def _weights(model: Architecture, parallel: ParallelConfig) -> float:
    return 2 * (_dense(model, parallel) + _experts(model, parallel)) / _GB


def _shared(model: Architecture, nemo: NemoConfig, size: int) -> float:
    """`size` bytes for each weight in a GPU's share of the distributed optimiser."""
    parallel, gpus = nemo.student, training_gpus(nemo)
    shared = gpus // (parallel.tensor * parallel.pipeline)
    same_experts = max(1, gpus // (parallel.pipeline * parallel.expert))
    return size * (_dense(model, parallel) / shared + _experts(model, parallel) / same_experts) / _GB


def _dense(model: Architecture, parallel: ParallelConfig) -> float:
    """Parameters of the fullest stage without experts: its layers and, at a pipeline's end, the vocabulary."""
    layer = (model.attention + (0 if model.experts else model.mlp)) / parallel.tensor + model.norms
    router = model.mlp if model.experts else 0
    ends = 1 if model.tied or parallel.pipeline > 1 else 2
    return model.layers / parallel.pipeline * (layer + router) + ends * model.embedding / parallel.tensor


def _experts(model: Architecture, parallel: ParallelConfig) -> float:
    return model.layers / parallel.pipeline * model.all_experts / parallel.expert


def _activations(
    model: Architecture, parallel: ParallelConfig, tokens: float, *, in_flight: int, recompute: bool
) -> float:
    layers = model.layers / parallel.pipeline * in_flight
    kept = 2 * model.hidden / _sequence(parallel) if recompute else _layer(model, parallel)
    return tokens * (layers * kept + _layer(model, parallel)) / _GB


def _layer(model: Architecture, parallel: ParallelConfig) -> float:
    """Bytes a token of one layer's tensors in bfloat16, with their gradients.

    These are the inputs of both blocks and their norms, queries, keys, values and the attention's result, both halves
    of the MLP and their product.
    """
    outside = 4 * model.hidden / _sequence(parallel)
    attention = (2 * model.heads + 2 * model.kv_heads) * model.head_dim
    active = 8 if model.experts else 1
    inside = (attention + 3 * model.ffn * active) / parallel.tensor
    return 2 * 2 * (outside + inside)


def _sequence(parallel: ParallelConfig) -> int:
    return parallel.tensor if parallel.sequence else 1


def _logits(model: Architecture, parallel: ParallelConfig, tokens: float, size: int) -> float:
    return size * tokens * model.vocab / parallel.tensor / _GB
