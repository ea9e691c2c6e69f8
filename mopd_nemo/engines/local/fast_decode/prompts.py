"""Keys and values of prompts, kept once however many sequences continue them.

The queries of all sequences of a prompt meet its keys in one product. Sequences end at different times, so the queries
are laid out in as many slots for each prompt as the one with the most running sequences needs; the others repeat some
sequence's queries in the slots that they do not need; those slots' results are discarded.

Shape suffixes: L layers, U prompts that still have running sequences, B running sequences, M slots of a prompt,
P prompt positions, K key-value heads, G query heads that share one, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mopd_nemo.engines.local.batching import compact_order, move_rows


class SharedPrompts:
    """Keys and values of prompts, and the attention of their samples' queries to them.

    Args:
        cache_L2UKPD: keys and values. Padding stands on the right and is finite.
        lengths_U: without padding.
        num_samples: sequences of each prompt, which come prompt by prompt.
    """

    def __init__(self, cache_L2UKPD: Tensor, lengths_U: Tensor, num_samples: int) -> None:
        device, (_, _, prompts, _, width, _) = cache_L2UKPD.device, cache_L2UKPD.shape
        padding_UP = torch.arange(width, device=device) >= lengths_U.unsqueeze(1)
        self._cache_L2UKPD = cache_L2UKPD
        self._penalty_UP = cache_L2UKPD.new_zeros(prompts, width).masked_fill_(padding_UP, float("-inf"))
        self._prompts_B = torch.arange(prompts, device=device).repeat_interleave(num_samples)
        self._lay_out()

    def attend(self, layer: int, queries_BKGD: Tensor) -> tuple[Tensor, Tensor]:
        """What each query attends to in its own prompt alone, and the logarithm of its scores' exponentials' sum.

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
        """See `decoding.Decoder.keep`. Prompts without running sequences leave too."""
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
        """Which sequence's queries each slot takes, and where each sequence finds what comes of them."""
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
