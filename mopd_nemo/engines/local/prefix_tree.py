"""Sequences with shared prefixes as one packed sequence, in which every shared prefix is computed once.

Rollouts of one problem share its prompt, and with canonical peers most of their teacher contexts. The sequences are
arranged in a tree. Every layer except attention acts on each token independently, so the tree's tokens are packed end
to end, without padding, and attention lets each token see its ancestors.

Attention has two forms. On a GPU in bfloat16, torch's flash kernel for sequences of various lengths takes all segments
in one call: the queries of a segment, and as keys its ancestors and itself. Elsewhere `scaled_dot_product_attention`
takes segments of similar length together, block by block, under a mask.

Shape suffixes: S tokens of the tree, Q queries and C keys of all families or segments in one pass, E heads × head size,
F segments of a family, N heads, G those of keys, R tokens of the longest segment, K these and their ancestors, D head
size, B tokens of a block, W tokens that it may see at most, J segments and one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from itertools import accumulate, chain, pairwise
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
    attention: Families | Segments


@dataclass(frozen=True, slots=True)
class Families:
    """Attention by families, block by block."""

    families: list[Family]
    queries_Q: Tensor
    """Indices of the segments' tokens, family by family. A short segment repeats its last token."""
    keys_C: Tensor
    """The same, with the ancestors before each segment."""
    outputs_S: Tensor
    """Index among the queries of each token of the packed sequence."""
    mask_BW: Tensor
    """0 for keys that a token of a block may see, -inf after it. A block with fewer keys uses the last columns."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention as `tree_attention` has it, [1, S, heads, D]."""
        asked_QE, keys_CE, values_CE = (
            x[0].transpose(0, 1).flatten(1).index_select(0, chosen)
            for x, chosen in ((query, self.queries_Q), (key, self.keys_C), (value, self.keys_C))
        )
        mask_BW = self.mask_BW.to(query.dtype)
        outputs = []
        for family, *parts in zip(
            self.families,
            asked_QE.split([family.count * family.longest for family in self.families]),
            *(x_CE.split([family.count * family.width for family in self.families]) for x_CE in (keys_CE, values_CE)),
            strict=True,
        ):
            asked, keys, values = (
                part.view(family.count, -1, x.shape[1], x.shape[3]).transpose(1, 2)
                for part, x in zip(parts, (query, key, value), strict=True)
            )
            attended_FNRD = _attend(family, asked, keys, values, mask_BW, scale)
            outputs.append(attended_FNRD.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.outputs_S).unsqueeze(0)


@dataclass(frozen=True, slots=True)
class Segments:
    """Attention of all segments in one call. They lie in the packed sequence one after the other."""

    keys_C: Tensor
    """Indices of each segment's ancestors and its own tokens, segment by segment."""
    query_ends_J: Tensor
    """Where each segment's tokens end among the queries, after a 0; int32."""
    key_ends_J: Tensor
    """The same among the keys."""
    longest: int
    width: int
    """Most keys of a segment."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention as `tree_attention` has it, [1, S, heads, D]."""
        query_SND = query[0].transpose(0, 1)
        key_CGD, value_CGD = (x[0].transpose(0, 1).index_select(0, self.keys_C) for x in (key, value))
        ends = self.query_ends_J, self.key_ends_J
        return flash()(query_SND, key_CGD, value_CGD, *ends, self.longest, self.width, scale=scale).unsqueeze(0)


def build_tree(sequences: Sequence[Ids], device: torch.device, *, flash: bool = False) -> PrefixTree:
    """The tree of some sequences, each with at least one token.

    Args:
        flash: for the flash kernel.
    """
    builder = _Builder(sequences)
    builder.add_below(_sorted(sequences), 0)
    ids, positions = (torch.tensor(numbers, device=device) for numbers in (builder.ids, builder.positions))
    attention = _segments(builder.segments, device) if flash else _families(builder.segments, len(ids), device)
    return PrefixTree(ids, positions, builder.places, attention)


class _Builder:
    """The lists of a `PrefixTree` while segments are added to it."""

    def __init__(self, sequences: Sequence[Ids]) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.places: list[list[int]] = [[] for _ in sequences]
        self.segments: list[tuple[list[int], list[list[int]]]] = []
        """Ancestors, and the segments below them, as indices of tokens."""
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
        self.segments.append((ancestors, segments))
        for run, length in runs:
            if longer := [member for member in run if len(self._sequences[member]) > depth + length]:
                self.add_below(longer, depth + length)


def _families(segments: Sequence[tuple[list[int], list[list[int]]]], total: int, device: torch.device) -> Families:
    families: list[Family] = []
    queries: list[int] = []
    keys: list[int] = []
    for ancestors, below in segments:
        for similar in _of_similar_length(below):
            longest = len(similar[0])
            for segment in similar:
                filled = segment + segment[-1:] * (longest - len(segment))
                queries.extend(filled)
                keys.extend(ancestors)
                keys.extend(filled)
            families.append(Family(len(similar), longest, len(ancestors) + longest))
    # A short segment repeats its last query: reversed, the first of the repetitions wins.
    query_of_place = dict(zip(reversed(queries), reversed(range(len(queries))), strict=True))
    outputs = [query_of_place[place] for place in range(total)]
    queries_Q, keys_C, outputs_S = (torch.tensor(numbers, device=device) for numbers in (queries, keys, outputs))
    return Families(families, queries_Q, keys_C, outputs_S, _mask_BW(families, device))


def _segments(segments: Sequence[tuple[list[int], list[list[int]]]], device: torch.device) -> Segments:
    """The packed sequence has its segments in this order."""
    runs = [(ancestors, segment) for ancestors, below in segments for segment in below]
    keys = list(chain.from_iterable(ancestors + segment for ancestors, segment in runs))
    lengths = [len(segment) for _, segment in runs]
    widths = [len(ancestors) + len(segment) for ancestors, segment in runs]
    query_ends, key_ends = (
        torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device) for sizes in (lengths, widths)
    )
    return Segments(torch.tensor(keys, device=device), query_ends, key_ends, max(lengths), max(widths))


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
    if torch.is_autocast_enabled(query.device.type):  # once, not for every block: blocks share keys, and what is kept
        wanted = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(wanted), key.to(wanted), value.to(wanted)
    return tree.attention.attend(query, key, value, kwargs.get("scaling")), None


@cache
def flash() -> Callable[..., Any]:
    """Torch's attention for sequences of various lengths. The last query of each sees all of its keys.

    Raises:
        ImportError, TypeError: this torch is older than 2.11.
    """
    from torch.nn.attention.varlen import varlen_attn

    grouped = (
        {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    )  # 2.11 need not be asked
    return partial(varlen_attn, window_size=(-1, 0), **grouped)


def register_attention() -> None:
    """Make this attention known to transformers."""
    AttentionInterface.register(ATTENTION, tree_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attend(
    family: Family, query_FNRD: Tensor, key_FNKD: Tensor, value_FNKD: Tensor, mask_BW: Tensor, scale: float | None
) -> Tensor:
    """Block by block: each block sees the ancestors and its own segment up to its end."""
    groups = query_FNRD.shape[1] // key_FNKD.shape[1]
    if groups > 1 and query_FNRD.is_cuda:  # there, only attention without a mask takes fewer key heads as they are
        key_FNKD, value_FNKD = (x.repeat_interleave(groups, dim=1) for x in (key_FNKD, value_FNKD))
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
