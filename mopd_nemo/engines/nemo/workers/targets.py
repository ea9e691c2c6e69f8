"""What a worker keeps of the teacher's answers about its rows, from their scoring to their update.

Kept in the host's memory, pinned where there is a GPU: an update needs all of the GPU's. A row's targets come to the
GPU when the loss reaches it, the teacher's head for the time of a `train` call.

Shape suffixes: R response tokens of a row, T of all rows of a call, K support, H hidden size, V local columns of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopd_nemo.engines.nemo.batches import NO_ROW
from mopd_nemo.losses.reference import contrasted

Packed = tuple[np.ndarray, str]
"""A tensor as Ray takes it without a copy, and its type: NumPy has no bfloat16."""
UNTAUGHT = -100.0
"""Log-probability where no term compares with a teacher: a finite number."""


class KeptTargets:
    """Targets by row, in one of two forms: log-probabilities of a few tokens, or the teacher's last hidden states."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, Tensor]] = {}
        self.head_VH: Tensor | None = None
        """The output layer's weight that turns the kept hidden states into logits."""
        self.elsewhere = False
        """The model's last pipeline stage is another rank, which keeps everything."""

    def keep(self, keys: Sequence[int], lengths: Sequence[int], scores_T: Mapping[str, Tensor]) -> None:
        """Keep the scores of some rows beside what is known of them.

        Args:
            keys: of the rows; `NO_ROW` is left out.
            lengths: response tokens of each.
            scores_T: by name: `ids` [T, K] and `logprobs` [T, K], or `hidden` or `second` [T, H].
        """
        for name, part_T in scores_T.items():
            whole_T = part_T.pin_memory() if torch.cuda.is_available() else part_T
            for key, part_R in zip(keys, whole_T.split(list(lengths)), strict=True):
                if key != NO_ROW:
                    self._rows.setdefault(key, {})[name] = part_R

    def keep_head(self, weight_VH: Tensor) -> None:
        """Keep a copy of the teacher's head, whose weights others may soon take the place of."""
        copy_VH = torch.empty_like(weight_VH, device="cpu", pin_memory=torch.cuda.is_available())
        self.head_VH = copy_VH.copy_(weight_VH.detach())

    def keep_columns(self, shards: Sequence[Packed], start: int, width: int) -> None:
        """Keep the columns of an external teacher's head that this rank has of the student's.

        Args:
            shards: [rows, H] of the teacher's tensor-parallel ranks in order.
            start, width: columns; what the teacher has not is padding of the student's.
        """
        whole = [as_tensor(*shard) for shard in shards]
        head_VH, before = whole[0].new_zeros(width, whole[0].shape[-1]), 0
        for shard_VH in whole:
            first, end = max(start, before), min(start + width, before + len(shard_VH))
            if first < end:
                head_VH[first - start : end - start] = shard_VH[first - before : end - before]
            before += len(shard_VH)
        self.keep_head(head_VH)

    def packed(self, rank_of: Mapping[int, int]) -> dict[int, dict[str, tuple[list[int], list[int], Packed]]]:
        """What is kept for each rank of others: by name, keys, response tokens of each row, and all rows.

        Args:
            rank_of: by key.
        """
        found: dict[int, dict[str, tuple[list[int], list[int], Packed]]] = {}
        for name in ("ids", "logprobs", "hidden", "second"):
            for rank in sorted(set(rank_of.values())):
                rows = {key: row[name] for key, row in self._rows.items() if rank_of[key] == rank and name in row}
                if rows:
                    lengths = [len(row_R) for row_R in rows.values()]
                    found.setdefault(rank, {})[name] = list(rows), lengths, as_array(torch.cat(list(rows.values())))
        return found

    def take(self, packed: Mapping[str, tuple[list[int], list[int], Packed]]) -> None:
        """Keep one of the parts of `packed`."""
        for name, (keys, lengths, whole) in packed.items():
            self.keep(keys, lengths, {name: as_tensor(*whole)})

    def contrast(
        self, keys: Sequence[int], lengths: Sequence[int], failures_TK: Tensor, beta: float, tail: bool
    ) -> None:
        """Replace log-probabilities by those of the contrasted target.

        Args:
            failures_TK: what the teacher says of the same tokens after failures.
            beta, tail: as in `reference.contrasted`.
        """
        for key, failure_RK in zip(keys, failures_TK.split(list(lengths)), strict=True):
            if key != NO_ROW:
                row = self._rows[key]
                target_RK = contrasted(row["logprobs"].float(), failure_RK.float(), beta, tail)
                row["logprobs"] = target_RK.to(row["logprobs"].dtype)

    def supports(self, keys: Sequence[int], lengths: Sequence[int]) -> list[Any] | None:
        """Ids [R, K] of each row as NumPy arrays; None if none are kept."""
        width = next((row["ids"].shape[-1] for row in self._rows.values() if "ids" in row), None)
        if width is None:
            return None
        found = []
        for key, length in zip(keys, lengths, strict=True):
            ids_RK = _any_ids(length, width) if key == NO_ROW else self._row(key)["ids"]
            found.append(ids_RK.int().numpy())
        return found

    def columns(self, keys: Sequence[int], lengths: Sequence[int]) -> dict[str, list[Tensor]]:
        """The targets of a batch as columns of it: `teacher_NAME`, for each row a tensor.

        Raises:
            ValueError: targets were asked for that are not here.
        """
        some = next((self._row(key) for key in keys if key != NO_ROW), None)
        if some is None:
            return {}
        names = ("hidden", *(("second",) if any("second" in row for row in self._rows.values()) else ()))
        names = names if "hidden" in some else ("ids", "logprobs")
        found: dict[str, list[Tensor]] = {f"teacher_{name}": [] for name in names}
        for key, length in zip(keys, lengths, strict=True):
            row = _untaught(some, length) if key == NO_ROW else self._row(key)
            for name in names:  # without failures the second prompt is the first, and contrasts with nothing
                found[f"teacher_{name}"].append(row[name] if name in row else row["hidden"])
        return found

    def head(self, device: torch.device) -> Tensor | None:
        """The kept weight, on the device."""
        return None if self.head_VH is None else self.head_VH.to(device, non_blocking=True)

    def _row(self, key: int) -> dict[str, Tensor]:
        if key not in self._rows:
            raise ValueError(
                f"row {key} has no target in this worker: each batch is scored before its update, and no other between"
            )
        return self._rows[key]


def as_array(part: Tensor) -> Packed:
    """A tensor of the CPU as an array."""
    kind = str(part.dtype).removeprefix("torch.")
    return (part.view(torch.int16) if part.dtype == torch.bfloat16 else part).numpy(), kind


def as_tensor(part: np.ndarray, kind: str) -> Tensor:
    """A copy of what `as_array` gave: what Ray keeps cannot be written to, nor freed while it is seen."""
    tensor = torch.from_numpy(part.copy())
    return tensor.view(torch.bfloat16) if kind == "bfloat16" else tensor


def _any_ids(length: int, width: int) -> Tensor:
    return torch.arange(width, dtype=torch.int32).repeat(length, 1)


def _untaught(like: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Targets of the same form for tokens that no term compares with a teacher."""
    if "hidden" in like:
        return {"hidden": like["hidden"].new_zeros(1, like["hidden"].shape[-1]).expand(length, -1)}
    width = like["ids"].shape[-1]
    return {"ids": _any_ids(length, width), "logprobs": torch.full((length, width), UNTAUGHT)}
