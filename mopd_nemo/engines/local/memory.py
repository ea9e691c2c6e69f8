"""Memory of `engine: local` on its one device, by phase and part, computed from sizes before anything is loaded.

Counted are tensors. Not counted: the program itself, a CUDA context, and what an allocator holds beyond them. With P
parameters, of which T are trained (all, or adapters), B bytes of the compute precision (4, or 2 in bfloat16) and W
bytes of a weight (4, or 2 with `optimizer.weights: bfloat16`, or B below adapters):

    weights       W·P, and 4·T for adapters
    teacher       4·T ema, W·P frozen (0 below adapters, which have it), B·P external, 0 live; with `teacher.offload`
                  this is in host memory, and on the device are only, while it scores, B for each weight of a linear
                  layer and W for the others, and B·vocabulary·hidden of its head until the update is done
    moments       8·T, or 2·T with `optimizer.moments: int8`, of AdamW, from the first update on
    gradients     4·T
    cast weights  B·matrices            where autocast narrows weights, of one pass
    activations   for each token of a micro-batch the sum over layers of `kept_by_layer`; with activation
                  checkpointing the input of each layer, and one layer whole
    loss          the head's gradient, the heads in the compute precision, and a chunk of logits
    teacher's states   W·hidden for each response token of the step
    KV cache      B·2·layers·kv heads·head size for each token of the sequences decoded at once

Responses are taken to be as long as `rollout.max_response_tokens`, prompts and contexts as their limits: a step needs
no more than this. Layers are those of the Llama family, sequences are read as trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mopd_nemo.config import Config
from mopd_nemo.config.checks import teacher_prompt
from mopd_nemo.config.plugins import method_class
from mopd_nemo.engines.architecture import Architecture
from mopd_nemo.engines.local.activations import WHOLE, batch_tokens, gathered_keys, kept_by_layer, passing
from mopd_nemo.engines.memory import Estimate, Parts

SCORING_BATCH, SCORING_ROWS = 2, 4
"""A pass without gradients keeps the activations of one layer only. So its batches have twice the tokens of an update's
micro-batch, and at least four times the longest sequence: responses share a long context only within a batch."""
SMALL_CACHE = 128
"""Positions that a cache of responses has room for at least, if there can be as many."""
LOGITS = {"cpu": 2**22, "cuda": 2**29}
"""Logits of a chunk of the loss: `losses.token_loss.LOGIT_BUDGET`."""
MIN_CHUNK = 256
"""Rows of a chunk at least: `losses.token_loss.MIN_CHUNK`."""
BLOCK = 256
"""Numbers of an 8-bit moment that share a scale."""
MIN_QUANTISED = 4096
"""A parameter with fewer numbers keeps float32 moments, and so does one that is no whole number of blocks."""
SLICE = {"cpu": 2**20, "cuda": 2**24}
"""Numbers that `SmallAdamW` updates at once, so that what it needs meanwhile does not grow with a matrix."""

UPDATED = 21
"""Bytes that it needs for each of them, at most."""


def is_quantised(numbers: int) -> bool:
    """Whether a parameter of this size has 8-bit moments where they are asked for."""
    return numbers >= MIN_QUANTISED and numbers % BLOCK == 0


def is_small(config: Config) -> bool:
    """Whether `SmallAdamW` is the optimiser."""
    return config.optimizer.weights != "float32" or config.optimizer.moments != "float32"


def scoring_budget(tokens_per_micro_batch: int, longest: int) -> int:
    """Tokens of a batch in a pass without gradients.

    Args:
        longest: tokens of the longest sequence.
    """
    return max(SCORING_BATCH * tokens_per_micro_batch, SCORING_ROWS * longest)


def cache_size(length: int, limit: int) -> int:
    """Positions of a cache of responses that has to hold more than `length`: the limit, halved as often as it can be.

    So the last growth, in which the old and the new cache are there together, is from half the limit to the whole.
    """
    size = limit
    while size > SMALL_CACHE and -(-size // 2) > length:
        size = -(-size // 2)
    return size


def checkpoint_bytes(config: Config, trained: float) -> int:
    """What a checkpoint takes on disk: trained weights, AdamW's two moments, and a teacher that follows the student."""
    return int(trained * (_trained_width(config) + _moments(config) + WHOLE * config.has_teacher("ema")))


def trained_parameters(config: Config, model: Architecture) -> int:
    """All, or those of the adapters."""
    lora = config.lora
    return model.adapters(lora.rank, lora.targets) if lora.rank else model.parameters


def at_least(config: Config, parameters: float) -> Estimate:
    """What an update needs whatever its sequences are, given the number of weights; without external teachers."""
    trained = 0.0 if config.lora.rank else parameters
    parts = _resident(config, parameters, trained, 0.0) | {"gradients": WHOLE * trained}
    return Estimate({"update": {name: size / 1e9 for name, size in parts.items()}})


def estimate(
    config: Config, student: Architecture, externals: Sequence[Architecture], device: str, device_gb: float
) -> Estimate:
    """Peak memory of a step.

    Args:
        externals: teachers of `kind=external`.
        device: `cuda` or `cpu`.
        device_gb: of which vLLM takes a share.
    """
    run = _Run(config, student, externals, device)
    phases = {
        "generate": run.generate(device_gb),
        "score": run.score() if run.taught else {},
        "update": run.update(),
        "optimiser step": run.optimizer_step(),
    }
    return Estimate(
        {name: {part: size / 1e9 for part, size in parts.items()} for name, parts in phases.items()},
        host=0.0 if device == "cpu" else run.on_host() / 1e9,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes of each part."""

    config: Config
    student: Architecture
    externals: Sequence[Architecture]
    device: str

    @property
    def width(self) -> int:
        """Bytes of a number in the compute precision."""
        return _width(self.config)

    @property
    def stored(self) -> int:
        """Bytes of the student's weights and of the hidden states between its layers."""
        return self.width if self.config.lora.rank else _trained_width(self.config)

    @property
    def teaching(self) -> int:
        """The same of a teacher with the student's sizes."""
        return WHOLE if self.config.has_teacher("ema") and not self.config.lora.rank else self.stored

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return trained_parameters(self.config, self.student)

    @property
    def own(self) -> bool:
        """Whether a teacher has the student's sizes."""
        return self.config.has_teacher("live", "ema", "frozen") or self.config.reference.kl > 0

    @property
    def taught(self) -> bool:
        """Whether a teacher is on this device."""
        return self.own or bool(self.externals)

    @property
    def responses(self) -> int:
        """Response tokens of a step."""
        rollout = self.config.rollout
        return rollout.num_prompts_per_step * rollout.num_rollouts_per_prompt * rollout.max_response_tokens

    def resident(self) -> Parts:
        """What stays through a whole step."""
        external = sum(model.parameters for model, offload in self._of_others() if not offload)
        parts = _resident(self.config, self.student.parameters, self.trained, external)
        if self.device == "cpu" and (size := self.on_host()):  # host memory is the device's
            parts["on the host"] = size
        return parts

    def on_host(self) -> float:
        """Weights of the offloaded teachers and of the reference."""
        averages = sum(teacher.offload and teacher.kind == "ema" for teacher in self.config.every_teacher.values())
        own = WHOLE * averages + self.stored * (self._own_offloaded - averages)
        external = sum(model.parameters for model, offload in self._of_others() if offload)
        return float(own * self.student.parameters + self.width * external)

    def generate(self, device_gb: float) -> Parts:
        """Sampling, at the end of the longest response."""
        if self.config.generation.backend == "vllm":
            share = self.config.generation.gpu_memory_utilization if self.device == "cuda" else 0.0
            return self.resident() | {"vLLM": share * device_gb * 1e9}
        rollout, model = self.config.rollout, self.student
        group = rollout.num_rollouts_per_prompt
        prompts = min(max(rollout.batch_size // group, 1), rollout.num_prompts_per_step)
        sequences, limit = prompts * group, 1 + rollout.max_response_tokens
        grown = sequences * (limit + (-(-limit // 2) if limit > SMALL_CACHE else 0))
        of_token = 2 * model.layers * model.kv_heads * model.head_dim * self.width
        matrices, fused = _matrices(model), self.width == self.stored and not self.config.lora.rank
        if fused:  # output projections are the model's own, those that read the same input are copied into one
            own = model.hidden * (model.heads * model.head_dim + model.ffn)
            matrices -= model.layers * own
        head = model.embedding if self.width < self.stored else 0
        return self.resident() | {
            "sampler's weights": float(self.width * (matrices + head)),
            "KV cache": float(of_token * (grown + prompts * self.config.data.max_prompt_tokens)),
            "logits": float(sequences * model.vocab * (self.width + 3 * WHOLE)),
        }

    def score(self) -> Parts:
        """The passes of the teacher that needs most, the last of them."""
        context, response, group = teacher_prompt(self.config)[1], self.config.rollout.max_response_tokens, self._group
        contexts = self._contexts()
        budget = scoring_budget(self.config.train.tokens_per_micro_batch, context + response)
        groups = self.config.rollout.num_prompts_per_step
        tokens = batch_tokens(budget, contexts * groups, context, group / contexts, response)
        gathered = gathered_keys(context, response, group / contexts)
        found = []
        passes = [(self.student, self.teaching, self._own_offloaded > 0)] * self.own
        for model, stored, offload in passes + [(x, self.width, offload) for x, offload in self._of_others()]:
            parts = {"activations": float(tokens * passing(model, stored, self.width, gathered))}
            if offload:
                parts["copied weights"] = float(_copied(model, stored, self.width))
            elif self.width < stored:
                kept = self.config.has_teacher("live")  # autocast keeps what it has narrowed of trained weights alone
                cast = _matrices(model) if kept else max(model.hidden * model.ffn, model.attention // 2)
                parts["cast weights"] = float(self.width * cast)
            found.append(parts)
        return self.resident() | self._states() | max(found, key=lambda parts: sum(parts.values()))

    def update(self) -> Parts:
        """Forward and backward pass of a micro-batch, at the loss."""
        model, tokens = self.student, self._micro_batch(self.config.train.tokens_per_micro_batch)
        prompt, response = self.config.data.max_prompt_tokens, self.config.rollout.max_response_tokens
        group = self.config.rollout.num_rollouts_per_prompt
        taught = round(tokens * group * response / (group * response + prompt))
        parts = self.resident()
        if tokens < self._micro_batch(
            float("inf")
        ):  # else the only micro-batch has its activations before there are gradients
            parts["gradients"] = float(WHOLE * self.trained)
        kept = tokens * self._kept_by_layers() + taught * self.stored * model.hidden
        parts |= self._states() | {"activations": float(kept)}
        if self.width < self.stored:
            parts["cast weights"] = float(self.width * _matrices(model))
        return parts | {"loss": self._loss(taught)}

    def optimizer_step(self) -> Parts:
        """The optimiser, after the last micro-batch."""
        parts = self.resident() | {"gradients": float(WHOLE * self.trained)} | self._states()
        largest = min(max(self.student.embedding, self.student.hidden * self.student.ffn), self.trained)
        if is_small(self.config):
            return parts | {"temporary": float(UPDATED * min(largest, SLICE[self.device]))}
        return parts | {"temporary": float(2 * WHOLE * largest if self.device == "cpu" else 0)}  # a GPU's is one kernel

    def _states(self) -> Parts:
        """The teachers' hidden states of the step's responses, until the update is done."""
        prompts = 2 if self.config.divergence.contrast else 1
        sizes = [self.teaching * self.student.hidden] * self.config.has_teacher("live", "ema", "frozen")
        sizes += [self.width * model.hidden for model in self.externals]
        size = max(sizes, default=0) * prompts + (self.config.reference.kl > 0) * self.stored * self.student.hidden
        parts = {"teacher's states": float(self.responses * size)} if size else {}
        own = self.student.embedding * self._own_offloaded
        if heads := own + sum(model.embedding for model, offload in self._of_others() if offload):
            parts["teacher's head"] = float(self.width * heads)
        return parts

    @property
    def _own_offloaded(self) -> int:
        """How many models with the student's sizes are in host memory."""
        offloaded = [teacher.offload and teacher.kind != "external" for teacher in self.config.every_teacher.values()]
        return sum(offloaded) + self.config.reference.offload

    def _of_others(self) -> list[tuple[Architecture, bool]]:
        """External teachers, and whether their weights are in host memory."""
        external = [teacher.offload for teacher in self.config.every_teacher.values() if teacher.kind == "external"]
        return list(zip(self.externals, external, strict=True))

    @property
    def _group(self) -> int:
        return self.config.rollout.num_rollouts_per_prompt

    def _contexts(self) -> int:
        """Distinct teacher prompts of a group.

        Targets that are themselves shown read the next peers: all the same ones where half of a group has enough.
        """
        peers = self.config.peers
        if not method_class(self.config.method).reads_peers:
            return 1
        shown = sum(self._group if count == "all" else count for count in (peers.successes, peers.failures))
        distinct = 2 if self._group >= 4 * shown else min(shown + 1, self._group)
        return distinct * (2 if self.config.divergence.contrast else 1)

    def _groups(self) -> int:
        """Of an update."""
        return -(-self.config.rollout.num_prompts_per_step // self.config.train.num_updates_per_step)

    def _micro_batch(self, budget: float) -> float:
        """Tokens of the largest micro-batch of an update, if one has at most `budget`."""
        prompt, response = self.config.data.max_prompt_tokens, self.config.rollout.max_response_tokens
        return batch_tokens(budget, self._groups(), prompt, self._group, response)

    def _kept_by_layers(self) -> float:
        """Bytes a token of what the backward pass needs, with the norm at the end."""
        model = self.student
        keys = gathered_keys(self.config.data.max_prompt_tokens, self.config.rollout.max_response_tokens, self._group)
        lora = self.config.lora
        layer = kept_by_layer(model, self.width, keys, self.stored, lora.rank > 0)
        if lora.dropout:  # every adapter keeps an input of its own and its mask, and nothing keeps what they read
            own, shared = model.adapter_inputs(lora.targets)
            layer += (self.width + 1) * own - self.width * shared
        end = (WHOLE + self.stored) * model.hidden + 2 * WHOLE * model.head_dim
        if self.config.train.activation_checkpointing:
            return (model.layers - 1) * self.stored * model.hidden + layer + end
        return model.layers * layer + end

    def _loss(self, tokens: int) -> float:
        """Heads, their gradient, hidden states of the response tokens of a micro-batch, and a chunk of logits."""
        model, taught = self.student, self.taught and not self._pairs
        rows = min(tokens, max(LOGITS[self.device] // model.vocab, MIN_CHUNK))
        reference = self.config.reference
        terms = 1 + (reference.kl > 0) + (self.config.policy_gradient.weight > 0)  # each has a gradient of its own
        head = 0 if self.config.lora.rank else WHOLE * model.embedding * terms
        wide = {"live", "ema", "frozen"} & {*_resident_kinds(self.config)} or (reference.kl and not reference.offload)
        casts, hidden = 0, 0
        for stored, whole_head in [(self.stored, True)] + [(self.teaching, bool(wide))] * taught:
            hidden += tokens * model.hidden * stored
            if self.width < stored:
                casts += self.width * model.embedding * whole_head
                hidden += tokens * model.hidden * self.width
        return float(head + casts + hidden + rows * model.vocab * self._logit())

    def _logit(self) -> int:
        """Bytes for each logit of a chunk. A GPU's kernels widen no whole chunk and write over logits."""
        kinds = ("live", "ema", "frozen", "external")
        taught, reference = self.config.has_teacher(*kinds) and not self._pairs, self.config.reference.kl > 0
        distributions = 1 + taught + (self.config.divergence.contrast > 0)
        if self.device != "cpu":
            return max(distributions, 1 + reference) * self.width
        if self._pairs:
            return 2 * WHOLE + (self.width if self.width < WHOLE else 0)
        whole = taught and self.config.divergence.support == "full"
        term = distributions * (WHOLE + self.width) + 2 * WHOLE + (2 * WHOLE - self.width) * whole
        return max(term, 4 * WHOLE * reference)

    @property
    def _pairs(self) -> bool:
        return method_class(self.config.method).pairs


def _width(config: Config) -> int:
    return 2 if config.model.dtype == "bfloat16" else WHOLE


def _trained_width(config: Config) -> int:
    """Bytes of a weight that is trained."""
    return 2 if config.optimizer.weights == "bfloat16" else WHOLE


def _moments(config: Config) -> float:
    """Bytes of AdamW's two averages of a weight. Those of small parameters are not told apart."""
    return 2.0 * (1 + WHOLE / BLOCK if config.optimizer.moments == "int8" else WHOLE)


def _resident(config: Config, parameters: float, trained: float, external: float) -> Parts:
    adapted = config.lora.rank > 0
    whole = 0.0 if adapted else _trained_width(config) * parameters  # weights below adapters are there once
    parts = {"weights": _width(config) * parameters + WHOLE * trained if adapted else whole}
    parts["moments"] = _moments(config) * trained
    kinds = _resident_kinds(config)
    copies = WHOLE * trained * kinds.count("ema") + whole * kinds.count("frozen")
    if copies or external:
        parts["teacher"] = copies + external * _width(config)
    if config.reference.kl and not config.reference.offload and whole:
        parts["initial weights"] = whole
    if config.rollout.lag and config.generation.backend == "local":
        parts["second copy"] = _trained_width(config) * trained
    return parts


def _resident_kinds(config: Config) -> list[str]:
    """Kinds of the teachers that are not in host memory."""
    return [teacher.kind for teacher in config.every_teacher.values() if not teacher.offload]


def _copied(model: Architecture, stored: int, width: int) -> int:
    """Bytes of an offloaded teacher's weights while it scores, without its head."""
    if width == stored:
        return stored * (model.parameters - model.embedding)
    narrowed = _matrices(model)
    return stored * (model.parameters - narrowed - model.embedding * (not model.tied)) + width * narrowed


def _matrices(model: Architecture) -> int:
    """Weights of all layers that meet a token in a matrix product."""
    return model.layers * (model.attention + model.mlp)
