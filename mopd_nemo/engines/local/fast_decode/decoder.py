"""Decoding for models built like Llama, with their layers alone.

At every position the forward of transformers copies the whole cache, once to append to it and once more to give each
query head its keys. Here keys and values are written in place, and a prompt's are kept once for all its sequences.

Shape suffixes: L layers, U distinct prompts, B sequences being decoded, T tokens, P prompt positions, C positions that
the cache has room for, S those written (the first stands for the prompt), K key-value heads, G query heads that share
one, N query heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from mopd_nemo.engines.local.batching import move_rows
from mopd_nemo.engines.local.fast_decode.layers import LlamaLayers
from mopd_nemo.engines.local.fast_decode.prompts import SharedPrompts
from mopd_nemo.engines.local.model import LanguageModel

GROWTH = 128
"""Positions for which the cache makes room at once, at least."""


def read_prompts(
    model: LanguageModel, prompts: Sequence[Sequence[int]], num_samples: int, max_tokens: int
) -> tuple[Tensor, LlamaDecoder]:
    """See `decoding.read_prompts`."""
    device, lengths_U = model.device, torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    # Padding comes last, so causality alone keeps it out.
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
    """See `decoding.Decoder` for its methods.

    Args:
        positions_B: of the first tokens that the sequences will get.
        max_tokens: how many they can get.
    """

    def __init__(self, layers: LlamaLayers, prompts: SharedPrompts, positions_B: Tensor, max_tokens: int) -> None:
        self._layers, self._prompts, self._positions_B = layers, prompts, positions_B
        self._limit, self._length = 1 + max_tokens, 1  # the first place of the cache stands for the prompt
        self._cache_L2BKCD = layers.new_cache(len(positions_B), min(GROWTH, self._limit))
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
        """One softmax over prompt and response: the prompt is one more position, whose score is the prompt's mass."""
        keys_BKSD, values_BKSD = self._seen_L2BKSD[layer].unbind(0)
        keys_BKSD[:, :, -1], values_BKSD[:, :, -1] = keys_BKD, values_BKD
        prompt_BKGD, mass_BKG = self._prompts.attend(layer, queries_BKGD)
        scores_BKGS = (queries_BKGD @ keys_BKSD.mT).float()
        scores_BKGS[..., 0] = mass_BKG
        weights_BKGS = scores_BKGS.softmax(-1).to(queries_BKGD.dtype)
        return (weights_BKGS @ values_BKSD).addcmul_(weights_BKGS[..., :1], prompt_BKGD)

    def _grow(self, rows: int) -> None:
        written_L2BKSD = self._cache_L2BKCD[:, :, :rows]
        self._cache_L2BKCD = self._layers.new_cache(rows, min(self._length + max(self._length, GROWTH), self._limit))
        self._cache_L2BKCD[..., : self._length, :] = written_L2BKSD
