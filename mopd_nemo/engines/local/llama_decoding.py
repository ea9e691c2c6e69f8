"""Decoding for models built like Llama: their own layers, without what small models spend on everything around them.

At every position the forward of transformers copies the whole cache, once to append to it and once more to give each
query head its keys. Here keys and values are written in place, and the heads of a group share theirs.

Shape suffixes: L layers, U distinct prompts, B sequences being decoded, P prompt positions, S positions, C positions
that the cache has room for, K key-value heads, G query heads that share one, N heads of both, D head size, H hidden
size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm

from mopd_nemo.engines.local.model import LanguageModel

LIKE_LLAMA = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
ROPES = {"default", "linear", "llama3", "yarn"}
"""Rotations that depend on the position alone, not on how long the sequence has become."""
GROWTH = 128
"""Positions for which the cache makes room at once, at least."""


def is_like_llama(module: Any) -> bool:
    """Whether `LlamaDecoder` does what the model's own forward does. Tests compare them for every class listed."""
    if type(module).__name__ not in LIKE_LLAMA:
        return False
    matrices = [type(m) for m in module.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    return (
        getattr(module.config, "sliding_window", None) is None
        and module.config.rope_parameters["rope_type"] in ROPES
        and len(matrices) == 2 + 7 * len(module.base_model.layers)  # as they were made: no adapters
        and set(matrices) == {nn.Linear, nn.Embedding}  # not quantised
    )


class LlamaDecoder:
    """See `decoding.Decoder` for its methods, `decoding.read_prompts` for `num_samples` and `max_tokens`.

    Args:
        cache: of the model's own forward over the prompts.
        mask_UP: of the prompts; padding stands on the left.
    """

    def __init__(self, model: LanguageModel, cache: Any, mask_UP: Tensor, num_samples: int, max_tokens: int) -> None:
        body, self._dtype = model.module.base_model, model.dtype
        self._embedding, self._norm_H, self._eps = body.embed_tokens, body.norm.weight, body.norm.variance_epsilon
        self._layers = [_Layer(layer, model.dtype) for layer in body.layers]
        self._head = _Matrix([model.head], model.dtype)
        self._length = mask_UP.shape[1]
        self._limit = self._length + max_tokens
        positions_1S = torch.arange(self._limit, device=model.device).unsqueeze(0)
        cos_SD, sin_SD = (x_1SD[0] for x_1SD in body.rotary_emb(self._norm_H, positions_1S))
        half = cos_SD.shape[1] // 2
        self._rope_2S1D = torch.stack([cos_SD, torch.cat([-sin_SD[:, :half], sin_SD[:, half:]], dim=1)]).unsqueeze(2)
        self._positions_B = mask_UP.sum(-1).repeat_interleave(num_samples)
        self._penalty_BS: Tensor | None = None  # -inf at padding
        if not mask_UP.all():
            penalty_UP = torch.zeros(mask_UP.shape, device=model.device).masked_fill_(mask_UP == 0, float("-inf"))
            self._penalty_BS = pad(penalty_UP, (0, max_tokens)).repeat_interleave(num_samples, dim=0)
        prompts_2UKPD = [torch.stack([layer.keys, layer.values]) for layer in cache.layers]
        self._cache_L2BKCD = self._room(prompts_2UKPD[0][0], len(mask_UP) * num_samples)
        for cache_2BKCD, prompt_2UKPD in zip(self._cache_L2BKCD, prompts_2UKPD, strict=True):
            each = cache_2BKCD.unflatten(1, (len(mask_UP), num_samples))[..., : self._length, :]
            each.copy_(prompt_2UKPD.unsqueeze(2).expand_as(each))

    def step(self, tokens_B: Tensor) -> Tensor:
        rows = len(tokens_B)
        if self._length == self._cache_L2BKCD.shape[4]:
            full_L2BKSD = self._cache_L2BKCD[:, :, :rows]
            self._cache_L2BKCD = self._room(full_L2BKSD[0, 0], rows)
            self._cache_L2BKCD[..., : self._length, :] = full_L2BKSD
        self._length += 1
        seen_L2BKSD = self._cache_L2BKCD[:, :, :rows, :, : self._length]
        penalty_B11S = None if self._penalty_BS is None else self._penalty_BS[:, None, None, : self._length]
        rope_2B1D = self._rope_2S1D[:, self._positions_B]
        self._positions_B = self._positions_B + 1
        hidden_BH = self._embedding(tokens_B)
        for layer, seen_2BKSD in zip(self._layers, seen_L2BKSD.unbind(0), strict=True):
            layer.add_to(hidden_BH, rope_2B1D, seen_2BKSD, penalty_B11S)
        return self._head(rms_norm(hidden_BH, self._norm_H.shape, self._norm_H, self._eps).to(self._dtype))

    def keep(self, order_B: Tensor) -> None:
        moved = (order_B != torch.arange(len(order_B), device=order_B.device)).nonzero().squeeze(-1)
        if len(moved):
            written_L2BKSD = self._cache_L2BKCD[..., : self._length, :]
            written_L2BKSD[:, :, moved] = written_L2BKSD[:, :, order_B[moved]]
        self._positions_B = self._positions_B[order_B]
        if self._penalty_BS is not None:
            self._penalty_BS = self._penalty_BS[order_B]

    def _room(self, like_BKSD: Tensor, rows: int) -> Tensor:
        _, heads, length, size = like_BKSD.shape
        room = min(length + max(length, GROWTH), self._limit)
        return torch.empty(len(self._layers), 2, rows, heads, room, size, dtype=self._dtype, device=like_BKSD.device)


class _Matrix:
    """Linear layers that read the same input, as one product in the precision of the computation."""

    def __init__(self, modules: list[nn.Linear], dtype: torch.dtype) -> None:
        self._weight = _joined([module.weight for module in modules], dtype)
        self._bias = _joined([module.bias for module in modules], dtype) if modules[0].bias is not None else None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)


def _joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.to(dtype) for part in parts]) if len(parts) > 1 else parts[0].to(dtype)


class _Layer:
    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._qkv = _Matrix([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self._out = _Matrix([attention.o_proj], dtype)
        self._gate_up, self._down = _Matrix([mlp.gate_proj, mlp.up_proj], dtype), _Matrix([mlp.down_proj], dtype)
        self._activation = mlp.act_fn
        self._norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self._eps = layer.input_layernorm.variance_epsilon
        self._dtype, self._size, self._scale = dtype, attention.head_dim, attention.scaling
        heads = [module.out_features // self._size for module in (attention.q_proj, attention.k_proj)]
        self._heads = heads[0], sum(heads)
        self._head_norm_ND: Tensor | None = None  # of query and key heads
        if hasattr(attention, "q_norm"):
            norms = [
                norm.weight.expand(n, -1) for norm, n in zip((attention.q_norm, attention.k_norm), heads, strict=True)
            ]
            self._head_norm_ND = torch.cat(norms)

    def add_to(self, hidden_BH: Tensor, rope_2B1D: Tensor, seen_2BKSD: Tensor, penalty_B11S: Tensor | None) -> None:
        """Add what the layer computes to the residual stream; fill the last position of what is seen."""
        keys_BKSD, values_BKSD = seen_2BKSD.unbind(0)
        rows, num_keys = keys_BKSD.shape[:2]
        num_queries, num_rotated = self._heads
        all_BND = self._qkv(self._normed(hidden_BH, 0)).view(rows, -1, self._size)
        rotated_BND = self._rotated(all_BND[:, :num_rotated], rope_2B1D)
        keys_BKSD[:, :, -1] = rotated_BND[:, num_queries:]
        values_BKSD[:, :, -1] = all_BND[:, num_rotated:]
        queries_BKGD = (rotated_BND[:, :num_queries] * self._scale).to(self._dtype).view(rows, num_keys, -1, self._size)
        scores_BKGS = queries_BKGD @ keys_BKSD.mT
        if penalty_B11S is not None:
            scores_BKGS += penalty_B11S
        weights_BKGS = scores_BKGS.softmax(-1, dtype=torch.float32).to(self._dtype)
        hidden_BH += self._out((weights_BKGS @ values_BKSD).view(rows, -1))
        gate, up = self._gate_up(self._normed(hidden_BH, 1)).chunk(2, dim=-1)
        hidden_BH += self._down(self._activation(gate).mul_(up))

    def _normed(self, hidden_BH: Tensor, which: int) -> Tensor:
        weight_H = self._norms[which]
        return rms_norm(hidden_BH, weight_H.shape, weight_H, self._eps).to(self._dtype)

    def _rotated(self, x_BND: Tensor, rope_2B1D: Tensor) -> Tensor:
        """Query and key heads, normed where the model does; half of each head turns against the other half."""
        x_BND = x_BND.to(rope_2B1D.dtype)
        if self._head_norm_ND is not None:
            x_BND = rms_norm(x_BND, (self._size,), eps=self._eps).mul_(self._head_norm_ND)
        return (x_BND * rope_2B1D[0]).addcmul_(x_BND.roll(self._size // 2, -1), rope_2B1D[1])
