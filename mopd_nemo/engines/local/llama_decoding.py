"""Decoding for models built like Llama, with their layers alone.

At every position the forward of transformers copies the whole cache, once to append to it and once more to give each
query head its keys. Here keys and values are written in place, and those of a prompt are kept once for all sequences.

Shape suffixes: L layers, U distinct prompts, B sequences being decoded, T tokens, P prompt positions, C positions that
the cache has room for, S those written, K key-value heads, G query heads that share one, N query heads, D head size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from mopd_nemo.engines.local.llama_layers import LlamaLayers
from mopd_nemo.engines.local.model import LanguageModel
from mopd_nemo.engines.local.shared_prompts import SharedPrompts, move

GROWTH = 128
"""Positions for which the cache makes room at once, at least."""


def read_prompts(
    model: LanguageModel, prompts: Sequence[Sequence[int]], num_samples: int, max_tokens: int
) -> tuple[Tensor, LlamaDecoder]:
    """See `decoding.read_prompts`."""
    lengths_U = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    # Padding comes last, so causality alone keeps it out.
    ids_UP = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(model.device)
    count, width = ids_UP.shape
    layers = LlamaLayers(model, width + max_tokens)
    num_layers, two, heads, size = layers.cache_shape
    cache_L2UKPD = torch.empty(
        num_layers, two, count, heads, width, size, dtype=model.dtype, device=model.device
    )

    def attend(layer: int, queries_TKGD: Tensor, keys_TKD: Tensor, values_TKD: Tensor) -> Tensor:
        cache_2UKPD = cache_L2UKPD[layer]
        for cache_UKPD, new_TKD in zip(cache_2UKPD, (keys_TKD, values_TKD), strict=True):
            cache_UKPD.copy_(new_TKD.unflatten(0, (count, width)).transpose(1, 2))
        queries_UNPD = queries_TKGD.flatten(1, 2).unflatten(0, (count, width)).transpose(1, 2)
        attended_UNPD = scaled_dot_product_attention(
            queries_UNPD, cache_2UKPD[0], cache_2UKPD[1], is_causal=True, scale=1.0, enable_gqa=True
        )
        return attended_UNPD.transpose(1, 2).flatten(0, 1)

    positions_T = torch.arange(width, device=model.device).repeat(count)
    hidden_TH = layers.hidden_TH(ids_UP.flatten(), positions_T, attend)
    last_U = torch.arange(count, device=model.device) * width + lengths_U - 1
    logits_UV = layers.logits_TV(hidden_TH[last_U])
    decoder = LlamaDecoder(layers, SharedPrompts(cache_L2UKPD, lengths_U, num_samples), lengths_U.repeat_interleave(num_samples), max_tokens, model.dtype)
    return logits_UV.repeat_interleave(num_samples, dim=0), decoder


class LlamaDecoder:
    """See `decoding.Decoder` for its methods."""

    def __init__(self, layers: LlamaLayers, prompts: SharedPrompts, positions_B: Tensor, max_tokens: int, dtype: torch.dtype) -> None:
        self._layers, self._prompts, self._positions_B = layers, prompts, positions_B
        self._limit = 1 + max_tokens
        num_layers, two, heads, size = layers.cache_shape
        self._length = 1  # The first position stands for the prompt
        self._cache_L2BKCD = torch.empty(num_layers, two, len(positions_B), heads, min(self._limit, GROWTH), size, dtype=dtype, device=positions_B.device)
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
        move(self._cache_L2BKCD[..., : self._length, :], order_B)
        self._positions_B = self._positions_B[order_B]
        self._prompts.keep(order_B)

    def _attend(self, layer: int, queries_BKGD: Tensor, keys_BKD: Tensor, values_BKD: Tensor) -> Tensor:
        """The prompt counts as one more position, whose score is the mass of its scores."""
        keys_BKSD, values_BKSD = self._seen_L2BKSD[layer].unbind(0)
        keys_BKSD[:, :, -1], values_BKSD[:, :, -1] = keys_BKD, values_BKD
        prompt_BKGD, mass_BKG = self._prompts.attend(layer, queries_BKGD)
        scores_BKGS = (queries_BKGD @ keys_BKSD.mT).float()
        scores_BKGS[..., 0] = mass_BKG
        weights_BKGS = scores_BKGS.softmax(-1).to(queries_BKGD.dtype)
        return (weights_BKGS @ values_BKSD).addcmul_(weights_BKGS[..., :1], prompt_BKGD)

    def _grow(self, rows: int) -> None:
        full_L2BKSD = self._cache_L2BKCD[:, :, :rows]
        room = min(self._length + max(self._length, GROWTH), self._limit)
        shape = list(full_L2BKSD.shape)
        shape[4] = room
        self._cache_L2BKCD = full_L2BKSD.new_empty(shape)
        self._cache_L2BKCD[..., : self._length, :] = full_L2BKSD
