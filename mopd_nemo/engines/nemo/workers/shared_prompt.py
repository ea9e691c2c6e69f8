"""Many responses after one prompt as one packed row of a Megatron model, which reads the prompt once.

A packed row has groups one after the other: a prompt, then its responses end to end. Every layer except attention acts
on each token for itself, so two things are changed, both by hooks. Positions of each response go on from the end of the
prompt. And core attention gets sequences of queries and longer ones of keys: the first response of a group is one
sequence with its prompt; each other is a sequence of its own, whose keys are those of the prompt and its own. Queries
are the last of their keys, which is Transformer Engine's mask `padding_causal_bottom_right`. Attention in parts (tensor
parallelism, where heads are local, sequence and pipeline parallelism) needs nothing else.

Shape suffixes: S positions of a packed row, padding included, C keys, R response rows.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mopd_nemo.engines.nemo.prompts import PromptRows
from mopd_nemo.engines.nemo.workers.rows import LocalRows


class Mask(enum.Enum):
    """What Megatron's enumeration of masks lacks. Its layer for Transformer Engine hands the name on."""

    padding_causal_bottom_right = enum.auto()


@dataclass(frozen=True, slots=True)
class SharedRow:
    """A packed row, and how attention runs in it."""

    rows: tuple[int, ...]
    """The rows of the batch, in the order in which it has their responses."""
    ids_S: Tensor
    positions_S: Tensor
    keys_C: Tensor
    """Which of the S positions are keys, sequence by sequence."""
    query_ends: Tensor
    """Where sequences of queries begin and end, as of Megatron's `cu_seqlens`; the last is padding if there is any."""
    key_ends: Tensor
    responses: LocalRows
    """Where response tokens are predicted."""


def shared_row(groups: Sequence[PromptRows], ids_BS: Tensor, length: int) -> SharedRow:
    """The groups in one packed row of `length` positions.

    Args:
        ids_BS: the batch that the groups' rows are indices of.
    """
    ids, positions, keys, predicting = [], [], [], []
    queries, seen = [], []  # tokens of each sequence
    end = 0
    for group in groups:
        prompt = torch.arange(end, end + group.prompt)
        ids.append(ids_BS[group.rows[0], : group.prompt])
        positions.append(prompt - end)
        end += group.prompt
        for number, (row, size) in enumerate(zip(group.rows, group.responses, strict=True)):
            own = torch.arange(end, end + size)
            ids.append(ids_BS[row, group.prompt : group.prompt + size])
            positions.append(own - end + group.prompt)
            predicting.append(torch.cat([prompt[-1:], own])[:size])
            end += size
            if size or not number:
                keys += [prompt, own]
                queries.append(size if number else group.prompt + size)
                seen.append(group.prompt + size)
    padding = torch.arange(length - end)
    if len(padding):
        ids.append(torch.zeros_like(padding))
        positions.append(padding)
        keys.append(padding + end)
        queries.append(len(padding))
        seen.append(len(padding))
    position_R = torch.cat(predicting)
    count = len(position_R)
    return SharedRow(
        tuple(row for group in groups for row in group.rows),
        torch.cat(ids),
        torch.cat(positions),
        torch.cat(keys),
        _ends(queries),
        _ends(seen),
        LocalRows(position_R, torch.zeros_like(position_R), torch.arange(count), count),
    )


def _ends(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).int()


def cannot_share(model: Any) -> str | None:
    """Why rows of a model cannot share a prompt. None: they can.

    Args:
        model: a Megatron model, unwrapped.
    """
    positions = getattr(model, "position_embedding_type", None)
    if positions not in ("rope", "yarn"):
        return f"{type(model).__name__} has positions of type {positions}"
    if model.config.multi_latent_attention:
        return "multi-latent attention makes positions of its own"
    if not all(hasattr(getattr(layer, "self_attention", None), "core_attention") for layer in model.decoder.layers):
        return "not every layer is attention over all tokens before"
    return None


class PromptSharing:
    """Inside, a Megatron model reads its packed row as `row` says.

    Args:
        model: unwrapped. It is given `ids_S` as one sequence.
    """

    row: SharedRow

    def __init__(self, model: Any) -> None:
        self._decoder = model.decoder

    def __enter__(self) -> Self:
        self._hooks = [self._decoder.register_forward_pre_hook(self._place, with_kwargs=True)]
        for layer in self._decoder.layers:
            attention = layer.self_attention.core_attention
            self._hooks.append(attention.register_forward_pre_hook(self._branch, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _place(self, _decoder: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Give every token its position's rotary embedding."""
        rotary = named["rotary_pos_emb"]
        row, device = self.row, rotary.device
        self._keys_C = row.keys_C.to(device)
        query_ends, key_ends = row.query_ends.to(device), row.key_ends.to(device)
        self._sequences = replace(
            named["packed_seq_params"],
            cu_seqlens_q=query_ends,
            cu_seqlens_q_padded=query_ends,
            max_seqlen_q=int(row.query_ends.diff().max()),
            cu_seqlens_kv=key_ends,
            cu_seqlens_kv_padded=key_ends,
            max_seqlen_kv=int(row.key_ends.diff().max()),
        )
        return inputs, named | {"rotary_pos_emb": rotary[row.positions_S.to(device)]}

    def _branch(self, _attention: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Let every response see its prompt."""
        query, key, value, *others = inputs
        branches = {"attn_mask_type": Mask.padding_causal_bottom_right, "packed_seq_params": self._sequences}
        return (query, key[self._keys_C], value[self._keys_C], *others), named | branches
