"""Decoding for models built like Llama, at more than twice the speed of their own forward pass on a CPU.

At every position, the forward pass of transformers copies the whole cache twice: once to append to it, and once to
repeat the keys for each query head. Here keys and values are written in place, and the keys and values of a prompt are
kept once for all its samples. Projections that read the same input are one matrix product. Factors that only scale an
input or an output are folded into the weights.

Shape suffixes: L layers, U distinct prompts, B running sequences, M slots of a prompt, T tokens, P prompt positions,
C positions that the cache has room for, S those written (the first represents the prompt), K key-value heads, G query
heads that share one, N query heads (of `_Layer`: query and key heads), D head size, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from mopd_nemo.engines.local.lora import merged_weight
from mopd_nemo.engines.local.memory import cache_size
from mopd_nemo.engines.local.model import LanguageModel

LIKE_LLAMA = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
ROPES = {"default", "linear", "llama3", "yarn"}
"""Rotations that depend on the position alone, not on how long the sequence has become."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention: from a layer's index, scaled queries_TKGD, keys_TKD and values_TKD to outputs of the queries' size."""


def is_like_llama(module: Any) -> bool:
    """Whether `LlamaLayers` computes the model's own forward pass. Tests compare the two for every class listed."""
    if type(module).__name__ not in LIKE_LLAMA:
        return False
    matrices = [
        type(m)
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear | nn.Embedding) and ".lora_" not in name
    ]
    return (
        getattr(module.config, "sliding_window", None) is None
        and module.config.rope_parameters["rope_type"] in ROPES
        and len(matrices) == 2 + 7 * len(module.base_model.layers)  # nothing beside them but adapters
        and set(matrices) == {nn.Linear, nn.Embedding}  # not quantised
    )


def read_prompts(
    model: LanguageModel, prompts: Sequence[Sequence[int]], num_samples: int, max_tokens: int
) -> tuple[Tensor, LlamaDecoder]:
    """See `sampler.read_prompts`."""
    device, lengths_U = model.device, torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    # Causal attention never reads padding on the right.
    ids_UP = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
    count, width = ids_UP.shape
    layers = LlamaLayers(model, width + max_tokens)
    cache_L2UKPD = layers.new_cache(count, width)

    def attend(layer: int, queries_TKGD: Tensor, keys_TKD: Tensor, values_TKD: Tensor) -> Tensor:
        for cache_UKPD, new_TKD in zip(cache_L2UKPD[layer], (keys_TKD, values_TKD), strict=True):
            cache_UKPD.copy_(new_TKD.unflatten(0, (count, width)).transpose(1, 2))
        queries_UNPD = queries_TKGD.flatten(1, 2).unflatten(0, (count, width)).transpose(1, 2)
        keys_UNPD, values_UNPD = cache_L2UKPD[layer].repeat_interleave(queries_TKGD.shape[2], dim=2)
        attended_UNPD = scaled_dot_product_attention(queries_UNPD, keys_UNPD, values_UNPD, is_causal=True, scale=1.0)
        return attended_UNPD.transpose(1, 2).flatten(0, 1)

    hidden_TH = layers.hidden_TH(ids_UP.flatten(), torch.arange(width, device=device).repeat(count), attend)
    last_U = torch.arange(count, device=device) * width + lengths_U - 1
    logits_BV = layers.logits_TV(hidden_TH[last_U]).repeat_interleave(num_samples, dim=0)
    shared = SharedPrompts(cache_L2UKPD, lengths_U, num_samples)
    return logits_BV, LlamaDecoder(layers, shared, lengths_U.repeat_interleave(num_samples), max_tokens)


class LlamaDecoder:
    """A `sampler.Decoder`.

    Args:
        positions_B: of the first response tokens.
        max_tokens: of each response.
    """

    def __init__(self, layers: LlamaLayers, prompts: SharedPrompts, positions_B: Tensor, max_tokens: int) -> None:
        self._layers, self._prompts, self._positions_B = layers, prompts, positions_B
        self._limit, self._length = 1 + max_tokens, 1  # the first position of the cache represents the prompt
        self._cache_L2BKCD = layers.new_cache(len(positions_B), cache_size(self._length, self._limit))
        self._cache_L2BKCD[..., 0, :] = 0

    def step(self, tokens_B: Tensor) -> Tensor:
        if self._length == self._cache_L2BKCD.shape[4]:
            self._grow(len(tokens_B))
        self._length += 1
        self._seen_L2BKSD = self._cache_L2BKCD[:, :, : len(tokens_B), :, : self._length].unbind(0)
        hidden_BH = self._layers.hidden_TH(tokens_B, self._positions_B, self._attend)
        self._positions_B = self._positions_B + 1
        return self._layers.logits_TV(hidden_BH)

    def keep(self, order_B: Tensor) -> None:
        move_rows(self._cache_L2BKCD[..., : self._length, :], order_B)
        self._positions_B = self._positions_B[order_B]
        self._prompts.keep(order_B)

    def _attend(self, layer: int, queries_BKGD: Tensor, keys_BKD: Tensor, values_BKD: Tensor) -> Tensor:
        """One softmax over prompt and response. The prompt is one more position, whose score is the log of its mass."""
        keys_BKSD, values_BKSD = self._seen_L2BKSD[layer].unbind(0)
        keys_BKSD[:, :, -1], values_BKSD[:, :, -1] = keys_BKD, values_BKD
        prompt_BKGD, mass_BKG = self._prompts.attend(layer, queries_BKGD)
        scores_BKGS = (queries_BKGD @ keys_BKSD.mT).float()
        scores_BKGS[..., 0] = mass_BKG
        weights_BKGS = scores_BKGS.softmax(-1).to(queries_BKGD.dtype)
        return (weights_BKGS @ values_BKSD).addcmul_(weights_BKGS[..., :1], prompt_BKGD)

    def _grow(self, rows: int) -> None:
        written_L2BKSD = self._cache_L2BKCD[:, :, :rows]
        self._cache_L2BKCD = self._layers.new_cache(rows, cache_size(self._length, self._limit))
        self._cache_L2BKCD[..., : self._length, :] = written_L2BKSD


class SharedPrompts:
    """Keys and values of prompts, kept once, and the attention of all running sequences to them.

    The queries of all sequences of a prompt meet its keys in one product. Sequences end at different times, so each
    prompt has as many slots for queries as the prompt with the most running sequences needs. Slots that a prompt does
    not need repeat the queries of some sequence, and their results are discarded.

    Args:
        cache_L2UKPD: keys and values. Padding is on the right and finite.
        lengths_U: without padding.
        num_samples: sequences of each prompt, prompt by prompt.
    """

    def __init__(self, cache_L2UKPD: Tensor, lengths_U: Tensor, num_samples: int) -> None:
        device, (_, _, prompts, _, width, _) = cache_L2UKPD.device, cache_L2UKPD.shape
        padding_UP = torch.arange(width, device=device) >= lengths_U.unsqueeze(1)
        self._cache_L2UKPD = cache_L2UKPD
        self._penalty_UP = cache_L2UKPD.new_zeros(prompts, width).masked_fill_(padding_UP, float("-inf"))
        self._prompts_B = torch.arange(prompts, device=device).repeat_interleave(num_samples)
        self._lay_out()

    def attend(self, layer: int, queries_BKGD: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of each query to its own prompt alone, and the log-sum-exp of its scores.

        Returns:
            attended_BKGD, mass_BKG.
        """
        keys, values = self._cache_L2[layer]
        group, size = queries_BKGD.shape[2:]
        queries = queries_BKGD.reshape(-1, group * size).index_select(0, self._sources_UKM).view(len(keys), -1, size)
        scores = torch.baddbmm(self._penalty, queries, keys.mT)
        logs = scores.log_softmax(-1, dtype=torch.float32)
        mass = scores[..., 0] - logs[..., 0]  # the first position is never padding
        attended = logs.exp_().to(queries.dtype) @ values
        return (
            attended.view(-1, group * size).index_select(0, self._places_BK).view(queries_BKGD.shape),
            mass.view(-1, group).index_select(0, self._places_BK).view(queries_BKGD.shape[:3]),
        )

    def keep(self, order_B: Tensor) -> None:
        """See `sampler.Decoder.keep`. Prompts without running sequences are dropped too."""
        self._prompts_B = self._prompts_B[order_B]
        left_U = torch.bincount(self._prompts_B, minlength=len(self._penalty_UP)) == 0
        if left_U.any():
            order_U = compact_order(left_U)
            move_rows(self._cache_L2UKPD, order_U)
            self._penalty_UP = self._penalty_UP[order_U]
            places_U = torch.empty_like(left_U, dtype=torch.long)
            places_U[order_U] = torch.arange(len(order_U), device=order_U.device)
            self._prompts_B = places_U[self._prompts_B]
        self._lay_out()

    def _lay_out(self) -> None:
        """Which sequence's queries fill each slot, and from which slot each sequence reads its result."""
        heads, rows_B = self._cache_L2UKPD.shape[3], torch.arange(len(self._prompts_B), device=self._prompts_B.device)
        heads_K = torch.arange(heads, device=rows_B.device)
        counts_U = torch.bincount(self._prompts_B)
        slots = int(counts_U.max())
        by_prompt_B = self._prompts_B.argsort(stable=True)
        slots_B = torch.empty_like(rows_B)
        slots_B[by_prompt_B] = rows_B - (counts_U.cumsum(0) - counts_U)[self._prompts_B[by_prompt_B]]
        rows_UM = rows_B.new_zeros(len(counts_U), slots)
        rows_UM[self._prompts_B, slots_B] = rows_B
        self._sources_UKM = (rows_UM.unsqueeze(1) * heads + heads_K.unsqueeze(1)).flatten()
        self._places_BK = ((self._prompts_B.unsqueeze(1) * heads + heads_K) * slots + slots_B.unsqueeze(1)).flatten()
        self._penalty = self._penalty_UP.repeat_interleave(heads, dim=0).unsqueeze(1)
        seen_L2 = self._cache_L2UKPD[:, :, : len(counts_U)].flatten(2, 3)
        self._cache_L2 = [cache_2.unbind(0) for cache_2 in seen_L2.unbind(0)]


def compact_order(ended_B: Tensor) -> Tensor:
    """The row that each place of a batch gets when finished rows leave, so that as few rows as possible move.

    The last running rows take the places of those that ended. The others stay.
    """
    running = (~ended_B).nonzero().squeeze(-1)
    count = len(running)
    order_B = torch.arange(count, device=ended_B.device)
    order_B[ended_B[:count]] = running[running >= count]
    return order_B


def move_rows(cache_L2BKCD: Tensor, order_B: Tensor) -> None:
    """Move row `order_B[i]` of a cache to position i. Rows that stay cost nothing."""
    moved = (order_B != torch.arange(len(order_B), device=order_B.device)).nonzero().squeeze(-1)
    if len(moved):
        cache_L2BKCD[:, :, moved] = cache_L2BKCD[:, :, order_B[moved]]


class LlamaLayers:
    """A snapshot of a model's weights, adapters merged into them, in the precision of its computation.

    Args:
        num_positions: most positions of a sequence.
    """

    def __init__(self, model: LanguageModel, num_positions: int) -> None:
        body, self._dtype = model.module.base_model, model.dtype
        self._embedding, self._norm_H = body.embed_tokens, body.norm.weight
        self._norm = _Norm(body.norm.variance_epsilon, model.device)
        self._layers = [_Layer(layer, self._norm, model.dtype) for layer in body.layers]
        self._head = _Product([model.head], model.dtype)
        positions_1S = torch.arange(num_positions, device=model.device).unsqueeze(0)
        cos_SD, sin_SD = (x_1SD[0] for x_1SD in body.rotary_emb(self._norm_H, positions_1S))
        half = cos_SD.shape[1] // 2
        self._rope_S2D = torch.stack([cos_SD, torch.cat([-sin_SD[:, :half], sin_SD[:, half:]], dim=1)], dim=1).float()

    def new_cache(self, sequences: int, positions: int) -> Tensor:
        """Room for the keys and values of every layer: cache_L2BKCD."""
        size = self._rope_S2D.shape[-1]
        shape = (len(self._layers), 2, sequences, self._layers[0].num_keys, positions, size)
        return torch.empty(shape, dtype=self._dtype, device=self._rope_S2D.device)

    def hidden_TH(self, ids_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Output of the last layer."""
        rope = self._rope_S2D.index_select(0, positions_T).unsqueeze(2).unbind(1)
        hidden_TH = self._embedding(ids_T)
        for number, layer in enumerate(self._layers):
            layer.add_attention(hidden_TH, attend(number, *layer.heads(hidden_TH, rope)))
            layer.add_mlp(hidden_TH)
        return hidden_TH

    def logits_TV(self, hidden_TH: Tensor) -> Tensor:
        return self._head((self._norm(hidden_TH) * self._norm_H).to(self._dtype))


class _Norm:
    """RMS norm without a weight, in float32. Torch's own takes ten small operations on a CPU."""

    def __init__(self, eps: float, device: torch.device) -> None:
        self._eps = torch.tensor(eps, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x * torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()


class _Product:
    """Linear layers that read the same input, as one product in the precision of the computation.

    Args:
        norm_H: weight of the norm before them, which is multiplied into theirs.
    """

    def __init__(self, modules: list[nn.Linear], dtype: torch.dtype, norm_H: Tensor | None = None) -> None:
        merged = (merged_weight(module) for module in modules)
        weights = (weight if norm_H is None else weight * norm_H for weight in merged)
        self._weight = _joined([weight.to(dtype) for weight in weights])
        self._bias = _joined([m.bias.to(dtype) for m in modules]) if modules[0].bias is not None else None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Layer:
    def __init__(self, layer: Any, norm: _Norm, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._qkv = _Product(projections, dtype, layer.input_layernorm.weight)
        self._out = _Product([attention.o_proj], dtype)
        self._gate_up = _Product([mlp.gate_proj, mlp.up_proj], dtype, layer.post_attention_layernorm.weight)
        self._down, self._activation = _Product([mlp.down_proj], dtype), mlp.act_fn
        self._norm, self._dtype, self._size = norm, dtype, attention.head_dim
        heads = [module.out_features // self._size for module in projections[:2]]
        self._num_queries, self.num_keys = heads
        self._norms_heads = hasattr(attention, "q_norm")
        self._factor_ND = torch.ones(sum(heads), self._size, device=attention.q_proj.weight.device)  # of both
        if self._norms_heads:
            norms = zip((attention.q_norm, attention.k_norm), heads, strict=True)
            self._factor_ND = torch.cat([norm.weight.expand(n, -1) for norm, n in norms]).float()
        self._factor_ND[: heads[0]] *= attention.scaling

    def heads(self, hidden_TH: Tensor, rope_T1D: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries_TKGD, keys_TKD, values_TKD."""
        tokens, rotated = len(hidden_TH), self._num_queries + self.num_keys
        all_TND = self._qkv(self._norm(hidden_TH).to(self._dtype)).view(tokens, -1, self._size)
        rotated_TND = self._rotated(all_TND[:, :rotated], rope_T1D).to(self._dtype)
        queries_TKGD = rotated_TND[:, : self._num_queries].view(tokens, self.num_keys, -1, self._size)
        return queries_TKGD, rotated_TND[:, self._num_queries :], all_TND[:, rotated:]

    def add_attention(self, hidden_TH: Tensor, attended_TKGD: Tensor) -> None:
        hidden_TH += self._out(attended_TKGD.flatten(1))

    def add_mlp(self, hidden_TH: Tensor) -> None:
        gate, up = self._gate_up(self._norm(hidden_TH).to(self._dtype)).chunk(2, dim=-1)
        hidden_TH += self._down(self._activation(gate).mul_(up))

    def _rotated(self, x_TND: Tensor, rope_T1D: Sequence[Tensor]) -> Tensor:
        """Query and key heads after the head norm, if the model has one, and the rotary embedding."""
        cos_T1D, sin_T1D = rope_T1D
        x_TND = (self._norm(x_TND) if self._norms_heads else x_TND) * self._factor_ND
        return (x_TND * cos_T1D).addcmul_(x_TND.roll(self._size // 2, -1), sin_T1D)
