"""The recommendation of a model whose habits are known."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mopd_nemo.preflight.rule import recommend
from tests.preflight.conftest import PLAN

Build = Callable[..., dict[str, Any]]


def test_a_model_that_copies_failures_gets_successes_only(figures_of: Build) -> None:
    found = recommend(figures_of(success=0.9, failure=0.1, both=0.3))
    assert found.clear and found.context == "1s"
    assert found.sentences[0].startswith("Use 1s (1 success)")
    assert any("copies failures: use successes only" in sentence for sentence in found.sentences)
    assert any("config shows 2s+1f" in sentence and "change it" in sentence for sentence in found.sentences)


def test_failures_that_harm_without_being_copied_are_called_harm(figures_of: Build) -> None:
    sentences = recommend(figures_of(success=0.9, failure=0.1, both=0.3, copies=0.0)).sentences
    assert any("Failures harm this model: use successes only" in sentence for sentence in sentences)


def test_a_model_that_learns_from_failures_is_shown_them(figures_of: Build) -> None:
    found = recommend(figures_of(success=0.55, failure=0.5, both=0.95))
    assert found.clear and found.context == "1s+1f"  # 2s+1f and all cannot be told from it, and show more
    assert any("Failures beside successes help" in sentence for sentence in found.sentences)
    assert any("Cannot tell 1s+1f, 2s+1f and all apart" in sentence for sentence in found.sentences)


def test_no_difference_is_said_to_be_none(figures_of: Build) -> None:
    found = recommend(figures_of(success=0.5, failure=0.5, both=0.5))
    assert not found.clear and found.context is not None
    assert found.sentences[0].startswith("Cannot tell whether any context helps")
    assert any("Cannot tell whether failures" in sentence for sentence in found.sentences)


def test_where_all_harm_the_least_harm_is_named(figures_of: Build) -> None:
    found = recommend(figures_of(alone=0.6, success=0.3, failure=0.05, both=0.1))
    assert not found.clear and found.context in ("1s", "2s")
    assert found.sentences[0].startswith("Every context harms this model. The least harm does")


def test_too_few_problems_give_no_recommendation(figures_of: Build) -> None:
    found = recommend(figures_of(replace(PLAN, problems=5, max_groups=8), alone=0.15))
    assert found.context is None
    assert found.sentences[0].startswith("Cannot tell: ") and "leave out the rarest context" in found.sentences[0]


def test_failures_alone_are_judged_where_nothing_is_beside_them(figures_of: Build) -> None:
    found = recommend(figures_of(replace(PLAN, contexts=("1s", "1f"))))
    assert any("copies failures" in s and "no peers: 1f" in s for s in found.sentences)


def test_signs_of_a_bad_teacher_are_cautions(figures_of: Build) -> None:
    found = figures_of(replace(PLAN, contexts=("1s",)))
    assert recommend(found).cautions == ()
    own = found["contexts"]["1s"]
    own["flatter"] = own["cut"] = {"mean": 0.1, "low": 0.05, "high": 0.2, "num": 24}
    own["complete"] = 0.1
    cautions = recommend(found).cautions
    assert [
        word
        for word, caution in zip(("less sure", "cut at the limit", "Only 10%"), cautions, strict=True)
        if word in caution
    ]
    assert len(cautions) == 3
