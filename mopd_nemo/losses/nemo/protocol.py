"""What all loss objects share: their NeMo-RL types, weights of tokens, the parallel groups of Megatron.

Shape suffixes: B sequences, S positions, T response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Data = Mapping[str, Any]
"""A `BatchedDataDict` of a micro-batch: `input_ids`, `token_mask` [B, S], `sample_mask` [B], and what a loss needs."""

NemoAggregation = Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True, slots=True)
class Groups:
    """Process groups that hold the rest of the vocabulary and of the sequences; None where there is no other rank."""

    tensor: dist.ProcessGroup | None = None
    context: dist.ProcessGroup | None = None


def megatron_groups() -> Groups:
    """Megatron's groups of this process. Called in the worker: groups cannot be pickled."""
    from megatron.core import parallel_state

    tensor = parallel_state.get_tensor_model_parallel_group()
    context = parallel_state.get_context_parallel_group()
    return Groups(tensor if tensor.size() > 1 else None, context if context.size() > 1 else None)


GroupsOf = Callable[[], Groups]


class NemoLoss:
    """Base of the losses: which input NeMo-RL prepares, and at which level the loss is normalised."""

    _input: str
    _level: str = "TOKEN_LEVEL"

    @property
    def input_type(self) -> Any:
        """NeMo-RL's own enum member, which it compares by identity."""
        from nemo_rl.algorithms.loss.interfaces import LossInputType

        return LossInputType[self._input]

    @property
    def loss_type(self) -> Any:
        """NeMo-RL's own enum member."""
        from nemo_rl.algorithms.loss.interfaces import LossType

        return LossType[self._level]


def token_weights_of(
    data: Data, aggregation: NemoAggregation, global_valid_seqs: Tensor, global_valid_toks: Tensor
) -> Tensor:
    """weights_BS of each token in the loss of the step; 0 for what is no response or no sample.

    `token_mean`: 1 / all valid tokens; `sequence_mean`: 1 / (all valid sequences · valid tokens of the sequence). The
    first token of a sequence is predicted by no row and has none.
    """
    mask_BS = data["token_mask"] * data["sample_mask"].unsqueeze(-1)
    mask_BS = torch.cat([torch.zeros_like(mask_BS[:, :1]), mask_BS[:, 1:]], dim=1).float()
    if aggregation == "token_mean":
        return mask_BS / torch.as_tensor(global_valid_toks).clamp(min=1).to(mask_BS.device)
    lengths_B1 = data["token_mask"][:, 1:].sum(-1, keepdim=True).clamp(min=1)
    return mask_BS / lengths_B1 / torch.as_tensor(global_valid_seqs).clamp(min=1).to(mask_BS.device)


def metrics_of(
    loss: Tensor, data: Data, signals: dict[str, Tensor], global_valid_toks: Tensor, context: dist.ProcessGroup | None
) -> dict[str, float]:
    """`loss`, `num_valid_samples`, and signals as shares of their means: sums over micro-batches are the means.

    Args:
        signals: per token, of this rank's rows.
        context: where the rows of other ranks are; loss and signals are summed over it.
    """
    names = list(signals)
    total = torch.as_tensor(global_valid_toks).clamp(min=1).to(loss.device)
    values = torch.stack([loss.detach().float(), *(signals[name].sum().float() / total for name in names)])
    if context is not None:
        dist.all_reduce(values, group=context)
    found = dict(zip(["loss", *names], values.tolist(), strict=True))
    return {**found, "num_valid_samples": float(data["sample_mask"].sum())}
