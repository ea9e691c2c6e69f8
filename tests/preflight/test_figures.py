"""From planted habits and hand-made rows to figures."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config
from mopd_nemo.preflight.figures import cell, figures
from mopd_nemo.preflight.measure import Survey
from tests.conftest import make_group
from tests.preflight.conftest import PLAN

Build = Callable[..., dict[str, Any]]


def test_planted_habits_are_found(figures_of: Build) -> None:
    found = figures_of(success=0.9, failure=0.1, both=0.2)
    contexts = found["contexts"]
    assert found["num_problems"] == 24
    for name, chance in (("none", 0.5), ("1s", 0.9), ("1f", 0.1), ("2s+1f", 0.2)):
        assert contexts[name]["right"]["mean"] == pytest.approx(chance, abs=0.1)
        assert contexts[name]["right"]["low"] < contexts[name]["right"]["mean"] < contexts[name]["right"]["high"]
    assert contexts["1s"]["gap"]["mean"] == pytest.approx(
        contexts["1s"]["right"]["mean"] - contexts["none"]["right"]["mean"]
    )
    assert found["minus"]["1s"]["1f"]["low"] > 0 > found["minus"]["1f"]["1s"]["high"]
    assert contexts["1s"]["complete"] > 0.9 and contexts["1s"]["teacher_tokens"] > 0


def row(context: str, **values: Any) -> dict[str, Any]:
    return {
        "problem": "p",
        "context": context,
        "texts": ["x", "a ", "b", "a"],
        "success": [True, False, None, False],
        "finished": [True, True, False, False],
        "tokens": [2, 2, 4, 2],
        "logprobs": [-1.0, -1.0, -2.0, -1.0],
        "shown_failures": [],
        "targets": [True, True, False],
        "scores": [-3.0, -4.0, -5.0],
        "seconds": {"write": 1.0, "score": 0.5},
    } | values


def test_each_figure_by_hand(chat: Chat, settings: Config) -> None:
    plan = replace(PLAN, contexts=("1f",), samples=4)
    found = Survey(plan, chat, settings)
    found.add([make_group(chat, [("s", 1.0), ("t", 1.0), ("a", 0.0), ("error", None)])])
    rows = {
        ("p", "none"): row("none"),
        ("p", "1f"): row("1f", shown_failures=["a"], success=[True, True, True, False], scores=[-2.0, -7.0, -6.5]),
    }
    contexts = figures(found, rows, settings, plan)["contexts"]
    own, plain = contexts["1f"], contexts["none"]
    assert plain["right"]["mean"] == pytest.approx(1 / 3)  # what could not be judged does not count
    assert own["gap"]["mean"] == pytest.approx(3 / 4 - 1 / 3)
    assert plain["entropy"]["mean"] == pytest.approx(0.5) and plain["unfinished"]["mean"] == 0.5
    assert own["copies"]["mean"] == 0.5 and plain["copies"]["mean"] is None and own["copies_without"]["mean"] == 0.5
    assert plain["auc"]["mean"] == 1.0 and own["auc"]["mean"] == 0.5
    assert own["nats"]["mean"] == pytest.approx((1.0 - 3.0) / 2 + 1.5)
    per_step = settings.rollout.num_prompts_per_step * settings.rollout.num_rollouts_per_prompt
    assert own["complete"] == own["signal"] == pytest.approx(2 / 3)  # the failure has no other failure to read
    assert own["teacher_seconds"] == pytest.approx(per_step * 2 / 3 * 0.5 / 3)


def test_an_undefined_value_is_left_out_and_counted() -> None:
    assert cell([1.0, float("nan"), 1.0]) == {"mean": 1.0, "low": 1.0, "high": 1.0, "num": 2}
    assert cell([float("nan")])["mean"] is None
