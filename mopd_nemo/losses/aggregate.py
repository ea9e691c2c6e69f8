"""From token losses to the loss of a step.

The step's loss is Σ weight_t · loss_t with weights fixed by the *whole* step's response lengths. So it is the same
however the rows are cut into micro-batches, ordered, packed or spread over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Aggregation = Literal["token_mean", "sequence_mean"]


def token_weights(lengths_N: Sequence[int], aggregation: Aggregation) -> list[float]:
    """Weight of each token of each of N responses, given all response lengths of the step.

    `token_mean`: 1 / Σ lengths. `sequence_mean`: 1 / (N · length). Both sum to 1 over all tokens.
    """
    if not lengths_N:
        return []
    if min(lengths_N) < 1:
        raise ValueError(f"empty response among lengths {list(lengths_N)}")
    if aggregation == "token_mean":
        return [1.0 / sum(lengths_N)] * len(lengths_N)
    return [1.0 / (len(lengths_N) * length) for length in lengths_N]


def step_weights(steps_N: Sequence[Sequence[int]]) -> list[list[float]]:
    """Weight of each token of each of N responses when every reasoning step counts the same.

    A response is a sequence of steps, given by their numbers of tokens (`step_lengths`). Tokens are averaged within a
    step, then steps over the whole batch: 1 / (all steps · tokens of the step). They sum to 1 over all tokens.
    """
    if not all(steps_N):
        raise ValueError("a response without steps")
    num_steps = sum(len(steps) for steps in steps_N)
    return [[1.0 / (num_steps * length) for length in steps for _ in range(length)] for steps in steps_N]


def step_lengths(pieces_T: Sequence[str]) -> list[int]:
    """Numbers of tokens of the reasoning steps of one response, from the text of each of its tokens.

    A step ends with the token in which its text gets a blank line, however the tokenizer cut the line breaks; further
    empty lines belong to the next step, and text that is only white space is no step of its own.
    """
    lengths: list[int] = []
    text, length = "", 0
    for piece in pieces_T:
        text, length = text + piece, length + 1
        if "\n\n" in text.lstrip():
            lengths.append(length)
            text, length = "", 0
    if text.strip() or (length and not lengths):
        lengths.append(length)
    elif length:
        lengths[-1] += length
    return lengths
