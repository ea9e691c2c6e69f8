"""Rows with one prompt: found, and packed."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mopd_nemo.engines.nemo.prompts import PromptRows, by_prompt, fill, in_bins, row_by_row, say

GROUPS = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(0, 40), min_size=1, max_size=7)), min_size=1, max_size=8
)


def groups_of(pairs: list[tuple[int, list[int]]]) -> list[PromptRows]:
    groups, at = [], 0
    for prompt, responses in pairs:
        groups.append(PromptRows(tuple(range(at, at + len(responses))), prompt, tuple(responses)))
        at += len(responses)
    return groups


def test_rows_with_equal_prompts_are_found_in_any_order() -> None:
    ids_BS = torch.tensor([[1, 2, 5, 0], [1, 3, 5, 6], [1, 2, 7, 8], [1, 2, 5, 9], [1, 2, 0, 0]])
    found = by_prompt(ids_BS, [2, 2, 2, 3, 2], [3, 4, 4, 4, 2])
    assert found == [PromptRows((0, 2, 4), 2, (1, 2, 0)), PromptRows((1,), 2, (2,)), PromptRows((3,), 3, (1,))]
    assert [group.tokens for group in found] == [5, 4, 4]


@given(GROUPS, st.integers(1, 200))
def test_packed_rows_have_every_row_once_and_keep_to_the_budget(
    pairs: list[tuple[int, list[int]]], budget: int
) -> None:
    groups = groups_of(pairs)
    bins = in_bins(groups, budget)
    parts = [part for members in bins for part in members]
    assert sorted(row for part in parts for row in part.rows) == list(range(sum(len(r) for _, r in pairs)))
    responses = {row: size for group in groups for row, size in zip(group.rows, group.responses, strict=True)}
    prompts = {row: group.prompt for group in groups for row in group.rows}
    for part in parts:
        assert part.responses == tuple(responses[row] for row in part.rows)
        assert {prompts[row] for row in part.rows} == {part.prompt}
    longest = max(prompts[row] + size for row, size in responses.items())
    assert max(sum(part.tokens for part in members) for members in bins) <= max(budget, longest)


def test_a_group_above_the_budget_is_cut_into_as_few_even_parts_as_fit() -> None:
    (group,) = groups_of([(10, [4] * 8)])
    assert group.within(42) == [group]
    assert [part.responses for part in group.within(30)] == [(4,) * 4] * 2
    assert [len(part.rows) for part in group.within(20)] == [2] * 4
    assert [len(part.rows) for part in group.within(5)] == [1] * 8  # no row fits


def test_bins_are_few_and_even() -> None:
    assert [sum((5, 5, 5, 5, 2, 2)[i] for i in members) for members in fill((5, 5, 5, 5, 2, 2), 13)] == [12, 12]
    assert fill((3, 30, 4), 10) == [[1], [0, 2]] and fill((0, 0), 0) == [[0, 1]]


def config(**changes: object) -> dict[str, object]:
    cfg = {"megatron_cfg": {"enabled": True, "context_parallel_size": 1}, "sequence_packing": {"enabled": True}}
    return cfg | changes


def test_only_packed_rows_of_megatron_that_nothing_cuts_share_prompts() -> None:
    assert row_by_row(config()) is None
    assert "context" in str(row_by_row(config(megatron_cfg={"enabled": True, "context_parallel_size": 2})))
    assert "packed" in str(row_by_row(config(sequence_packing={"enabled": False})))
    assert "DTensor" in str(row_by_row(config(megatron_cfg={"enabled": False})))


def test_why_not_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        say("a reason of this test")
        say("a reason of this test")
    assert [record.getMessage() for record in caplog.records] == [
        "scoring reads a prompt again for each of its responses: a reason of this test"
    ]
