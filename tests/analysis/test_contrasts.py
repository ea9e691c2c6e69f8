import numpy as np
import pytest

from mopd_nemo.analysis.contrasts import Contrast, contrasts, interval_cell

RNG = np.random.default_rng(0)
DIFFICULTY = RNG.uniform(0.2, 0.8, 30)


def seeds(shift: float, *names: int, spread: float = 0.01) -> dict[int, np.ndarray]:
    """Runs of a setting: the difficulty of each problem, a shift, and little noise, the same for a seed."""
    return {
        seed: DIFFICULTY + shift + np.random.default_rng(seed).normal(0, 0.1) + RNG.normal(0, spread, 30)
        for seed in names
    }


def readings(values: dict[str, dict[int, np.ndarray]], margin: float = 0.02) -> dict[str, str]:
    found = contrasts(values, next(iter(values)), margin)
    return {each.setting: each.reading(margin) for each in found.against_baseline}


def test_readings() -> None:
    values = {
        "base": seeds(0.0, 0, 1, 2),
        "up": seeds(0.2, 0, 1, 2),
        "down": seeds(-0.2, 0, 1, 2),
        "same": seeds(0.0, 0, 1, 2),
        "a little": seeds(0.01, 0, 1, 2, spread=0.001),
        "noisy": seeds(0.05, 0, 1, 2, spread=0.5),
    }
    assert readings(values) == {
        "up": "higher",
        "down": "lower",
        "same": "equal within ±2",
        "a little": "higher, by less than 2",
        "noisy": "not told apart",
    }


def test_common_seeds_take_the_noise_of_the_seed_out() -> None:
    base = seeds(0.0, 0, 1, 2, 3)
    paired = contrasts({"base": base, "other": seeds(0.05, 0, 1, 2, 7)}, "base").against_baseline[0]
    unpaired = contrasts({"base": base, "other": seeds(0.05, 4, 5, 6, 7)}, "base")
    assert paired.seeds == (0, 1, 2) and paired.reading(0.02) == "higher"
    (other,) = unpaired.against_baseline
    assert other.seeds == () and other.reading(0.02) == "not told apart"
    assert other.estimate and paired.estimate and other.estimate.error > 5 * paired.estimate.error
    assert "Not paired by seed, for want of two seeds that both sides have: other." in unpaired.note


def test_one_seed_among_several_says_what_cannot_be_said() -> None:
    found = contrasts({"base": seeds(0.0, 0, 1, 2), "one": seeds(0.3, 1)}, "base")
    (one,) = found.against_baseline
    assert one.estimate is None and one.reading(0.02) == "one seed: cannot be said"
    assert one.mean == pytest.approx(0.3, abs=0.02), "the difference to the run of the same seed"
    assert "One seed alone (one) says nothing about others" in found.note
    assert found.table()[1] == [["one", f"{100 * one.mean:+.1f}", "–", "–", "one seed: cannot be said", "1", "–"]]


def test_single_seeds_are_compared_over_problems_alone() -> None:
    found = contrasts({"base": seeds(0.0, 0), "up": seeds(0.3, 0), "elsewhere": seeds(0.3, 1)}, "base")
    assert not found.over_seeds
    assert [each.seeds for each in found.against_baseline] == [(0,), ()]
    assert all(each.reading(0.02) == "higher" for each in found.against_baseline)
    assert "what other seeds would give cannot be said" in found.note and "other problems of this kind" in found.note


def test_more_comparisons_ask_for_more() -> None:
    values = {"base": seeds(0.0, 0, 1, 2), "a": seeds(0.03, 0, 1, 2, spread=0.1)}
    (alone,) = contrasts(values, "base").against_baseline
    among = contrasts(values | {name: seeds(0.0, 0, 1, 2) for name in "bcde"}, "base").against_baseline[0]
    assert among.p > alone.p
    assert among.detectable and alone.detectable and among.detectable > alone.detectable
    assert "corrected for 5 comparisons (Holm)" in contrasts(values | dict.fromkeys("bcde", values["a"]), "base").note


def test_the_margin_is_a_setting() -> None:
    values = {"base": seeds(0.0, 0, 1, 2), "near": seeds(0.03, 0, 1, 2)}
    assert readings(values, 0.02) == {"near": "higher"}
    assert readings(values, 0.05) == {"near": "higher, by less than 5"}


def test_a_lone_setting_has_an_interval_and_no_contrast() -> None:
    found = contrasts({"base": seeds(0.0, 0, 1)}, "base")
    assert found.against_baseline == [] and "TOST" not in found.note
    assert found.means["base"] is not None


def test_intervals_of_means_stay_percentages() -> None:
    sure = contrasts({"base": {0: np.array([1.0, 1.0, 0.9]), 1: np.array([1.0, 0.8, 1.0])}}, "base").means["base"]
    assert interval_cell(sure).endswith(" to 100.0") and interval_cell(None) == "–"
    assert Contrast("a", 0.1, None, ()).reading(0.02) == "one seed: cannot be said"
