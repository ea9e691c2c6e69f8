"""Which rollouts each method learns from, with what context, reference or advantage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config, UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.losses import objectives
from mopd_nemo.losses.objectives import (
    Aggregation,
    Divergence,
    LogLikelihood,
    PolicyGradient,
    ReferenceKL,
    Suppression,
)
from mopd_nemo.methods.base import make_method
from mopd_nemo.methods.batch import TrainBatch
from mopd_nemo.methods.mopd import Mopd, Sdpo
from mopd_nemo.types import RolloutGroup, TrainExample
from tests.conftest import QUICKSTART, make_group

S1, S2 = ("7+5=2\n\\boxed{2}", 1.0), ("Start with 7.\n+5 gives 2\n\\boxed{2}", 1.0)
F1, F2 = ("7+5=3\n\\boxed{3}", 0.0), ("The result is 2.", 0.0)
BROKEN = ("\\boxed{2}?", None)


VERDICTS = ("failures", "successes")


def config(*overrides: str) -> Config:
    return load_config(QUICKSTART, list(overrides))


def build(chat: Chat, groups: list[RolloutGroup], *overrides: str) -> TrainBatch:
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


def place(example: TrainExample) -> tuple[int, int]:
    return example.group_index, example.rollout_index


def taught(given: TrainBatch) -> set[tuple[int, int]]:
    return {
        (given.examples[i].group_index, given.examples[i].rollout_index) for term in given.terms for i in term.examples
    }


def teacher_text(given: TrainBatch, chat: Chat, group: int, rollout: int) -> str:
    (row,) = [row for row in given.examples if (row.group_index, row.rollout_index) == (group, rollout)]
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
    assert not build(chat, [feedbackless], "method=sdpo").examples


@pytest.mark.parametrize(
    ("settings", "taught_of"),
    [
        (["context=[peers]"], (False, False)),
        ([], (False, True)),
        (["feedback.which=informative"], (False, True)),
        (["feedback.which=all"], (True, True)),
    ],
)
def test_sdpo_reads_the_feedback_that_it_is_told_to(
    chat: Chat, settings: list[str], taught_of: tuple[bool, bool]
) -> None:
    """An all-failed group whose one verdict says that the answer is wrong, and the other why."""
    group = make_group(chat, [F1, F2], feedback="It is wrong.")
    group = replace(group, verdicts=(replace(group.verdicts[0], informative=False), group.verdicts[1]))
    given = build(chat, [group], "method=sdpo", *settings)
    assert taught(given) == {(0, r) for r in (0, 1) if taught_of[r]}
    mixed = make_group(chat, [S1, S2, F1], feedback="It is wrong.")
    assert len(taught(build(chat, [mixed], "method=sdpo", *settings))) == 3


def test_sdpo_is_settings_of_mopd(chat: Chat, groups: list[RolloutGroup]) -> None:
    named = build(chat, groups, "method=sdpo")
    settings = ("context=[peers,feedback]", "peers.successes=1", "peers.failures=0")
    assert named.contexts == build(chat, groups, *settings).contexts
    assert Sdpo.build is Mopd.build


def test_sdpo_s_settings_stand_in_its_config() -> None:
    named = config("method=sdpo")
    assert (named.context, named.peers.successes, named.peers.failures) == (("peers", "feedback"), 1, 0)
    assert named.teacher_reads == "1 successes and 0 failures, feedback"


def test_feedback_that_no_context_names_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"feedback\.when='always' is unused by context=\[peers\]: .* add feedback to context"
    ):
        config("feedback.when=always")


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_mean_is_over_taught_or_over_sampled_responses(
    chat: Chat, groups: list[RolloutGroup], aggregation: Aggregation
) -> None:
    few, all_of_them = (build(chat, groups, f"train.denominator={name}") for name in ("taught", "sampled"))
    assert taught(few) == taught(all_of_them)
    lengths = [len(rollout.response_ids) for group in groups for rollout in group.rollouts]
    for batch, count in ((few, len(taught(few))), (all_of_them, len(lengths))):
        ((term,),) = batch.updates(1)
        weights = batch.token_weights(term, aggregation)
        learned = {i: len(batch.examples[i].response_ids) for i in term.examples}
        assert count < 12 or batch is all_of_them
        for i, length in learned.items():
            total = sum(lengths) if batch is all_of_them else sum(learned.values())
            expected = 1 / total if aggregation == "token_mean" else 1 / (count * length)
            assert weights[i] == pytest.approx([expected] * length)
        assert [batch.examples[i].teacher_prompt_ids for i in term.zero_loss] == [None] * len(term.zero_loss)


@pytest.mark.parametrize("method", ["mopd", "sdpo"])
def test_only_failures_or_only_successes_are_learned_from(chat: Chat, groups: list[RolloutGroup], method: str) -> None:
    everything = build(chat, groups, f"method={method}")
    parts = {name: build(chat, groups, f"method={method}", f"divergence.targets={name}") for name in VERDICTS}
    unjudged = {(0, 3)}
    assert taught(parts["failures"]) == {(0, 1), (1, 0), (1, 2), (2, 0), (2, 1)} & taught(everything)
    assert taught(parts["successes"]) | taught(parts["failures"]) == taught(everything) - unjudged
    for name, part in parts.items():
        assert part.metrics["signal"] == pytest.approx(len(taught(part)) / 12)
        rows = {place(example): example for example in part.examples}
        whole = {place(example): example for example in everything.examples}
        assert all(rows[where] == whole[where] for where in taught(part)), name


@pytest.mark.parametrize("targets", ["failures", "successes"])
def test_rows_that_are_left_out_count_in_the_mean_of_all_that_were_sampled(
    chat: Chat, groups: list[RolloutGroup], targets: str
) -> None:
    gate = f"divergence.targets={targets}"
    few, every = (build(chat, groups, gate, f"train.denominator={name}") for name in ("taught", "sampled"))
    assert taught(few) == taught(every) and len(every.examples) == 12
    weights = every.token_weights(every.terms[0], "sequence_mean")
    total = sum(sum(weights[i]) for i in every.terms[0].examples)
    assert total == pytest.approx(len(taught(every)) / 12)


def test_a_pull_to_the_initial_weights_is_a_term_over_all_examples(chat: Chat, groups: list[RolloutGroup]) -> None:
    for settings in (["method=mopd"], ["method=mopd", "policy_gradient.weight=0.5"], ["method=grpo"], ["method=sdpo"]):
        plain, pulled = (build(chat, groups, *settings, f"reference.kl={kl}") for kl in (0, 0.1))
        assert pulled.examples == plain.examples and pulled.terms[:-1] == plain.terms
        pull = pulled.terms[-1]
        assert (pull.objective, pull.weight) == (ReferenceKL(), 0.1)
        assert pull.examples == tuple(range(len(plain.examples)))


def test_the_control_learns_from_every_rollout_without_a_teacher(chat: Chat, groups: list[RolloutGroup]) -> None:
    given = build(chat, groups, "method=suppress", "suppress.below=0.3")
    assert len(taught(given)) == 12 and given.metrics["signal"] == 1.0
    assert all(row.teacher_prompt_ids is None for row in given.examples)
    assert given.terms[0].objective == Suppression(0.3)


def test_no_teacher_no_term_whatever_the_denominator(chat: Chat) -> None:
    given = build(chat, [make_group(chat, [F1, F2])], "train.denominator=sampled")
    assert given.terms == [] and given.metrics["signal"] == 0.0


def test_opd_reads_the_student_s_prompt_for_every_rollout(chat: Chat, groups: list[RolloutGroup]) -> None:
    given = build(chat, groups, "method=opd", "teacher.path=somewhere")
    assert len(given.examples) == 12
    assert all(row.teacher_prompt_ids == row.prompt_ids for row in given.examples)
    assert given.terms[0].objective == Divergence()


def test_grpo_centres_rewards_in_each_group_of_judged_rollouts(chat: Chat, groups: list[RolloutGroup]) -> None:
    given = build(chat, groups, "method=grpo")
    (term,) = given.terms
    advantages = {
        (given.examples[i].group_index, given.examples[i].rollout_index): given.examples[i].advantage
        for i in term.examples
    }
    third = pytest.approx(1 / 3)
    assert advantages == {
        (0, 0): third,
        (0, 1): pytest.approx(-2 / 3),
        (0, 2): third,
        (1, 0): pytest.approx(-1 / 3),
        (1, 1): pytest.approx(2 / 3),
        (1, 2): pytest.approx(-1 / 3),
    }
    assert {given.examples[i].group_index for i in term.zero_loss} == {2, 3}, "counted in the mean, no pass"
    assert all(row.teacher_prompt_ids is None for row in given.examples) and given.contexts is None
    assert term.objective == PolicyGradient(0.2, 0.28)
    assert given.metrics["signal"] == 0.5


def test_grpo_with_std_has_unit_advantages(chat: Chat) -> None:
    given = build(chat, [make_group(chat, [S1, F1])], "method=grpo", "policy_gradient.divide_by_std=true")
    assert [row.advantage for row in given.examples] == pytest.approx([2**-0.5, -(2**-0.5)])


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_preferences_pair_distinct_successes_and_failures(chat: Chat, groups: list[RolloutGroup], method: str) -> None:
    given = build(chat, [*groups, make_group(chat, [F1, S1, S1, F2, F1])], f"method={method}")
    (term,) = given.terms
    rows = [given.examples[i] for i in term.examples]
    pairs = [(rows[i].group_index, rows[i].rollout_index, rows[i + 1].rollout_index) for i in range(0, len(rows), 2)]
    assert pairs == [(0, 0, 1), (1, 1, 0), (4, 1, 0)]
    assert isinstance(term.objective, objectives.Dpo if method == "dpo" else objectives.Simpo)
    assert all((row.teacher_prompt_ids == row.prompt_ids) == (method == "dpo") for row in given.examples)


def test_verified_sft_takes_each_success_once(chat: Chat, groups: list[RolloutGroup]) -> None:
    given = build(chat, groups, "method=verified_sft")
    assert taught(given) == {(0, 0), (0, 2), (1, 1), (3, 0), (3, 1)}
    assert given.terms[0].objective == LogLikelihood()


def test_gkd_takes_everything_that_the_teacher_wrote(chat: Chat, groups: list[RolloutGroup]) -> None:
    method = make_method(config("method=gkd", "teacher.path=somewhere", "gkd.completions=file"), chat)
    assert not method.samples
    assert len(taught(method.build(groups, 1))) == 12


def test_mopd_mixes_in_the_reward_over_shared_rows(chat: Chat, groups: list[RolloutGroup]) -> None:
    plain = build(chat, groups)
    mixed = build(chat, groups, "policy_gradient.weight=0.3")
    distil, reward = mixed.terms
    assert [mixed.examples[i].teacher_prompt_ids for i in distil.examples] == [
        row.teacher_prompt_ids for row in plain.examples
    ]
    assert reward.weight == 0.3
    assert len({(row.group_index, row.rollout_index) for row in mixed.examples}) == len(mixed.examples), (
        "a rollout is one row"
    )
    assert {(mixed.examples[i].group_index, mixed.examples[i].rollout_index) for i in reward.examples} == {
        (g, r) for g in (0, 1) for r in range(3)
    }


@pytest.mark.parametrize("method", ["mopd", "sdpo", "grpo", "dpo", "simpo", "verified_sft"])
def test_unjudged_rollouts_are_nobody_s_example(chat: Chat, method: str) -> None:
    """A verifier error is neither rewarded nor punished, and no teacher reads it."""
    given = build(chat, [make_group(chat, [S1, BROKEN, F1, S2, F2])], f"method={method}")
    for row in given.examples:
        if row.teacher_prompt_ids is not None and row.teacher_prompt_ids != row.prompt_ids:
            assert BROKEN[0] not in chat.decode(row.teacher_prompt_ids)
    if method not in ("mopd", "sdpo"):
        assert (0, 1) not in taught(given)


def test_groups_without_anything_to_learn_make_an_empty_batch(chat: Chat, tmp_path: Path) -> None:
    for method in ("sdpo", "grpo", "dpo", "simpo", "verified_sft"):
        given = build(chat, [make_group(chat, [F1, F2])], f"method={method}")
        assert given.terms == []


def test_a_contrast_has_successes_in_one_prompt_and_failures_in_another(chat: Chat, groups: list[RolloutGroup]) -> None:
    given = build(chat, groups, "peers.failures=1", "divergence.contrast=0.5")
    assert given.terms[0].objective == Divergence(contrast=0.5)
    for row in given.examples:
        assert row.teacher_prompt_ids is not None
        successes = chat.decode(row.teacher_prompt_ids)
        assert "correct solution" in successes and "A failed attempt" not in successes
        if row.contrast_prompt_ids is not None:
            failures = chat.decode(row.contrast_prompt_ids)
            assert "A failed attempt" in failures and "correct solution" not in failures
    second = {place(row) for row in given.examples if row.contrast_prompt_ids is not None}
    assert taught(given) == taught(build(chat, groups, "peers.failures=0")), "whom successes teach"
    assert second == {(0, 0), (0, 2), (0, 3), (1, 0), (1, 2)}, "of them, those with a failed peer"
    shown = given.contexts[0][0].selection.peers if given.contexts else ()
    assert [peer.kind for peer in shown] == ["success", "failure"], "records and metrics know both"
