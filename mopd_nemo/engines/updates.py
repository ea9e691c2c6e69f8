"""How a lesson becomes optimiser updates: which rows each sees, and what each token counts. One for every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from mopd_nemo.lesson import Lesson, Part, Preference
from mopd_nemo.losses import step_lengths, step_weights, token_weights
from mopd_nemo.types import TrainRow


def cut_by_group(lesson: Lesson, count: int) -> list[list[Part]]:
    """The parts of each of `count` updates, without those that have no rows. Rows of one group stay together."""
    groups = sorted({row.group_index for row in lesson.rows})
    size = -(-len(groups) // count) if groups else 1
    number = {group: position // size for position, group in enumerate(groups)}
    updates = []
    for update in range(count):

        def mine(indices: tuple[int, ...], update: int = update) -> tuple[int, ...]:
            return tuple(i for i in indices if number[lesson.rows[i].group_index] == update)

        parts = [replace(part, rows=mine(part.rows), silent=mine(part.silent)) for part in lesson.parts]
        if any(part.rows for part in parts):
            updates.append([part for part in parts if part.rows])
    return updates


def token_weights_of(
    part: Part,
    rows: Sequence[TrainRow],
    aggregation: Literal["token_mean", "sequence_mean", "step_mean"],
    piece: Callable[[int], str],
) -> dict[int, list[float]]:
    """Per row, the weight of each of its tokens in the update's loss; for a preference, of its pair.

    Args:
        piece: text of a token, for finding reasoning steps.
    """
    if isinstance(part.objective, Preference):
        return {key: [part.weight / (len(part.rows) / 2)] for key in part.rows}
    counted = [*part.rows, *part.silent]
    responses = [rows[i].response_ids for i in counted]
    if aggregation == "step_mean":
        weights = step_weights([step_lengths([piece(token) for token in ids]) for ids in responses])
    else:
        means = token_weights([len(ids) for ids in responses], aggregation)
        weights = [[mean] * len(ids) for mean, ids in zip(means, responses, strict=True)]
    return {i: [part.weight * w for w in own] for i, own in zip(counted, weights, strict=True)}
