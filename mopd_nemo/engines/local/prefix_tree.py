"""Sequences with common beginnings as one packed sequence, in which every common beginning is computed once.

Rollouts of one problem share its prompt, and most of their teacher contexts: canonical peers make the contexts of a
group equal but for a few. The sequences are laid into a tree. Everything in a transformer but attention sees single
tokens, so the tree's tokens lie end to end, without padding; attention lets each token see its ancestors.

Shape suffixes: S tokens of the tree, R tokens of the longest of some segments with the same parent, K tokens that one
of them may look at, Q and C places of all that ask and of all that is looked at in a pass, E heads × head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
"""Shorter common runs are computed for each sequence: a segment costs attention calls of its own."""

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Family:
    """Segments with the same ancestors, attended to in one call."""

    count: int
    mask_RK: Tensor | None
    """True where a token may look: at all ancestors, and at its segment up to itself. None: no ancestors, causal."""
    longest: int
    width: int
    """Tokens of the ancestors and of the longest segment."""


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """A packed sequence and how attention runs in it."""

    ids_S: Tensor
    positions_S: Tensor
    """Place of each token in its own sequence."""
    places: list[list[int]]
    """Per sequence, where each of its tokens stands in the packed sequence."""
    families: list[Family]
    queries_Q: Tensor
    """Of the families' segments, one after the other, where they stand; a short segment repeats its last token."""
    keys_C: Tensor
    """The same with the ancestors before each segment."""
    outputs_S: Tensor
    """Where among the queries each token of the packed sequence is found."""


def plant(sequences: Sequence[Ids], device: torch.device) -> PrefixTree:
    """The tree of some sequences, each with at least one token."""
    ids: list[int] = []
    positions: list[int] = []
    places: list[list[int]] = [[] for _ in sequences]
    families: list[Family] = []
    queries: list[int] = []
    keys: list[int] = []

    def attend(ancestors: list[int], segments: list[list[int]]) -> None:
        longest = len(segments[0])
        for segment in segments:
            filled = segment + segment[-1:] * (longest - len(segment))
            queries.extend(filled)
            keys.extend(ancestors)
            keys.extend(filled)
        width = len(ancestors) + longest
        mask_RK = torch.ones(longest, width, dtype=torch.bool, device=device).tril(len(ancestors))
        families.append(Family(len(segments), mask_RK if ancestors else None, longest, width))

    def grow(members: list[int], depth: int) -> None:
        """Lay down what follows the first `depth` tokens, which the members, sorted, have in common."""
        ancestors = list(places[members[0]])
        segments: list[list[int]] = []
        runs = list(_runs(sequences, members, depth))
        for run, length in runs:
            segment = list(range(len(ids), len(ids) + length))
            ids.extend(sequences[run[0]][depth : depth + length])
            positions.extend(range(depth, depth + length))
            for member in run:
                places[member].extend(segment)
            segments.append(segment)
        for similar in _of_similar_length(segments):
            attend(ancestors, similar)
        for run, length in runs:
            if longer := [member for member in run if len(sequences[member]) > depth + length]:
                grow(longer, depth + length)

    grow(_sorted(sequences), 0)
    found = dict(zip(reversed(queries), reversed(range(len(queries))), strict=True))  # before its repetitions
    outputs = [found[place] for place in range(len(ids))]

    def tensor(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=device)

    return PrefixTree(tensor(ids), tensor(positions), places, families, tensor(queries), tensor(keys), tensor(outputs))


def common_length(first: Ids, second: Ids) -> int:
    """How many tokens two sequences have in common from their beginning."""
    limit = min(len(first), len(second))
    return limit if first[:limit] == second[:limit] else next(i for i in range(limit) if first[i] != second[i])


def tree_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; `tree`, when given, says who sees whom.

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
    queries = asked_QE.split([family.count * family.longest for family in tree.families])
    looked_at = [family.count * family.width for family in tree.families]
    outputs = []
    for family, *parts in zip(
        tree.families, queries, keys_CE.split(looked_at), values_CE.split(looked_at), strict=True
    ):
        found = scaled_dot_product_attention(
            *(
                part.view(family.count, -1, x.shape[1], x.shape[3]).transpose(1, 2)
                for part, x in zip(parts, (query, key, value), strict=True)
            ),
            attn_mask=family.mask_RK,
            is_causal=family.mask_RK is None,
            scale=kwargs.get("scaling"),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, tree.outputs_S).unsqueeze(0), None


AttentionInterface.register(ATTENTION, tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _sorted(sequences: Sequence[Ids]) -> list[int]:
    """Numbers of the sequences in the order in which equal beginnings are neighbours."""
    return sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))


def _runs(sequences: Sequence[Ids], members: Sequence[int], depth: int) -> Iterator[tuple[list[int], int]]:
    """Neighbours, among sorted members, that go on alike after `depth` tokens, and for how many tokens all of them do.

    One that goes on alone does so to its end.
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
    """Cut so that in no family a segment is padded to more than twice its length."""
    cut: list[list[list[int]]] = []
    for segment in sorted(segments, key=len, reverse=True):
        if cut and 2 * len(segment) > len(cut[-1][0]):
            cut[-1].append(segment)
        else:
            cut.append([segment])
    return cut
