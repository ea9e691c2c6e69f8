"""The rows of a Megatron micro-batch that predict response tokens, and an output layer that computes only those.

Response token t of a sequence with P prompt tokens is predicted at its position P - 1 + t. Micro-batches come padded
([B, S], one sequence a row) or packed (sequences end to end, each padded to a multiple). Under context parallelism
Megatron splits a sequence into 2·C equal pieces, and rank r of C holds pieces r and 2·C - 1 - r in this order.

Shape suffixes: B sequences, S positions, L positions on this rank, R response rows on this rank, T of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LocalRows:
    """The response rows of a micro-batch that this rank computes.

    R rows of this rank, T rows of the whole micro-batch: sequence by sequence, in order of position.
    """

    position_R: Tensor
    """Index into the sequence dimension of this rank's hidden states [S, B, H]."""
    sequence_R: Tensor
    """Index into the batch dimension; 0 when packed."""
    number_R: Tensor
    """Index of each among the T rows."""
    total: int
    """T."""


def padded_rows(prompt_lengths: Sequence[int], lengths: Sequence[int]) -> LocalRows:
    """Rows of a padded micro-batch."""
    positions, sequences = [], []
    for number, (prompt, length) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        positions.append(torch.arange(prompt - 1, length - 1))
        sequences.append(torch.full((length - prompt,), number))
    position_T = torch.cat(positions)
    return LocalRows(position_T, torch.cat(sequences), torch.arange(len(position_T)), len(position_T))


def packed_rows(
    prompt_lengths: Sequence[int], lengths: Sequence[int], starts: Sequence[int], cp_rank: int = 0, cp_size: int = 1
) -> LocalRows:
    """Rows of a packed micro-batch on one context-parallel rank.

    Args:
        starts: where each sequence begins in the whole packed row, and where the last one ends, padding included.
    """
    local, numbers, total = [], [], 0
    for number, (prompt, length) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        held_L = positions(starts[number + 1] - starts[number], cp_rank, cp_size)
        place_R = ((held_L >= prompt - 1) & (held_L < length - 1)).nonzero().squeeze(-1)
        local.append(place_R + starts[number] // cp_size)
        numbers.append(held_L[place_R] - (prompt - 1) + total)
        total += length - prompt
    position_R = torch.cat(local)
    return LocalRows(position_R, torch.zeros_like(position_R), torch.cat(numbers), total)


def positions(length: int, rank: int = 0, ranks: int = 1) -> Tensor:
    """positions_L: the positions that a rank holds of a sequence of `length`, in the rank's order.

    Raises:
        ValueError: the length is no multiple of 2·ranks.
    """
    if ranks == 1:
        return torch.arange(length)
    if length % (2 * ranks):
        raise ValueError(f"a sequence of {length} positions cannot be split over {ranks} ranks: pad to {2 * ranks}·n")
    pieces = torch.arange(length).chunk(2 * ranks)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])


def response_rows(is_response_BS: Tensor, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
    """The rows of response tokens in this rank's logits, and the tokens that they predict.

    Args:
        is_response_BS: True at tokens with a loss. A first token has no row and is left out.

    Returns:
        rows_T: indices into this rank's logits, flattened to [B·L, V].
        tokens_T: indices of the predicted tokens, into whole sequences flattened to [B·S].
    """
    _, length = is_response_BS.shape
    target_L = (positions(length, rank, ranks) + 1).to(is_response_BS.device)
    wanted_BL = is_response_BS[:, target_L.clamp(max=length - 1)].bool() & (target_L < length)
    sequence_T, row_T = wanted_BL.nonzero(as_tuple=True)
    return sequence_T * len(target_L) + row_T, sequence_T * length + target_L[row_T]


class ResponseHead:
    """Inside, a Megatron output layer is applied to `rows` alone and returns [R, 1, V].

    Under sequence parallelism the layer would gather its input itself, after which rows can no longer be chosen. So
    the gather is done here, and the layer's own is switched off.

    Args:
        output_layer: a `ColumnParallelLinear`, or None on a pipeline stage that has none.
        hidden: do not apply it, and return the rows of its input: [R, 1, H].
    """

    rows: LocalRows
    weight_VH: Tensor
    """What was not applied."""

    def __init__(self, output_layer: Any | None, hidden: bool = False) -> None:
        self._layer = output_layer
        self._hidden = hidden

    def __enter__(self) -> Self:
        if self._layer is not None:
            self._gather = self._layer.sequence_parallel
            self._layer.sequence_parallel = False
            self._hook = self._layer.register_forward_pre_hook(self._select)
            if self._hidden:
                self._layer.forward = self._keep
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._layer is not None:
            self._hook.remove()
            self._layer.sequence_parallel = self._gather
            if self._hidden:
                del self._layer.forward  # that of this object, not of its class

    def _select(self, _layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_SBH, *others = inputs
        if self._gather:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH)
        device = hidden_SBH.device
        hidden_RH = hidden_SBH[self.rows.position_R.to(device), self.rows.sequence_R.to(device)]
        return (hidden_RH.unsqueeze(1), *others)

    def _keep(self, hidden_R1H: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        assert self._layer is not None
        self.weight_VH = self._layer.weight if weight is None else weight  # the embedding's, where they are tied
        return hidden_R1H, None
