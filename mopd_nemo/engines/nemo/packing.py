"""How many tokens a packed row may hold so that NeMo-RL deals every data-parallel rank its share.

NeMo-RL fills a row to the budget before it starts another, deals rows to ranks in turn, and only then breaks rows up,
one sequence at a time, until there is a multiple of the ranks: a step that fits one row leaves all but one rank idle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STEPS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0)
"""Budgets that are tried, in even shares of a rank's row; sequences seldom fill a row to the last token."""


def even_budget(lengths: Sequence[int], budget: int, ranks: int, packing: Mapping[str, Any]) -> int:
    """The budget, of those up to `budget`, with which the busiest rank has the fewest tokens; the largest of equals.

    Args:
        lengths: tokens of each sequence.
        budget: most tokens of a packed row.
        packing: NeMo-RL's `sequence_packing_args`, of which the algorithm and the padding are used.
    """
    multiple = packing["sequence_length_pad_multiple"]
    padded = [-(-length // multiple) * multiple for length in lengths]
    share = sum(padded) / ranks
    even = share / max(-(-share // budget), 1)
    tried = {budget, *(min(budget, max(int(even * step), *padded)) for step in STEPS)}
    return min(tried, key=lambda tokens: (_busiest(padded, tokens, ranks, packing["algorithm"]), -tokens))


def _busiest(lengths: list[int], budget: int, ranks: int, algorithm: str) -> int:
    """Tokens of the rank that has most, as NeMo-RL deals rows of `budget` tokens."""
    from nemo_rl.data.packing import get_packer

    packer = get_packer(algorithm, budget, min_bin_count=ranks, bin_count_multiple=ranks)
    bins = [sum(lengths[i] for i in members) for members in packer.pack(lengths)]
    return max(sum(bins[rank::ranks]) for rank in range(ranks))
