"""Memory of `engine: nemo` on the fullest GPU, by phase and part, computed from sizes. Nothing is measured.

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

from mopd_nemo.config import Config
from mopd_nemo.config.cluster import NemoConfig, ParallelConfig, keeps_hidden, scoring_tokens, training_gpus
from mopd_nemo.engines.architecture import Architecture
from mopd_nemo.engines.memory import Estimate, Parts

RESERVE_GB = 6.0
"""CUDA context, NCCL and Transformer Engine workspaces, chunks of the loss, fragmentation."""
LOGITS_BYTES = 6
"""Bytes an entry of a packed row's logits, as above; tests/integration/nemo/test_loss_cost.py measures it."""
OPTIMIZER_BYTES = 12
"""A float32 weight and two moments."""
_GB = 1e9


def estimate(config: Config, student: Architecture, teacher: Architecture | None, gpu_gb: float) -> Estimate:
    """Peak memory of a step.

    Args:
        teacher: of `teacher.kind=external`, else None.
    """
    nemo, tokens = config.nemo, config.train.tokens_per_micro_batch
    trained = student.adapters(config.lora.rank) / student.parameters if config.lora.rank else 1.0
    update = {"reserve": RESERVE_GB} | _training(student, nemo, tokens, trained)
    score: Parts = {}
    scored = scoring_tokens(nemo, tokens)
    taught, support = not config.has_teacher("none", "server"), config.divergence.support
    hidden = keeps_hidden(nemo, support, config.train.num_updates_per_step)
    if taught and hidden:
        update["teacher's head"] = 2 * (teacher or student).hidden * student.vocab / nemo.student.tensor / _GB
    if taught and (teacher is None or (support == "student_topk" and not hidden)):
        score = {"reserve": RESERVE_GB} | _scoring(student, nemo.student, scored)
        if not nemo.offload_optimizer:
            score["optimiser"] = trained * _shared(student, nemo, OPTIMIZER_BYTES)
        if config.teacher.kind in ("ema", "frozen"):
            score["weights set aside"] = trained * _shared(student, nemo, 2)
    if teacher is not None:
        other = {"reserve": RESERVE_GB} | _scoring(teacher, nemo.teacher, scored)
        score = max(score, other, key=lambda parts: sum(parts.values()))
    generate = {
        "vLLM": nemo.generation.gpu_memory_utilization * gpu_gb,
        "weights": _weights(student, nemo.student) if nemo.generation.gpus == 0 else 0.0,
        "reserve": RESERVE_GB / 2,
    }
    return Estimate({"generate": generate, "score": score, "update": update})


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


def _training(model: Architecture, nemo: NemoConfig, tokens: int, trained: float) -> Parts:
    """The fuller of the first stage, which keeps most micro-batches, and the last, which has the logits.

    Args:
        trained: share of the weights that have gradients.
    """
    parallel, recompute = nemo.student, nemo.activation_checkpointing
    weights = _weights(model, parallel)
    optimizer = trained * _shared(model, nemo, OPTIMIZER_BYTES)
    fixed = {"weights": weights, "gradients": 2 * trained * weights, "optimiser": optimizer}
    stages, local = parallel.pipeline, tokens / parallel.context
    first = _activations(model, parallel, local, in_flight=stages, recompute=recompute)
    last = _activations(model, parallel, local, in_flight=1, recompute=recompute)
    logits = _logits(model, parallel, local, LOGITS_BYTES if nemo.batching == "packed" else 4)
    fuller = {"activations": last, "logits": logits} if last + logits > first else {"activations": first}
    return fixed | fuller


def _scoring(model: Architecture, parallel: ParallelConfig, tokens: int) -> Parts:
    local = tokens / parallel.context
    return {
        "weights": _weights(model, parallel),
        "activations": (_layer(model, parallel) * local) / _GB,
        "logits": _logits(model, parallel, local, 2),
    }


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
