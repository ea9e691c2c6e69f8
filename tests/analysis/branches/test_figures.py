"""Points and shares of hand-made groups whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest

from mopd_nemo.analysis.branches.figures import Attempt, Told, branch_figures, first_new_part, first_new_token, near
from mopd_nemo.analysis.branches.output import left_out, near_figure, profile_figure, to_markdown


@pytest.mark.parametrize(
    ("ids", "others", "point"),
    [
        ([1, 2, 3], [[1, 2, 4], [1, 5]], 2),
        ([9, 2, 3], [[1, 2, 4]], 0),  # nothing in common
        ([1, 2, 9], [[1, 2, 3, 4]], 2),  # at its end
        ([1, 2], [[1, 2, 3]], None),  # cut off: a success begins like all of it
        ([1, 2, 3, 4], [[1, 2, 3]], 3),
        ([1, 2], [], None),
    ],
)
def test_tokens_leave_all_others(ids: list[int], others: list[list[int]], point: int | None) -> None:
    assert first_new_token(ids, others) == point


def test_a_program_leaves_others_where_its_first_new_statement_begins() -> None:
    texts = ["```python\n", "def f(x):", "\n   ", " y = 'é'", "; z", " = 1\n", "    return", " y", "\n```", "<end>"]
    text = "".join(texts[:-1])
    right = "```python\ndef f(x):\n    # the same\n    y='é'; z = 2\n    return y\n```"
    assert first_new_part(text, [right], texts) == 4, "after the é, which is two bytes, `z` begins"
    assert first_new_part(text, [right.replace("return y", "return z"), right.replace("2", "1")], texts) is None
    assert first_new_part(text, [right.replace("2", "1").replace("return y", "return z")], texts) == 6


def test_other_text_leaves_others_where_its_first_new_sentence_begins() -> None:
    texts = ["7+5", " is 12.", " So", " it is 1.", "<end>"]
    assert first_new_part("".join(texts[:-1]), ["7+5 is 12. So it is 2."], texts) == 2


def test_windows_end_with_the_response() -> None:
    values_T = np.array([4.0, 0.0, 1.0, 0.0, 3.0])
    assert near(values_T, np.array([0, 2, 4]), 1).tolist() == [0.5, 0.125, 0.375]
    assert near(values_T, 2, 9) == 1.0
    assert np.isnan(near(np.zeros(3), 1, 1))


def attempt(success: bool, at: int | None, log_ratio: list[float], **told: list[float]) -> Attempt:
    """Of a teacher in context `a`, whose divergence is half its log-ratio everywhere, and of others by name."""
    said = {"a": log_ratio, **told}
    return Attempt(
        success,
        {"tokens": at, "parts": None},
        np.ones(len(log_ratio)),
        {name: Told(np.array(values), np.abs(values) / 2) for name, values in said.items()},
    )


def figures(*groups: list[Attempt], contexts: tuple[str, ...] = ("a",), controls: dict[str, str] | None = None) -> dict:
    return branch_figures(groups, contexts, controls or {}, [1])


def test_shares_of_a_known_case() -> None:
    one = [
        attempt(False, 5, [0, 0, 0, 0, 1, -6, 1, 0, 0, 2]),  # 0.8 within a token of its point
        attempt(False, 9, [1, 0, 0, 0, 0, 0, 0, 0, 1, -2]),  # 0.75, of a window of two
        attempt(True, 0, [0, 0, 0, 1, 0, 3, 0, 0, 0, 4]),
        attempt(False, None, [9.0] * 10),  # leaves the successes nowhere
    ]
    other = [attempt(False, 0, [-1, 0, 0, 1]), attempt(True, None, [1, 0, 0, 0])]
    result = figures(one, other)
    assert result["points"]["tokens"] == {
        "failures": 4, "with_point": 3, "common": 3, "at_first_token": 1, "at_last_token": 1,
        "quartiles": {"token": [2.5, 5, 7], "place": pytest.approx([5 / 18, 5 / 9, 7 / 9]), "length": [7, 10, 10]},
    }  # fmt: skip
    for measure in ("log_ratio", "divergence"):
        cells = result["near"]["tokens"][measure]["1"]["common"]["a"]
        assert cells["near"]["mean"] == pytest.approx((0.775 + 0.5) / 2), "a mean over problems, not over failures"
        assert cells["shuffled"]["mean"] == pytest.approx((0.25 + 0.5) / 2)
        # The first has its point at 5/9 of its length: tokens 4 to 6 of the success; the second at the end.
        assert cells["in_successes"]["mean"] == pytest.approx(((3 / 8 + 4 / 8) / 2 + 1) / 2)
        # The other problem branches at its first token, so 0 to 1 count here; there it is 1 to 3, and 2 to 3.
        assert cells["elsewhere"]["mean"] == pytest.approx((0.25 / 2 + 0.5) / 2)
        assert cells["minus_shuffled"]["mean"] == pytest.approx((0.525 + 0) / 2)
        assert cells["surprise"]["mean"] == pytest.approx((0.25 + 0.5) / 2)
        assert cells["successes_minus_shuffled"]["mean"] == pytest.approx(-0.2)
        assert (cells["failures"], cells["near"]["problems"]) == (3, 2)
    at_point = result["at_point"]["tokens"]["a"]
    assert at_point["failures"]["mean"] == pytest.approx((-4 - 1) / 2) and at_point["successes"]["mean"] == 0
    profile = {p["distance"]: p for p in result["profile"]["tokens"]["log_ratio"]["a"]}
    assert profile[0]["mean"] == pytest.approx(((6 / 1.0 + 2 / 0.4) / 2 + 1 / 0.5) / 2)
    assert profile[2]["problems"] == 2 and profile[5]["problems"] == 0
    assert result["near"]["parts"]["log_ratio"]["1"]["common"]["a"]["near"]["mean"] is None


def test_contexts_are_compared_on_the_failures_that_all_have() -> None:
    told = {"b": [0.0, 4.0, 0.0, 4.0]}
    one = [
        attempt(False, 1, [0, 1, 0, 1], **told),
        attempt(False, 1, [0, 1, 0, 0]),
        attempt(True, None, [1, 1, 1, 1], **told),
    ]
    tables = figures(one, contexts=("a", "b", "never"), controls={"a": "b"})["near"]["tokens"]["log_ratio"]["1"]
    assert set(tables["own"]) == {"a", "b"}, "a context that never says anything has no row"
    assert tables["common"]["a"]["failures"] == 1 and tables["own"]["a"]["failures"] == 2
    assert tables["common"]["a"]["near"]["mean"] == 0.5 and tables["own"]["a"]["near"]["mean"] == 0.75
    assert tables["common"]["a"]["minus_control"]["mean"] == 0.0


def test_a_signal_without_a_place_gives_chance() -> None:
    """Noise whose places are drawn: the share near a point is what shuffling gives, and the same as anywhere else."""
    rng = np.random.default_rng(0)
    groups = [
        [attempt(False, int(rng.integers(40)), rng.exponential(size=40).tolist()) for _ in range(4)]
        + [attempt(True, int(rng.integers(40)), rng.exponential(size=40).tolist())]
        for _ in range(60)
    ]
    cells = figures(*groups)["near"]["tokens"]["log_ratio"]["1"]["common"]["a"]
    for name in ("shuffled", "elsewhere", "in_successes"):
        assert cells[f"minus_{name}"]["low"] < 0 < cells[f"minus_{name}"]["high"]


def test_silence_is_what_is_not_finite_or_nothing_but_rounding() -> None:
    assert Told(np.array([1e-5, -1e-5]), np.zeros(2)).silent
    assert Told(np.array([np.inf, 1.0]), np.zeros(2)).silent
    assert not Told(np.array([0.0, -0.1]), np.zeros(2)).silent


def test_a_page_says_what_there_is_and_what_there_is_not() -> None:
    groups = [[attempt(False, 1, [0, 0], **{"1s": [0, 1]}), attempt(True, None, [0])]]
    result = {"about": {"student": "m"}, "labels": {"1s": "1 success"}, "controls": {}}
    result |= branch_figures(groups, ("1s", "2s"), {}, [5])
    text = to_markdown(result)
    assert "1 of 1 failures have such a point" in text and "| 1 success | 1.000 (too few problems) |" in text
    assert "0 of 1 failures have such a point" in text and profile_figure(result, "parts") is None
    assert profile_figure(result, "tokens") is not None and near_figure(result, "tokens") is None


def test_why_contexts_are_not_compared_is_said() -> None:
    groups = [
        [attempt(False, 1, [0, 0, 3], **{"1s": [0, 1, 0]}), attempt(True, None, [0])],
        [attempt(False, 1, [0, 0, 3], **{"1f": [0, 1, 0]}), attempt(True, None, [0])],
    ]
    result = {
        "controls": {"1s": "1s, others", "2s": "2s, others"},
        "labels": {"none": "no peers", "1s": "1 success", "1f": "1 failure", "2s": "2 successes"},
    }
    result |= branch_figures(groups, ("none", "1s", "1f", "2s"), {}, [5])
    reason = left_out(result, "tokens")
    assert reason.startswith("No failure has all the peers of every context") and "1 success 1, 1 failure 1" in reason
    assert "Nobody has all the peers of 2 successes, or" in reason and "--contexts" in reason
    assert left_out(result, "parts").startswith("None of the 2 failures has such a point")
    alone = branch_figures(groups[:1], ("none", "1s"), {}, [5])
    assert left_out({"labels": {"1s": "1 success"}, "controls": {}, **alone}, "tokens") == ""
    missed = {"labels": {"1s": "1 success", "2s": "2 successes"}, "controls": {"1s": "", "2s": ""}, **alone}
    assert left_out(missed, "tokens").startswith("Nobody has all the peers of 2 successes, or")
