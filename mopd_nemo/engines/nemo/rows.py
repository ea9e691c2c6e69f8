"""Which rows of a Megatron micro-batch predict response tokens, and an output layer that computes only those.

Response token t of a sequence with P prompt tokens is predicted at its position P - 1 + t. Micro-batches come padded
([B, S], one sequence a row) or packed (sequences end to end, each padded to a multiple), and packed ones may be cut
over C context-parallel ranks in Megatron's zigzag: a sequence of 2·C chunks gives rank r its chunks r and 2·C - 1 - r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

Scores = dict[str, Tensor]
"""`ids` [T, k] int32 and `logprobs` [T, k], T response tokens sequence by sequence in order."""


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
    """Which of the T rows each is."""
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
        starts: where each sequence begins in the uncut packed row, and where the last one ends, padding included.
    """
    local, numbers, total = [], [], 0
    for number, (prompt, length) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        position_T = torch.arange(prompt - 1, length - 1)
        number_T = torch.arange(total, total + len(position_T))
        total += len(position_T)
        if cp_size > 1:
            chunk = (starts[number + 1] - starts[number]) // (2 * cp_size)
            own_T = position_T // chunk
            first_T, second_T = own_T == cp_rank, own_T == 2 * cp_size - 1 - cp_rank
            shifted_T = torch.where(first_T, position_T - cp_rank * chunk, position_T - (own_T - 1) * chunk)
            position_T, number_T = shifted_T[first_T | second_T], number_T[first_T | second_T]
        local.append(position_T + starts[number] // cp_size)
        numbers.append(number_T)
    position_R = torch.cat(local)
    return LocalRows(position_R, torch.zeros_like(position_R), torch.cat(numbers), total)


class ResponseHead:
    """While entered, a Megatron output layer is applied to `rows` alone and answers [R, 1, V].

    Under sequence parallelism the layer gathers its input itself, after which rows can no longer be chosen; so the
    gather is done here, before, and the layer's own is switched off.

    Args:
        output_layer: a `ColumnParallelLinear`, or None on a pipeline stage that has none.
    """

    rows: LocalRows

    def __init__(self, output_layer: Any | None) -> None:
        self._layer = output_layer

    def __enter__(self) -> Self:
        if self._layer is not None:
            self._gather = self._layer.sequence_parallel
            self._layer.sequence_parallel = False
            self._hook = self._layer.register_forward_pre_hook(self._select)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._layer is not None:
            self._hook.remove()
            self._layer.sequence_parallel = self._gather

    def _select(self, _layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_SBH, *others = inputs
        if self._gather:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH)
        device = hidden_SBH.device
        hidden_RH = hidden_SBH[self.rows.position_R.to(device), self.rows.sequence_R.to(device)]
        return (hidden_RH.unsqueeze(1), *others)
