"""Sequences with shared prefixes as one packed sequence, in which every shared prefix is computed once.

Rollouts of one problem share its prompt, and with canonical peers most of their teacher contexts. The sequences are
arranged in a tree. Every layer except attention acts on each token independently, so the tree's tokens are packed end
to end, without padding, and attention lets each token see its ancestors.

Shape suffixes: S tokens of the tree, Q queries and C keys of all families in one pass, E heads × head size, F segments
of a family, N heads, R tokens of the longest of them, K these and their ancestors, D head size, B tokens of a block, W
tokens that it may see at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "prefix_tree"
"""Name of this attention among those of transformers: plain `sdpa` wherever no tree is given."""

MIN_SHARED = 16
"""A shorter shared run is computed for each sequence, because a segment costs attention calls of its own."""

BLOCK = 128
"""Queries of a segment in one attention call, which sees no key after them."""

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Family:
    """Segments with the same ancestors, attended to together."""

    count: int
    longest: int
    width: int
    """Tokens of the ancestors and of the longest segment."""


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """A packed sequence and how attention runs in it."""

    ids_S: Tensor
    positions_S: Tensor
    """Position of each token in its own sequence."""
    places: list[list[int]]
    """Per sequence, the index of each of its tokens in the packed sequence."""
    families: list[Family]
    queries_Q: Tensor
    """Indices of the segments' tokens, family by family. A short segment repeats its last token."""
    keys_C: Tensor
    """The same, with the ancestors before each segment."""
    outputs_S: Tensor
    """Index among the queries of each token of the packed sequence."""
    mask_BW: Tensor
    """0 for keys that a token of a block may see, -inf after it. A block with fewer keys uses the last columns."""


def build_tree(sequences: Sequence[Ids], device: torch.device) -> PrefixTree:
    """The tree of some sequences, each with at least one token."""
    builder = _Builder(sequences)
    builder.add_below(_sorted(sequences), 0)
    # A short segment repeats its last query: reversed, the first of the repetitions wins.
    query_of_place = dict(zip(reversed(builder.queries), reversed(range(len(builder.queries))), strict=True))
    outputs = [query_of_place[place] for place in range(len(builder.ids))]
    ids, positions, queries, keys, outputs = (
        torch.tensor(numbers, dtype=torch.long, device=device)
        for numbers in (builder.ids, builder.positions, builder.queries, builder.keys, outputs)
    )
    mask_BW = _mask_BW(builder.families, device)
    return PrefixTree(ids, positions, builder.places, builder.families, queries, keys, outputs, mask_BW)


class _Builder:
    """The lists of a `PrefixTree` while segments are added to it."""

    def __init__(self, sequences: Sequence[Ids]) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.places: list[list[int]] = [[] for _ in sequences]
        self.families: list[Family] = []
        self.queries: list[int] = []
        self.keys: list[int] = []
        self._sequences = sequences

    def add_below(self, members: list[int], depth: int) -> None:
        """Add the segments after the first `depth` tokens, which the members, sorted, have in common."""
        ancestors = list(self.places[members[0]])
        segments: list[list[int]] = []
        runs = list(_runs(self._sequences, members, depth))
        for run, length in runs:
            segment = list(range(len(self.ids), len(self.ids) + length))
            self.ids.extend(self._sequences[run[0]][depth : depth + length])
            self.positions.extend(range(depth, depth + length))
            for member in run:
                self.places[member].extend(segment)
            segments.append(segment)
        for similar in _of_similar_length(segments):
            self._add_family(ancestors, similar)
        for run, length in runs:
            if longer := [member for member in run if len(self._sequences[member]) > depth + length]:
                self.add_below(longer, depth + length)

    def _add_family(self, ancestors: list[int], segments: list[list[int]]) -> None:
        """Attention of some segments, the longest first, to their ancestors and themselves."""
        longest = len(segments[0])
        for segment in segments:
            filled = segment + segment[-1:] * (longest - len(segment))
            self.queries.extend(filled)
            self.keys.extend(ancestors)
            self.keys.extend(filled)
        self.families.append(Family(len(segments), longest, len(ancestors) + longest))


def tree_batches(units: Sequence[Sequence[Sequence[int]]], max_tokens: int) -> list[list[int]]:
    """Indices of units in batches of at most `max_tokens` tokens, with shared prefixes counted once.

    Units with a common prefix are neighbours. A batch ends where the units on both sides share the shortest prefix,
    which is computed twice. The largest batch comes first. A unit above `max_tokens` gets a batch of its own.

    Args:
        units: sequences that must share a batch, with at least one each.
    """
    order = sorted(range(len(units)), key=lambda i: tuple(units[i][0]))
    firsts = [units[i][0] for i in order]
    shared = [0, *(common_length(a, b) for a, b in pairwise(firsts))][: len(order)]  # with the unit before
    tokens = [sum(len(s) - (common_length(units[i][0], s) if n else 0) for n, s in enumerate(units[i])) for i in order]
    added = [count - common for count, common in zip(tokens, shared, strict=True)]
    batches: list[tuple[int, list[int]]] = []
    start = 0
    while start < len(order):
        totals = [shared[start] + total for total in accumulate(added[start:])]
        count = max(sum(total <= max_tokens for total in totals), 1)
        if count < len(totals):
            half_full = [n for n in range(1, count + 1) if totals[n - 1] >= totals[count - 1] / 2]
            count = min(half_full, key=lambda n: (shared[start + n], -n))
        batches.append((totals[count - 1], order[start : start + count]))
        start += count
    return [batch for _, batch in sorted(batches, key=lambda b: -b[0])]


def common_length(first: Ids, second: Ids) -> int:
    """Length of the common prefix of two sequences."""
    limit = min(len(first), len(second))
    return limit if first[:limit] == second[:limit] else next(i for i in range(limit) if first[i] != second[i])


def tree_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: along `tree` if the model was called with one, else plain `sdpa`.

    Args:
        query: [1, heads, S, D]; key and value may have fewer heads, as in grouped-query attention.

    Returns:
        [1, S, heads, D], and no weights.
    """
    tree: PrefixTree | None = kwargs.pop("tree", None)
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    asked_QE, keys_CE, values_CE = (
        x[0].transpose(0, 1).flatten(1).index_select(0, chosen)
        for x, chosen in ((query, tree.queries_Q), (key, tree.keys_C), (value, tree.keys_C))
    )
    outputs = []
    for family, *parts in zip(
        tree.families,
        asked_QE.split([family.count * family.longest for family in tree.families]),
        *(x_CE.split([family.count * family.width for family in tree.families]) for x_CE in (keys_CE, values_CE)),
        strict=True,
    ):
        asked, keys, values = (
            part.view(family.count, -1, x.shape[1], x.shape[3]).transpose(1, 2)
            for part, x in zip(parts, (query, key, value), strict=True)
        )
        attended_FNRD = _attend(family, asked, keys, values, tree.mask_BW.to(query.dtype), kwargs.get("scaling"))
        outputs.append(attended_FNRD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, tree.outputs_S).unsqueeze(0), None


def register_attention() -> None:
    """Make this attention known to transformers."""
    AttentionInterface.register(ATTENTION, tree_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attend(
    family: Family, query_FNRD: Tensor, key_FNKD: Tensor, value_FNKD: Tensor, mask_BW: Tensor, scale: float | None
) -> Tensor:
    """Block by block: each block sees the ancestors and its own segment up to its end."""
    ancestors, before = family.width - family.longest, mask_BW.shape[1] - mask_BW.shape[0]
    outputs = []
    for start in range(0, family.longest, BLOCK):
        stop = min(start + BLOCK, family.longest)
        attended_FNRD = scaled_dot_product_attention(
            query_FNRD[:, :, start:stop],
            key_FNKD[:, :, : ancestors + stop],
            value_FNKD[:, :, : ancestors + stop],
            attn_mask=mask_BW[: stop - start, before - ancestors - start : before + stop - start],
            scale=scale,
            enable_gqa=query_FNRD.shape[1] != key_FNKD.shape[1],
        )
        outputs.append(attended_FNRD)
    return torch.cat(outputs, dim=2)


def _mask_BW(families: Sequence[Family], device: torch.device) -> Tensor:
    rows = min(BLOCK, max(family.longest for family in families))
    before = max(family.width for family in families)
    hidden_BW = torch.ones(rows, before + rows, dtype=torch.bool, device=device).triu(before + 1)
    return torch.zeros(hidden_BW.shape, device=device).masked_fill(hidden_BW, float("-inf"))


def _sorted(sequences: Sequence[Ids]) -> list[int]:
    """Indices of the sequences in lexical order, in which common prefixes are neighbours."""
    return sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))


def _runs(sequences: Sequence[Ids], members: Sequence[int], depth: int) -> Iterator[tuple[list[int], int]]:
    """Runs of sorted members that share tokens after the first `depth`, and how many tokens they share.

    A run of one member goes to its end.
    """
    run, shared = [members[0]], len(sequences[members[0]]) - depth
    for member in members[1:]:
        common = min(common_length(sequences[run[0]], sequences[member]) - depth, shared)
        if common >= min(MIN_SHARED, shared):
            run, shared = [*run, member], common
        else:
            yield run, shared
            run, shared = [member], len(sequences[member]) - depth
    yield run, shared


def _of_similar_length(segments: list[list[int]]) -> list[list[list[int]]]:
    """Groups in which no segment is padded to twice its length or more."""
    groups: list[list[list[int]]] = []
    for segment in sorted(segments, key=len, reverse=True):
        if groups and 2 * len(segment) > len(groups[-1][0]):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups
