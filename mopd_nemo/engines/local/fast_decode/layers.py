"""The layers of models built like Llama, without the overhead that dominates small models.

Products that read the same input are one, and factors that only scale an input or an output are part of the weights.
The caller supplies the attention.

Shape suffixes: L layers, T tokens, B sequences, S positions, C positions that a cache has room for, K key-value heads,
G query heads that share one, N heads of both, D head size, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

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
        """What comes out of the last layer."""
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
        norm_H: weight of the norm that their input comes from, which becomes part of theirs.
    """

    def __init__(self, modules: list[nn.Linear], dtype: torch.dtype, norm_H: Tensor | None = None) -> None:
        weights = (module.weight if norm_H is None else module.weight * norm_H for module in modules)
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
        """Query and key heads, normed where the model does; half of each head turns against the other half."""
        cos_T1D, sin_T1D = rope_T1D
        x_TND = (self._norm(x_TND) if self._norms_heads else x_TND) * self._factor_ND
        return (x_TND * cos_T1D).addcmul_(x_TND.roll(self._size // 2, -1), sin_T1D)
