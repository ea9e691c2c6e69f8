"""Batches as NeMo-RL shards, packs and sends them, and scores as it returns them.

Values of response tokens are one small array per row, not a block padded to the longest sequence. NeMo-RL's batches may
hold lists, which they split together with the rows. The lists hold NumPy arrays, because Ray passes an array without a
copy, and of a slice only the slice. A tensor it pickles, at a tenth of the speed, and of a view the whole storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd_nemo.losses.logits import TopK
from mopd_nemo.types import TrainExample

NO_ROW = -1
"""Key of a row whose targets no worker keeps."""

Scored = Mapping[str, np.ndarray]
"""`ids` and `logprobs` [response tokens, k] of all rows that a worker has scored; `counts` [2] of positions."""


def score_batch(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    candidates: Sequence[Tensor] | None,
    *,
    pad_id: int,
    length_multiple: int,
    filler: int = 0,
    keys: Sequence[int] | None = None,
) -> dict[str, Any]:
    """A batch for `score_responses`, and with keys for `keep_targets`.

    Args:
        sequences: (prompt, response) token ids.
        candidates: ids [response tokens, k] to score for each; None: the likeliest.
        filler: rows of one token to add at the end; NeMo-RL needs as many rows on every rank.
        keys: by which workers keep targets of the rows; `NO_ROW` for a row without.
    """
    rows = [*sequences, *([((pad_id,), (pad_id,))] * filler)]
    batch = _sequences(rows, pad_id, length_multiple)
    if candidates is not None:
        width = candidates[0].shape[-1]
        added = torch.arange(width, dtype=torch.int32).unsqueeze(0)
        batch["candidates"] = _sent([*(part.int() for part in candidates), *([added] * filler)])
    return batch | _keyed(keys, filler)


def train_batch(
    rows: Sequence[TrainExample],
    weights: Sequence[Tensor],
    targets: Sequence[TopK | None],
    old_logprobs: Sequence[Tensor] | None,
    *,
    pad_id: int,
    length_multiple: int,
    filler: int = 0,
    keys: Sequence[int] | None = None,
) -> dict[str, Any]:
    """A batch for `Policy.train` with `BatchLoss`.

    Args:
        weights: for each row [terms, response tokens].
        old_logprobs: for each row [response tokens]; None when ratios refer to the present policy.
        filler, keys: as in `score_batch`.
    """
    sequences = [(row.prompt_ids, row.response_ids) for row in rows]
    batch = _sequences([*sequences, *([((pad_id,), (pad_id,))] * filler)], pad_id, length_multiple)
    count = len(sequences) + filler
    positions_S = torch.arange(batch["input_ids"].shape[1])
    in_response_BS = (positions_S >= batch["prompt_lengths"][:, None]) & (positions_S < batch["input_lengths"][:, None])
    batch["token_mask"] = in_response_BS.float()
    batch["sample_mask"] = (torch.arange(count) < len(rows)).float()
    batch["advantages"] = torch.tensor([*(row.advantage for row in rows), *([0.0] * filler)])
    batch["weights"] = _sent([*weights, *([torch.zeros(weights[0].shape[0], 1)] * filler)])
    if all(row.sampled_logprobs for row in rows):
        sampler = [torch.tensor(row.sampled_logprobs) for row in rows]
        batch["sampler"] = _sent([*sampler, *([torch.zeros(1)] * filler)])
    if old_logprobs is not None:
        batch["old"] = _sent([*old_logprobs, *([torch.zeros(1)] * filler)])
    width = next((target.ids_TK.shape[-1] for target in targets if target is not None), None)
    if width is not None:
        untaught = [TopK(*_no_targets(len(row.response_ids), width)) for row in rows]
        filled = [target or placeholder for target, placeholder in zip(targets, untaught, strict=True)]
        filled += [TopK(*_no_targets(1, width))] * filler
        batch["teacher_ids"] = _sent([target.ids_TK for target in filled])
        batch["teacher_logprobs"] = _sent([target.logprobs_TK for target in filled])
    return batch | _keyed(keys, filler)


def _keyed(keys: Sequence[int] | None, filler: int) -> dict[str, Tensor]:
    return {} if keys is None else {"keys": torch.tensor([*keys, *([NO_ROW] * filler)])}


def joined(parts: Sequence[np.ndarray], axis: int = 0) -> Tensor:
    """The arrays of a micro-batch's rows in one tensor."""
    return torch.from_numpy(np.concatenate(parts, axis))


def split_scores(scores: Sequence[Scored], order: Sequence[int], response_lengths: Sequence[int]) -> list[TopK]:
    """Scores of all data-parallel ranks as targets of the rows, in the rows' order; see `split_rows`."""
    parts = split_rows([{name: part[name] for name in ("ids", "logprobs")} for part in scores], order, response_lengths)
    return [
        TopK(torch.from_numpy(ids), torch.from_numpy(logprobs))
        for ids, logprobs in zip(parts["ids"], parts["logprobs"], strict=True)
    ]


def split_rows(
    scores: Sequence[Scored], order: Sequence[int], response_lengths: Sequence[int]
) -> dict[str, list[np.ndarray]]:
    """What all data-parallel ranks say of their tokens, by name and row, in the rows' order.

    Args:
        scores: by rank.
        order: index of each scored sequence, rank by rank; indices from `len(response_lengths)` on are filler.
        response_lengths: of the rows; a filler row has one token.
    """
    count = len(response_lengths)
    ends = np.cumsum([response_lengths[number] if number < count else 1 for number in order])
    place = {number: position for position, number in enumerate(order)}
    parts = {name: _cut([part[name] for part in scores], ends) for name in scores[0]}
    return {name: [own[place[number]] for number in range(count)] for name, own in parts.items()}


def _cut(scored: Sequence[np.ndarray], ends: np.ndarray) -> list[np.ndarray]:
    """The scores of all ranks, end to end, split at the ends of rows, as copies.

    Arrays from Ray are in its object store, which cannot free an array while a view of it exists.
    """
    lengths = [len(part) for part in scored]
    rank_ends = np.cumsum(lengths)
    ranks = np.searchsorted(rank_ends, ends)
    shifts = (rank_ends - lengths)[ranks]
    starts = [0, *ends[:-1]]
    rows = zip(ranks, starts - shifts, ends - shifts, strict=True)
    return [scored[rank][start:end].copy() for rank, start, end in rows]


def _sequences(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, length_multiple: int
) -> dict[str, Any]:
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    width = -(-longest // length_multiple) * length_multiple
    ids_BS = torch.full((len(rows), width), pad_id)
    for row_S, (prompt, response) in zip(ids_BS, rows, strict=True):
        row_S[: len(prompt) + len(response)] = torch.tensor([*prompt, *response])
    return {
        "input_ids": ids_BS,
        "input_lengths": torch.tensor([len(prompt) + len(response) for prompt, response in rows]),
        "prompt_lengths": torch.tensor([len(prompt) for prompt, _ in rows]),
    }


def _no_targets(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Targets for tokens that no term compares with a teacher: valid ids and finite numbers."""
    ids_RK = torch.arange(width, dtype=torch.int32).expand(length, width)
    return ids_RK, torch.full((length, width), -100.0)


def _sent(parts: Sequence[Tensor]) -> list[np.ndarray]:
    return [np.ascontiguousarray(part.detach().numpy()) for part in parts]
