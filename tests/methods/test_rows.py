"""Which rollouts each method learns from, with what context, reference or advantage."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopd_nemo import lesson
from mopd_nemo.chat import Chat
from mopd_nemo.config import Config
from mopd_nemo.config.load import load_config
from mopd_nemo.lesson import Lesson
from mopd_nemo.losses import Divergence, LogLikelihood, PolicyGradient
from mopd_nemo.methods import make_method
from mopd_nemo.types import RolloutGroup
from tests.conftest import QUICKSTART, make_group

S1, S2 = ("7+5=2\n\\boxed{2}", 1.0), ("Start with 7.\n+5 gives 2\n\\boxed{2}", 1.0)
F1, F2 = ("7+5=3\n\\boxed{3}", 0.0), ("The result is 2.", 0.0)
BROKEN = ("\\boxed{2}?", None)


def config(*overrides: str) -> Config:
    return load_config(QUICKSTART, list(overrides))


def build(chat: Chat, groups: list[RolloutGroup], *overrides: str) -> Lesson:
    return make_method(config(*overrides), chat).build(groups, step=1)


@pytest.fixture
def groups(chat: Chat) -> list[RolloutGroup]:
    """Mixed with an unjudged rollout; a lone success; all failed; all succeeded."""
    return [
        make_group(chat, [S1, F1, S2, BROKEN], feedback="wrong"),
        make_group(chat, [F1, S1, F2], feedback="wrong"),
        make_group(chat, [F1, F2], feedback="wrong"),
        make_group(chat, [S1, S2, S1], feedback="wrong"),
    ]


def taught(given: Lesson) -> set[tuple[int, int]]:
    return {(given.rows[i].group_index, given.rows[i].rollout_index) for part in given.parts for i in part.rows}


def teacher_text(given: Lesson, chat: Chat, group: int, rollout: int) -> str:
    (row,) = [row for row in given.rows if (row.group_index, row.rollout_index) == (group, rollout)]
    assert row.teacher_prompt_ids is not None
    return chat.decode(row.teacher_prompt_ids)


def test_sdpo_shows_one_success_or_feedback_and_masks_the_rest(chat: Chat, groups: list[RolloutGroup]) -> None:
    given = build(chat, groups, "method=sdpo")
    lone, feedbackless = (1, 1), make_group(chat, [F1, F2])
    every = {(g, r) for g, group in enumerate(groups) for r in range(len(group.rollouts))}
    assert taught(given) == every - {lone}
    assert S1[0] in teacher_text(given, chat, 0, 1) and S2[0] not in teacher_text(given, chat, 0, 1)
    assert F1[0] not in teacher_text(given, chat, 0, 2)
    assert "wrong" in teacher_text(given, chat, 2, 0)
    assert not build(chat, [feedbackless], "method=sdpo").rows


def test_opd_reads_the_student_s_prompt_for_every_rollout(chat: Chat, groups: list[RolloutGroup]) -> None:
    given = build(chat, groups, "method=opd", "teacher.path=somewhere")
    assert len(given.rows) == 12
    assert all(row.teacher_prompt_ids == row.prompt_ids for row in given.rows)
    assert given.parts[0].objective == Divergence()


def test_grpo_centres_rewards_in_each_group_of_judged_rollouts(chat: Chat, groups: list[RolloutGroup]) -> None:
    given = build(chat, groups, "method=grpo")
    (part,) = given.parts
    advantages = {(given.rows[i].group_index, given.rows[i].rollout_index): given.rows[i].advantage for i in part.rows}
    third = pytest.approx(1 / 3)
    assert advantages == {
        (0, 0): third,
        (0, 1): pytest.approx(-2 / 3),
        (0, 2): third,
        (1, 0): pytest.approx(-1 / 3),
        (1, 1): pytest.approx(2 / 3),
        (1, 2): pytest.approx(-1 / 3),
    }
    assert {given.rows[i].group_index for i in part.silent} == {2, 3}, "equal rewards: counted in the mean, no pass"
    assert all(row.teacher_prompt_ids is None for row in given.rows) and given.contexts is None
    assert part.objective == PolicyGradient(0.2, 0.28)
    assert given.metrics["signal"] == 0.5


def test_grpo_with_std_has_unit_advantages(chat: Chat) -> None:
    given = build(chat, [make_group(chat, [S1, F1])], "method=grpo", "policy_gradient.divide_by_std=true")
    assert [row.advantage for row in given.rows] == pytest.approx([2**-0.5, -(2**-0.5)])


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_preferences_pair_distinct_successes_and_failures(chat: Chat, groups: list[RolloutGroup], method: str) -> None:
    given = build(chat, [*groups, make_group(chat, [F1, S1, S1, F2, F1])], f"method={method}")
    (part,) = given.parts
    rows = [given.rows[i] for i in part.rows]
    pairs = [(rows[i].group_index, rows[i].rollout_index, rows[i + 1].rollout_index) for i in range(0, len(rows), 2)]
    assert pairs == [(0, 0, 1), (1, 1, 0), (4, 1, 0)]
    assert isinstance(part.objective, lesson.Dpo if method == "dpo" else lesson.Simpo)
    assert all((row.teacher_prompt_ids == row.prompt_ids) == (method == "dpo") for row in given.rows)


def test_verified_sft_takes_each_success_once(chat: Chat, groups: list[RolloutGroup]) -> None:
    given = build(chat, groups, "method=verified_sft")
    assert taught(given) == {(0, 0), (0, 2), (1, 1), (3, 0), (3, 1)}
    assert given.parts[0].objective == LogLikelihood()


def test_gkd_takes_everything_that_the_teacher_wrote(chat: Chat, groups: list[RolloutGroup]) -> None:
    method = make_method(config("method=gkd", "teacher.path=somewhere"), chat)
    assert method.writer == "teacher"
    assert len(taught(method.build(groups, 1))) == 12


def test_mopd_mixes_in_the_reward_over_shared_rows(chat: Chat, groups: list[RolloutGroup]) -> None:
    plain = build(chat, groups)
    mixed = build(chat, groups, "policy_gradient.weight=0.3")
    distil, reward = mixed.parts
    assert [mixed.rows[i].teacher_prompt_ids for i in distil.rows] == [row.teacher_prompt_ids for row in plain.rows]
    assert reward.weight == 0.3
    assert len({(row.group_index, row.rollout_index) for row in mixed.rows}) == len(mixed.rows), "a rollout is one row"
    assert {(mixed.rows[i].group_index, mixed.rows[i].rollout_index) for i in reward.rows} == {
        (g, r) for g in (0, 1) for r in range(3)
    }


@pytest.mark.parametrize("method", ["mopd", "sdpo", "grpo", "dpo", "simpo", "verified_sft"])
def test_unjudged_rollouts_are_nobody_s_example(chat: Chat, method: str) -> None:
    """A verifier error is neither rewarded nor punished, and no teacher reads it."""
    given = build(chat, [make_group(chat, [S1, BROKEN, F1, S2, F2])], f"method={method}")
    for row in given.rows:
        if row.teacher_prompt_ids is not None and row.teacher_prompt_ids != row.prompt_ids:
            assert BROKEN[0] not in chat.decode(row.teacher_prompt_ids)
    if method not in ("mopd", "sdpo"):
        assert (0, 1) not in taught(given)


def test_groups_without_anything_to_learn_make_an_empty_lesson(chat: Chat, tmp_path: Path) -> None:
    for method in ("sdpo", "grpo", "dpo", "simpo", "verified_sft"):
        given = build(chat, [make_group(chat, [F1, F2])], f"method={method}")
        assert given.parts == []
