"""Decoding for models built like Llama: their own layers, without what small models spend on everything around them.

At every position the forward of transformers copies the whole cache, once to append to it and once more to give each
query head its keys. Here keys and values are written in place, and the heads of a group share theirs.

Shape suffixes: L layers, B sequences being decoded, C positions that the cache has room for, S positions it holds,
K key-value heads, Q query heads, G query heads that share one, D head size, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm

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


@dataclass(frozen=True, slots=True)
class _Matrix:
    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(module: nn.Linear, dtype: torch.dtype) -> _Matrix:
        return _Matrix(module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LlamaDecoder:
    """See `decoding.Decoder` for its methods, `decoding.read_prompts` for `num_samples` and `max_tokens`.

    Args:
        cache: of the model's own forward over the prompts.
        mask_BS: of the prompts; padding stands on the left.
    """

    def __init__(self, model: LanguageModel, cache: Any, mask_BS: Tensor, num_samples: int, max_tokens: int) -> None:
        body, dtype = model.module.base_model, model.dtype
        self._embedding, self._norm_H = body.embed_tokens.weight, body.norm.weight
        self._head = _Matrix.of(model.head, dtype)
        self._layers = [_Layer(layer, dtype, model.module.config.rms_norm_eps) for layer in body.layers]
        self._eps, self._dtype = model.module.config.rms_norm_eps, dtype
        self._length = mask_BS.shape[1]
        self._limit = self._length + max_tokens
        cos_SD, sin_SD = (
            x[0] for x in body.rotary_emb(self._norm_H, torch.arange(self._limit, device=model.device).unsqueeze(0))
        )
        half = cos_SD.shape[1] // 2
        self._cos_SD, self._sin_SD = cos_SD, torch.cat([-sin_SD[:, :half], sin_SD[:, half:]], dim=1)
        mask_BS = mask_BS.repeat_interleave(num_samples, dim=0)
        self._positions_B = mask_BS.sum(-1)
        self._penalty_BC: Tensor | None = None  # -inf at padding
        if not mask_BS.all():
            self._penalty_BC = torch.zeros(len(mask_BS), self._limit, device=model.device)
            self._penalty_BC[:, : self._length].masked_fill_(mask_BS == 0, float("-inf"))
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        self._cache_L2BKCD = self._room(pairs[0][0].repeat_interleave(num_samples, dim=0), len(pairs))
        for pair_2BKCD, pair in zip(self._cache_L2BKCD, pairs, strict=True):
            for x_BKCD, prompt in zip(pair_2BKCD, pair, strict=True):
                x_BKCD[:, :, : self._length] = prompt.repeat_interleave(num_samples, dim=0)

    def step(self, tokens_B: Tensor) -> Tensor:
        rows = len(tokens_B)
        if self._length == self._cache_L2BKCD.shape[4]:
            full_L2BKCD = self._cache_L2BKCD[:, :, :rows]
            self._cache_L2BKCD = self._room(full_L2BKCD[0, 0], len(self._layers))
            self._cache_L2BKCD[..., : self._length, :] = full_L2BKCD
        self._length += 1
        seen_L2BKSD = self._cache_L2BKCD[:, :, :rows, :, : self._length]
        penalty_B11S = None if self._penalty_BC is None else self._penalty_BC[:, None, None, : self._length]
        rope = self._cos_SD[self._positions_B].unsqueeze(1), self._sin_SD[self._positions_B].unsqueeze(1)
        self._positions_B = self._positions_B + 1
        hidden_BH = self._embedding[tokens_B]
        for layer, seen_2BKSD in zip(self._layers, seen_L2BKSD.unbind(0), strict=True):
            layer.forward(hidden_BH, rope, seen_2BKSD, penalty_B11S)
        return self._head(rms_norm(hidden_BH, self._norm_H.shape, self._norm_H, self._eps).to(self._dtype))

    def keep(self, order_B: Tensor) -> None:
        moved = (order_B != torch.arange(len(order_B), device=order_B.device)).nonzero().squeeze(-1)
        if len(moved):
            written = self._cache_L2BKCD[..., : self._length, :]
            written[:, :, moved] = written[:, :, order_B[moved]]
        self._positions_B = self._positions_B[order_B]
        if self._penalty_BC is not None:
            self._penalty_BC = self._penalty_BC[order_B]

    def _room(self, like_BKSD: Tensor, num_layers: int) -> Tensor:
        rows, heads, length, size = like_BKSD.shape
        room = min(length + max(length, GROWTH), self._limit)
        return torch.empty(num_layers, 2, rows, heads, room, size, dtype=self._dtype, device=like_BKSD.device)


class _Layer:
    """One layer's weights, in the precision of the computation but for the norms'."""

    def __init__(self, layer: Any, dtype: torch.dtype, eps: float) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.q, self.k, self.v, self.o = (
            _Matrix.of(m, dtype) for m in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        self.gate, self.up, self.down = (_Matrix.of(m, dtype) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.activation = mlp.act_fn
        self.before_attention, self.before_mlp = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.q_norm, self.k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self.size, self.scale = attention.head_dim, attention.scaling
        self.dtype, self.eps = dtype, eps

    def forward(
        self, hidden_BH: Tensor, rope: tuple[Tensor, Tensor], seen_2BKSD: Tensor, penalty_B11S: Tensor | None
    ) -> None:
        """Add what the layer adds to the residual stream; write the last position of the cache."""
        x_BH = self._normed(hidden_BH, self.before_attention)
        q_BQD, k_BKD = self._rotated(self.q(x_BH), self.q_norm, rope), self._rotated(self.k(x_BH), self.k_norm, rope)
        keys_BKSD, values_BKSD = seen_2BKSD.unbind(0)
        keys_BKSD[:, :, -1] = k_BKD
        values_BKSD[:, :, -1] = self.v(x_BH).view(k_BKD.shape)
        rows, heads = k_BKD.shape[:2]
        scores = (q_BQD * self.scale).to(self.dtype).view(rows, heads, -1, self.size) @ keys_BKSD.mT
        if penalty_B11S is not None:
            scores = scores + penalty_B11S
        weights_BKGS = scores.softmax(-1, dtype=torch.float32).to(self.dtype)
        hidden_BH += self.o((weights_BKGS @ values_BKSD).view(rows, -1))
        x_BH = self._normed(hidden_BH, self.before_mlp)
        hidden_BH += self.down(self.activation(self.gate(x_BH)) * self.up(x_BH))

    def _normed(self, x_BH: Tensor, weight_H: Tensor) -> Tensor:
        return rms_norm(x_BH, weight_H.shape, weight_H, self.eps).to(self.dtype)

    def _rotated(self, x: Tensor, norm: Any, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Heads of one vector per sequence, normed where the model does, rotated."""
        x_BND = x.view(len(x), -1, self.size).to(rope[0].dtype)
        if norm is not None:
            x_BND = rms_norm(x_BND, norm.weight.shape, norm.weight, self.eps)
        return (x_BND * rope[0]).addcmul_(x_BND.roll(self.size // 2, -1), rope[1])
