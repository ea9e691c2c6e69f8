"""Rows to the tensors and lists that NeMo-RL shards, packs and sends, and what comes back to rows.

What belongs to response tokens alone travels as one small tensor a row, not as a block padded to the longest sequence:
NeMo-RL's batches carry lists of tensors as well, and cut them wherever they cut rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopd_nemo.types import TrainRow


@dataclass(frozen=True, slots=True)
class Targets:
    """What a teacher says about the response tokens of one row."""

    ids_RK: Tensor
    """int32"""
    logprobs_RK: Tensor


def score_batch(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    candidates: Sequence[Tensor] | None,
    *,
    pad_id: int,
    length_multiple: int,
    count_multiple: int,
) -> dict[str, Any]:
    """A batch for `score_responses`.

    Args:
        sequences: (prompt, response) token ids.
        candidates: ids [response tokens, k] to score for each; None: the likeliest.
        count_multiple: rows are made up to a multiple of this, as NeMo-RL needs; those added come last.
    """
    filler = _filler(len(sequences), count_multiple)
    rows = [*sequences, *([((pad_id,), (pad_id,))] * filler)]
    batch = _sequences(rows, pad_id, length_multiple)
    if candidates is not None:
        width = candidates[0].shape[-1]
        added = torch.arange(width, dtype=torch.int32).unsqueeze(0)
        batch["candidates"] = [*(part.int() for part in candidates), *([added] * filler)]
    return batch


def train_batch(
    rows: Sequence[TrainRow],
    weights: Sequence[Tensor],
    targets: Sequence[Targets | None],
    old_logprobs: Sequence[Tensor] | None,
    *,
    pad_id: int,
    length_multiple: int,
    count_multiple: int,
) -> dict[str, Any]:
    """A batch for `Policy.train` with `LessonLoss`.

    Args:
        weights: for each row [parts, response tokens].
        old_logprobs: for each row [response tokens]; None when ratios refer to the policy as it is.
    """
    filler = _filler(len(rows), count_multiple)
    sequences = [(row.prompt_ids, row.response_ids) for row in rows]
    batch = _sequences([*sequences, *([((pad_id,), (pad_id,))] * filler)], pad_id, length_multiple)
    count = len(sequences) + filler
    positions_S = torch.arange(batch["input_ids"].shape[1])
    in_response_BS = (positions_S >= batch["prompt_lengths"][:, None]) & (positions_S < batch["input_lengths"][:, None])
    batch["token_mask"] = in_response_BS.float()
    batch["sample_mask"] = (torch.arange(count) < len(rows)).float()
    batch["advantages"] = torch.tensor([*(row.advantage for row in rows), *([0.0] * filler)])
    batch["weights"] = [*weights, *([torch.zeros(weights[0].shape[0], 1)] * filler)]
    if all(row.sampled_logprobs for row in rows):
        batch["sampler"] = [*(torch.tensor(row.sampled_logprobs) for row in rows), *([torch.zeros(1)] * filler)]
    if old_logprobs is not None:
        batch["old"] = [*old_logprobs, *([torch.zeros(1)] * filler)]
    width = next((target.ids_RK.shape[-1] for target in targets if target is not None), None)
    if width is not None:
        untaught = [Targets(*_no_targets(len(row.response_ids), width)) for row in rows]
        known = [own or none for own, none in zip(targets, untaught, strict=True)]
        known += [Targets(*_no_targets(1, width))] * filler
        batch["teacher_ids"] = [target.ids_RK for target in known]
        batch["teacher_logprobs"] = [target.logprobs_RK for target in known]
    return batch


def split_scores(
    scores: Sequence[Mapping[str, Tensor]], order: Sequence[int], response_lengths: Sequence[int]
) -> list[Targets]:
    """Scores of all data-parallel ranks as targets of the rows, in the rows' order.

    Args:
        scores: by rank.
        order: number of each scored sequence, rank by rank; numbers from `len(response_lengths)` on are filler.
        response_lengths: of the rows; filler has one token.
    """
    count = len(response_lengths)
    sizes = [response_lengths[number] if number < count else 1 for number in order]
    ids, logprobs = (torch.cat([part[name] for part in scores]).split(sizes) for name in ("ids", "logprobs"))
    place = {number: position for position, number in enumerate(order)}
    return [Targets(ids[place[number]], logprobs[place[number]]) for number in range(count)]


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
    """For tokens that no part compares with a teacher: any valid ids, and numbers that cannot become nan."""
    ids_RK = torch.arange(width, dtype=torch.int32).expand(length, width)
    return ids_RK, torch.full((length, width), -100.0)


def _filler(count: int, multiple: int) -> int:
    return -count % multiple
