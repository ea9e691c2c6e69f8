"""Decoding of a batch of sequences, position by position, after their prompts were read once.

Shape suffixes: B sequences being decoded, R rows of the model's cache, U distinct prompts, P prompt positions,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mopd_nemo.engines.local.batching import left_padded, positions_of
from mopd_nemo.engines.local.fast_decode import decoder as fast_decoder
from mopd_nemo.engines.local.fast_decode.layers import is_like_llama
from mopd_nemo.engines.local.model import LanguageModel

COMPACT_BELOW = 0.75
"""Finished sequences leave a model's own cache, which is a copy of all the others, below this fraction of its rows."""


class Decoder(Protocol):
    """A batch of sequences and what the model remembers of them."""

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append a token to each sequence; returns logits_BV of the next."""
        ...

    def keep(self, order_B: Tensor) -> None:
        """Go on with these sequences alone. Position i becomes sequence `order_B[i]`, itself wherever it stays."""
        ...


def read_prompts(
    model: LanguageModel, prompts: Sequence[tuple[int, ...]], num_samples: int, max_tokens: int
) -> tuple[Tensor, Decoder]:
    """Read each prompt once, for `num_samples` sequences each, prompt by prompt.

    Args:
        max_tokens: how many tokens a sequence can get.

    Returns:
        logits_BV of the first token, and what decodes the others.
    """
    if is_like_llama(model.module):
        return fast_decoder.read_prompts(model, prompts, num_samples, max_tokens)
    mask_UP, ids_UP = left_padded(prompts, model.device)
    output = model.module(
        input_ids=ids_UP,
        attention_mask=mask_UP,
        position_ids=positions_of(mask_UP),
        use_cache=True,
        logits_to_keep=1,
    )
    decoder = ModuleDecoder(model, output.past_key_values, mask_UP, num_samples)
    return output.logits[:, -1].repeat_interleave(num_samples, dim=0), decoder


class ModuleDecoder:
    """Calls the model's own forward.

    Args:
        cache_UP: of the model's forward over the prompts.
        mask_UP: of the prompts; padding stands on the left.
    """

    def __init__(self, model: LanguageModel, cache_UP: Any, mask_UP: Tensor, num_samples: int) -> None:
        self._module = model.module
        self._cache_RP = cache_UP
        self._cache_RP.batch_repeat_interleave(num_samples)
        self._mask_RP = mask_UP.repeat_interleave(num_samples, dim=0)
        self._positions_R = self._mask_RP.sum(-1)
        self._rows_B = torch.arange(len(self._mask_RP), device=model.device)

    def step(self, tokens_B: Tensor) -> Tensor:
        rows = len(self._mask_RP)
        tokens_R = tokens_B.new_zeros(rows).index_copy_(0, self._rows_B, tokens_B)
        self._mask_RP = torch.cat([self._mask_RP, self._mask_RP.new_ones(rows, 1)], dim=1)
        logits_RV = self._module(
            input_ids=tokens_R.unsqueeze(1),
            attention_mask=self._mask_RP,
            position_ids=self._positions_R.unsqueeze(1),
            past_key_values=self._cache_RP,
            use_cache=True,
        ).logits[:, -1]
        self._positions_R = self._positions_R + 1
        return logits_RV if len(self._rows_B) == rows else logits_RV[self._rows_B]

    def keep(self, order_B: Tensor) -> None:
        self._rows_B = self._rows_B[order_B]
        if len(self._rows_B) < COMPACT_BELOW * len(self._mask_RP):
            self._cache_RP.batch_select_indices(self._rows_B)
            self._mask_RP, self._positions_R = self._mask_RP[self._rows_B], self._positions_R[self._rows_B]
            self._rows_B = torch.arange(len(self._rows_B), device=self._rows_B.device)
