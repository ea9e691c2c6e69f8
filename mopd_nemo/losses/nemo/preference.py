"""DPO and SimPO on pairs that lie one after the other in a batch, as NeMo-RL's preference data does.

Shape suffixes: B sequences (chosen, rejected, chosen, ...), S positions, N pairs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mopd_nemo.losses.nemo.protocol import Data, NemoLoss, metrics_of
from mopd_nemo.losses.reference import dpo_loss, simpo_loss


class PreferenceLoss(NemoLoss):
    """Mean over pairs of DPO's or SimPO's loss, plus `sft_weight` times the chosen responses' mean -log P per token.

    From `data`, for DPO: `reference_policy_logprobs` [B, S], entry p about token p + 1, as NeMo-RL's DPO has them.

    Args:
        kind: `dpo` or `simpo`.
        beta: scale of the margin.
        gamma: target margin of SimPO.
    """

    _input = "LOGPROB"
    _level = "SEQUENCE_LEVEL"

    def __init__(
        self, kind: Literal["dpo", "simpo"], *, beta: float, gamma: float = 0.0, sft_weight: float = 0.0
    ) -> None:
        self._kind = kind
        self._beta = beta
        self._gamma = gamma
        self._sft_weight = sft_weight

    def __call__(
        self, data: Data, global_valid_seqs: Tensor, global_valid_toks: Tensor, *, next_token_logprobs: Tensor, **_: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss of a micro-batch of whole pairs: next_token_logprobs [B, S-1].

        Raises:
            ValueError: the batch has half a pair, as sequence packing would give.
        """
        if len(next_token_logprobs) % 2:
            raise ValueError(f"{len(next_token_logprobs)} sequences are no whole pairs: turn sequence packing off")
        mask_BS = data["token_mask"][:, 1:]
        lengths_B = mask_BS.sum(-1).clamp(min=1)
        sums_B = (next_token_logprobs * mask_BS).sum(-1)
        valid_N = data["sample_mask"][::2] * data["sample_mask"][1::2]
        pairs = torch.as_tensor(global_valid_seqs).clamp(min=1).to(sums_B.device) / 2
        if self._kind == "dpo":
            reference_B = (data["reference_policy_logprobs"][:, :-1] * mask_BS).sum(-1)
            loss_N = dpo_loss(sums_B[::2], sums_B[1::2], reference_B[::2], reference_B[1::2], self._beta)
            margin_N = (sums_B - reference_B)[::2] - (sums_B - reference_B)[1::2]
        else:
            loss_N = simpo_loss(sums_B[::2], sums_B[1::2], lengths_B[::2], lengths_B[1::2], self._beta, self._gamma)
            margin_N = (sums_B / lengths_B)[::2] - (sums_B / lengths_B)[1::2]
        loss_N = loss_N - self._sft_weight * (sums_B / lengths_B)[::2]
        loss = (loss_N * valid_N).sum() / pairs
        metrics = metrics_of(loss, data, {}, global_valid_toks, None)
        accuracy = ((margin_N > 0) * valid_N).sum() / pairs
        return loss, {**metrics, "accuracy": accuracy.item(), "num_valid_samples": float(valid_N.sum())}
