"""The layers of models built like Llama, without what small models spend on everything around them.

Norms and products that read the same input are joined, and the heads of a group share their keys and values. Whoever
calls says what the tokens attend to.

Shape suffixes: T tokens, S positions, K key-value heads, G query heads that share one, N heads of both, D head size,
H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm

from mopd_nemo.engines.local.model import LanguageModel

LIKE_LLAMA = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
ROPES = {"default", "linear", "llama3", "yarn"}
"""Rotations that depend on the position alone, not on how long the sequence has become."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""From a layer's number, its scaled queries_TKGD, keys_TKD and values_TKD to what they attend to, of queries' size."""


def is_like_llama(module: Any) -> bool:
    """Whether `LlamaLayers` do what the model's own forward does. Tests compare them for every class listed."""
    if type(module).__name__ not in LIKE_LLAMA:
        return False
    matrices = [type(m) for m in module.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    return (
        getattr(module.config, "sliding_window", None) is None
        and module.config.rope_parameters["rope_type"] in ROPES
        and len(matrices) == 2 + 7 * len(module.base_model.layers)  # as they were made: no adapters
        and set(matrices) == {nn.Linear, nn.Embedding}  # not quantised
    )


class LlamaLayers:
    """A model's weights as they are now, in the precision of its computation.

    Args:
        num_positions: that are asked for at most.
    """

    def __init__(self, model: LanguageModel, num_positions: int) -> None:
        body, self._dtype = model.module.base_model, model.dtype
        self._embedding, self._norm_H, self._eps = body.embed_tokens, body.norm.weight, body.norm.variance_epsilon
        self._layers = [_Layer(layer, model.dtype) for layer in body.layers]
        self._head = _Matrix([model.head], model.dtype)
        positions_1S = torch.arange(num_positions, device=model.device).unsqueeze(0)
        cos_SD, sin_SD = (x_1SD[0] for x_1SD in body.rotary_emb(self._norm_H, positions_1S))
        half = cos_SD.shape[1] // 2
        self._rope_2S1D = torch.stack([cos_SD, torch.cat([-sin_SD[:, :half], sin_SD[:, half:]], dim=1)]).unsqueeze(2)
        self.cache_shape = len(self._layers), 2, self._layers[0].num_keys, cos_SD.shape[1]
        """Layers, two for keys and values, key-value heads, head size."""

    def hidden_TH(self, ids_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """What comes out of the last layer."""
        rope_2T1D = self._rope_2S1D[:, positions_T]
        hidden_TH = self._embedding(ids_T)
        for number, layer in enumerate(self._layers):
            layer.add_attention(hidden_TH, attend(number, *layer.heads(hidden_TH, rope_2T1D)))
            layer.add_mlp(hidden_TH)
        return hidden_TH

    def logits_TV(self, hidden_TH: Tensor) -> Tensor:
        return self._head(rms_norm(hidden_TH, self._norm_H.shape, self._norm_H, self._eps).to(self._dtype))


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
        self._num_queries, self.num_keys = heads
        self._head_norm_ND: Tensor | None = None  # of query and key heads
        if hasattr(attention, "q_norm"):
            norms = [
                norm.weight.expand(n, -1) for norm, n in zip((attention.q_norm, attention.k_norm), heads, strict=True)
            ]
            self._head_norm_ND = torch.cat(norms)

    def heads(self, hidden_TH: Tensor, rope_2T1D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries_TKGD, keys_TKD, values_TKD."""
        all_TND = self._qkv(self._normed(hidden_TH, 0)).view(len(hidden_TH), -1, self._size)
        rotated_TND = self._rotated(all_TND[:, : self._num_queries + self.num_keys], rope_2T1D)
        queries_TND = (rotated_TND[:, : self._num_queries] * self._scale).to(self._dtype)
        return (
            queries_TND.unflatten(1, (self.num_keys, -1)),
            rotated_TND[:, self._num_queries :],
            all_TND[:, self._num_queries + self.num_keys :],
        )

    def add_attention(self, hidden_TH: Tensor, attended_TKGD: Tensor) -> None:
        hidden_TH += self._out(attended_TKGD.flatten(1))

    def add_mlp(self, hidden_TH: Tensor) -> None:
        gate, up = self._gate_up(self._normed(hidden_TH, 1)).chunk(2, dim=-1)
        hidden_TH += self._down(self._activation(gate).mul_(up))

    def _normed(self, hidden_TH: Tensor, which: int) -> Tensor:
        weight_H = self._norms[which]
        return rms_norm(hidden_TH, weight_H.shape, weight_H, self._eps).to(self._dtype)

    def _rotated(self, x_TND: Tensor, rope_2T1D: Tensor) -> Tensor:
        """Query and key heads, normed where the model does; half of each head turns against the other half."""
        x_TND = x_TND.to(rope_2T1D.dtype)
        if self._head_norm_ND is not None:
            x_TND = rms_norm(x_TND, (self._size,), eps=self._eps).mul_(self._head_norm_ND)
        return (x_TND * rope_2T1D[0]).addcmul_(x_TND.roll(self._size // 2, -1), rope_2T1D[1])
