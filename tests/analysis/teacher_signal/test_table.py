"""The three readings on prompts made by hand."""

import math

import pytest

from mopd_nemo.analysis.teacher_signal.conditions import CONDITIONS
from mopd_nemo.analysis.teacher_signal.metrics import ScoredPrompt, by_difficulty, one_class_fraction, signal_table

GOOD, BAD = (-0.1, -0.2, -0.8, -0.9), (-0.9, -0.8, -0.2, -0.1)
MIXED = (1.0, 1.0, 0.0, 0.0)


def prompt(
    rewards: tuple[float, ...] = MIXED,
    scores: dict[str, tuple[float | None, ...]] | None = None,
    complete: dict[str, tuple[bool, ...]] | None = None,
) -> ScoredPrompt:
    n = len(rewards)
    return ScoredPrompt(
        rewards,
        tuple(reward >= 0.5 for reward in rewards),
        {name: (scores or {}).get(name, GOOD[:n]) for name in CONDITIONS},
        {name: (complete or {}).get(name, (True,) * n) for name in CONDITIONS},
        (10,) * n,
    )


def test_common_support_leaves_out_what_any_condition_lacks() -> None:
    prompts = [
        prompt(scores={"none": BAD}),
        prompt(scores={"none": BAD}),
        prompt(rewards=(0.0,) * 4),  # one class
        prompt(complete={"2S+1F": (False, False, True, True)}),  # no success with all its peers
        prompt(scores={"all": (None, None, -0.1, -0.2)}),  # no context fitted
        prompt(scores={"1S": (-0.5,) * 4}),  # constant: no correlation
    ]
    common = signal_table(prompts)["common"]
    assert {common[name]["num_prompts"] for name in CONDITIONS} == {2}
    assert common["none"]["auc"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert common["1S"]["auc"]["mean"] == 1.0
    assert common["1S"]["minus"]["none"]["auc"]["mean"] == 1.0
    assert common["none"]["minus"]["2S+1F"]["auc"]["mean"] == -1.0


def test_common_support_uses_the_same_responses_in_every_condition() -> None:
    partly = prompt(scores={"none": (-0.1, -0.9, -0.8, None)}, complete={"all": (True, False, True, True)})
    common = signal_table([partly, partly])["common"]
    assert {common[name]["num_responses"] for name in CONDITIONS} == {4}  # two of each prompt: rows 0 and 2
    assert common["none"]["auc"]["mean"] == 1.0  # row 1, which would be ranked wrong, is out


def test_all_prompts_counts_undefined_as_zero() -> None:
    table = signal_table([prompt(), prompt(rewards=(0.0,) * 4)])
    row = table["all_prompts"]["none"]
    assert row["num_prompts"] == 2 and row["num_responses"] == 8
    assert row["auc"]["mean"] == 0.5 and row["spearman"]["mean"] == pytest.approx(0.5 * 0.8944, abs=1e-3)
    assert row["brier"]["mean"] > 0


def test_own_prompts_drops_prompts_without_the_peers_and_so_flatters() -> None:
    none_won = prompt(rewards=(0.0,) * 4, complete={"1S": (False,) * 4})
    table = signal_table([prompt(), none_won])
    assert table["own_prompts"]["none"]["auc"]["mean"] == 0.5
    assert table["own_prompts"]["1S"]["auc"]["mean"] == 1.0, "same scores, fewer prompts"
    assert table["own_prompts"]["1S"]["num_prompts"] == 1


def test_prompts_are_easy_medium_or_hard() -> None:
    one_right = prompt(rewards=(1.0, 0.0, 0.0, 0.0), scores={"none": (-0.9, -0.1, -0.2, -0.3)})
    result = by_difficulty([prompt(), prompt(rewards=(1.0,) * 4), one_right, prompt(rewards=(0.0,) * 4)])
    assert {name: table["num_prompts"] for name, table in result.items()} == {"easy": 2, "medium": 1, "hard": 1}
    assert result["easy"]["own_prompts"]["none"]["auc"]["mean"] == 0.5, "an undefined one counts 0"
    assert result["medium"]["own_prompts"]["none"]["auc"]["mean"] == 0.0
    assert result["hard"]["own_prompts"]["1S"]["auc"]["mean"] == 0.0
    assert list(by_difficulty([prompt()])) == ["easy"]


def test_nothing_in_common_is_said_and_not_averaged() -> None:
    table = signal_table([prompt(rewards=(1.0,) * 4)])
    assert table["common"]["none"]["num_prompts"] == 0
    assert table["common"]["none"]["auc"]["mean"] is None
    assert table["all_prompts"]["none"]["auc"]["mean"] == 0.0


def test_interval_covers_the_mean_and_narrows_with_prompts() -> None:
    few, many = (signal_table([prompt(), prompt(scores={"none": BAD})] * n)["common"]["none"]["auc"] for n in (4, 64))
    assert few["low"] < 0.5 < few["high"]
    assert many["high"] - many["low"] < 0.5 * (few["high"] - few["low"])
    assert math.isclose(many["mean"], 0.5)


def test_one_class_fractions() -> None:
    prompts = [prompt(), prompt(rewards=(0.0,) * 4), prompt(rewards=(1.0,) * 4), prompt(rewards=(0.0,) * 4)]
    assert one_class_fraction(prompts) == (0.5, 0.25)


def test_shift_is_the_change_of_the_whole_response_by_class() -> None:
    none, peers = (-0.1, -0.3, -0.5, -0.7), (-0.1, -0.2, -0.9, -0.9)
    common = signal_table([prompt(scores={"none": none, "1S": peers})])["common"]
    assert common["none"]["shift"]["failure"]["mean"] == 0.0
    assert common["1S"]["shift"]["success"]["mean"] == pytest.approx(10 * (0.0 + 0.1) / 2)
    assert common["1S"]["shift"]["failure"]["mean"] == pytest.approx(10 * (-0.4 - 0.2) / 2)
