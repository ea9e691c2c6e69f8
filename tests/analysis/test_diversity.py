"""Diversity metrics by hand, on code and on prose."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest

from mopd_nemo.analysis.diversity import (
    as_many,
    ast_distance,
    compare,
    distinct,
    distinct_at,
    extract_code,
    ngram_counts,
    self_bleu,
    tokenize,
    unique_ratio,
    write_result,
)
from mopd_nemo.config import UserError
from mopd_nemo.run.rollouts import RecordedGroup


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("Say ```python\nx = 1\n``` done", "x = 1"),
        ("```\nfirst\n```\nthen\n```python\n second \n```", "second"),
        ("no block at all ", "no block at all"),
        ("```java\nint x;\n```", "java\nint x;"),
        ("```python\nnever closed", "```python\nnever closed"),
    ],
)
def test_code_is_the_last_fenced_block(response: str, code: str) -> None:
    assert extract_code(response) == code


def test_tokens_are_names_numbers_and_signs() -> None:
    assert tokenize("foo_1 = 12.5+é2\n") == ["foo_1", "=", "12", ".", "5", "+", "é2"]


def test_distinct_counts_no_ngram_across_responses() -> None:
    counts = [ngram_counts([["a", "b", "a"], ["b", "a"]], n) for n in (1, 2)]
    assert distinct(counts[0]) == 2 / 5
    assert distinct(counts[1]) == 2 / 3  # ab, ba, ba; "a b" between the two responses is nobody's
    assert distinct(ngram_counts([["a"]], 2)) is None


def test_rarefaction_is_the_mean_over_all_draws() -> None:
    counts: Counter[tuple[str, ...]] = Counter({("a",): 3, ("b",): 2, ("c",): 1})
    items = list(counts.elements())
    for size in range(1, 7):
        draws = [len(set(draw)) / size for draw in itertools.combinations(items, size)]
        assert distinct_at(counts, size) == pytest.approx(sum(draws) / len(draws))
    assert distinct_at(counts, 6) == pytest.approx(distinct(counts))
    assert distinct_at(counts, 7) is None and distinct_at(counts, 0) is None


def test_ast_distance_by_hand() -> None:
    # x = 1 and y = 2 have the same node types; pass shares only Module with them
    assert ast_distance(["x = 1", "y = 2"]) == 0.0
    # {Module, Assign, Name, Store, Constant} against {Module, Pass}: 1 shared of 6
    assert ast_distance(["x = 1", "pass"]) == pytest.approx(1 - 1 / 6)
    assert ast_distance(["x = 1", "y = 2", "pass"]) == pytest.approx((0 + 5 / 6 + 5 / 6) / 3)


def test_programs_that_do_not_parse_are_left_out() -> None:
    broken = ["def f(:", "x = \0", "(" * 5000]
    assert ast_distance([*broken, "x = 1"]) is None
    assert ast_distance([*broken, "x = 1", "y = 2"]) == 0.0


def test_self_bleu_by_hand() -> None:
    same = ["a", "b", "c", "d", "e"]
    assert self_bleu([same, same]) == pytest.approx(1.0)
    assert self_bleu([["a"] * 5, ["b"] * 5]) == 0.0
    one, two = ["a", "b", "c", "d"], ["a", "b", "x", "d"]
    # unigrams 3/4, bigrams (1+1)/(3+1), trigrams (0+1)/(2+1), 4-grams (0+1)/(1+1); equal lengths
    expected = (3 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25
    assert self_bleu([one, two]) == pytest.approx(expected)
    # a short response is penalised: exp(1 - 5/2)
    short = (1 * 2 / 2 * 1 / 1 * 1 / 1) ** 0.25 * math.exp(1 - 5 / 2)
    long = (2 / 5 * 2 / 5 * 1 / 4 * 1 / 3) ** 0.25
    assert self_bleu([same, ["a", "b"]]) == pytest.approx((short + long) / 2)
    assert self_bleu([same]) is None and self_bleu([same, []]) is None


def test_unique_ratio() -> None:
    assert unique_ratio(["a", "b", "a", "a"]) == 0.5


def group(problem: str, responses: list[str], step: int = 0) -> RecordedGroup:
    rows = tuple(
        {"step": step, "problem": problem, "rollout": i, "response": text, "reward": float(i == 0), "outcome": "wrong"}
        | {"success": i == 0}
        for i, text in enumerate(responses)
    )
    return RecordedGroup(f"{step}/{problem}", problem, rows)


def outcomes(problem: str, right: list[str], wrong: list[str]) -> RecordedGroup:
    rows = [{"response": text, "success": text in right} for text in [*right, *wrong]]
    return RecordedGroup(f"0/{problem}", problem, tuple(rows))


SAME = ["x = 1"] * 4
VARIED = ["x = 1", "for i in y:\n    pass", "import os", "def f(): return 2"]


def test_methods_are_compared_on_common_prompts_with_as_many_responses() -> None:
    found = compare(
        {
            "same": [group("p", SAME), group("q", SAME), group("only here", SAME)],
            "varied": [group("q", [*VARIED, "extra"]), group("p", VARIED)],
        },
        samples=None,
        code=True,
    )
    result = found["readings"]["all"]
    assert result["num_prompts"] == 2 and found["samples"] == 4
    same, varied = result["methods"]["same"], result["methods"]["varied"]
    assert same["ast_distance"]["mean"] == 0.0 and same["unique"]["mean"] == 0.25
    assert same["self_bleu_4"]["mean"] == pytest.approx(1.0)
    for name in ("distinct_1", "distinct_2", "distinct_1_equal", "distinct_2_equal", "ast_distance", "unique"):
        assert varied[name]["mean"] > same[name]["mean"], name
        assert result["minus_first"]["varied"][name]["mean"] == pytest.approx(varied[name]["mean"] - same[name]["mean"])
    assert same["success"]["mean"] == 0.25


def test_a_collapsed_method_looks_diverse_until_successes_are_matched() -> None:
    """Wrong in four ways, and right in one, against right in two: more diverse among all, less among the right."""
    ways = ["x = 1", "x = 1", "x = 2 + y", "x = 2 + y"]
    wrong = [f"def f{i}(a):\n    return {'a + ' * i}a" for i in range(6)]
    groups = {
        "healthy": outcomes("p", right=[*ways, "x = 1", "x = 1"], wrong=wrong[:2]),
        "collapsed": outcomes("p", right=["x = 1", "x = 1"], wrong=wrong),
    }
    readings = compare({label: [group] for label, group in groups.items()}, None, True)["readings"]

    def difference(reading: str, metric: str) -> float:
        return readings[reading]["minus_first"]["collapsed"][metric]["mean"]

    assert difference("all", "ast_distance") > 0 and difference("all", "self_bleu_4") < 0
    assert readings["equal_accuracy"]["methods"]["healthy"]["success"]["mean"] == 0.5
    assert readings["equal_accuracy"]["methods"]["collapsed"]["success"]["mean"] == 0.5
    assert difference("successes", "unique") == 0.0, "the first two of the healthy one's successes are alike, too"
    assert difference("successes", "solved") == 0.0


def test_as_many_takes_the_first_of_each_outcome_and_no_undecided_ones() -> None:
    prompt = {
        "a": [{"success": s, "n": n} for n, s in enumerate([None, True, False, True, False])],
        "b": [{"success": s, "n": n} for n, s in enumerate([False, False, False, True, None])],
    }
    numbers = {label: [row["n"] for row in rows] for label, rows in as_many(prompt, (True, False)).items()}
    assert numbers == {"a": [1, 2, 4], "b": [3, 0, 1]}
    assert [len(rows) for rows in as_many(prompt, (True,)).values()] == [1, 1]


def test_prompts_without_two_common_successes_are_left_out() -> None:
    readings = compare({"a": [group("p", SAME)], "b": [group("p", VARIED)]}, None, True)["readings"]
    assert readings["all"]["num_prompts"] == 1 and readings["successes"]["num_prompts"] == 0
    assert readings["successes"]["methods"]["a"]["unique"]["mean"] is None


def test_equal_length_takes_the_advantage_of_short_responses_away() -> None:
    words = [f"w{i % 20}" for i in range(400)]
    short, long = [" ".join(words[:40])] * 2, [" ".join(words)] * 2
    methods = compare({"long": [group("p", long)], "short": [group("p", short)]}, None, False)
    methods = methods["readings"]["all"]["methods"]
    plain = methods["short"]["distinct_1"]["mean"] / methods["long"]["distinct_1"]["mean"]
    equal = methods["short"]["distinct_1_equal"]["mean"] / methods["long"]["distinct_1_equal"]["mean"]
    assert plain == pytest.approx(10.0) and 0.95 < equal < 1.05


def test_prose_has_no_ast_and_the_files_say_so(tmp_path: Path) -> None:
    prose = ["this is not a program", "nor is this one"]
    result = compare({"a": [group("p", prose)], "b": [group("p", prose)]}, None, True)
    assert result["readings"]["all"]["methods"]["a"]["ast_distance"] == {
        "mean": None,
        "low": None,
        "high": None,
        "num_prompts": 0,
    }
    written = write_result(result, tmp_path)
    assert "| AST Jaccard distance | – | – |" in written[0].read_text()
    assert json.loads((tmp_path / "diversity.json").read_text()) == result
    assert all(path.stat().st_size > 0 for path in written)


@pytest.mark.parametrize(
    ("methods", "samples", "message"),
    [
        ({"a": [group("p", SAME)], "b": [group("q", SAME)]}, None, "no problem is in all of them"),
        ({"a": [group("p", SAME)]}, 5, "--samples 5: some problem has only 4"),
        ({"a": [group("p", SAME), group("p", SAME, step=2)]}, None, "a: a problem occurs in several steps"),
    ],
)
def test_what_cannot_be_compared_is_refused(methods: dict, samples: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare(methods, samples, True)
