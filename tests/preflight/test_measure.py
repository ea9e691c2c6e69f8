"""Sampling until enough problems have every context, and rows that do not depend on where the work was stopped."""

from dataclasses import replace
from typing import Any

import pytest

from mopd_nemo.chat import Chat, with_prompt_ids
from mopd_nemo.config import Config
from mopd_nemo.preflight.measure import Plan, Survey, measure, sample_groups
from mopd_nemo.types import Problem
from mopd_nemo.verifiers.pool import VerifierPool
from tests.preflight.conftest import PLAN
from tests.preflight.planted import PlantedEngine, arithmetic

SMALL = replace(PLAN, contexts=("1s", "1s+1f"), problems=12, samples=8, max_groups=32)


@pytest.fixture(scope="module")
def problems(chat: Chat) -> list[Problem]:
    return with_prompt_ids(arithmetic(64), chat, 128)


def surveyed(chat: Chat, settings: Config, problems: list[Problem], plan: Plan, **habits: float) -> Survey:
    found = Survey(plan, chat, settings)
    engine: Any = PlantedEngine(chat, problems, **habits)
    with VerifierPool(settings.verifier, {"arithmetic"}) as verifiers:
        list(sample_groups(problems, engine, verifiers, settings, plan, found))
    return found


def test_sampling_stops_when_it_has_enough(chat: Chat, settings: Config, problems: list[Problem]) -> None:
    found = surveyed(chat, settings, problems, SMALL)
    assert len(found.cases) == 12 and len(found.groups) == 16  # two steps of eight problems
    assert len({group.problem.id for group in found.groups}) == 16


def test_sampling_gives_up_at_its_limit(chat: Chat, settings: Config, problems: list[Problem]) -> None:
    found = surveyed(chat, settings, problems, SMALL, alone=1.0)
    assert len(found.groups) == 32 and found.cases == []  # a group without a failure has no 1s+1f


def test_rows_are_the_same_wherever_the_work_was_stopped(chat: Chat, settings: Config, problems: list[Problem]) -> None:
    found = surveyed(chat, settings, problems, SMALL)
    engine: Any = PlantedEngine(chat, problems)
    with VerifierPool(settings.verifier, {"arithmetic"}) as verifiers:
        whole = without_times(measure(found.cases, engine, verifiers, settings, SMALL))
        assert len(whole) == 12 * 3
        for stop in (0, 5, 8, 30):
            kept = whole[:stop]
            done = {(row["problem"], row["context"]) for row in kept}
            assert kept + without_times(measure(found.cases, engine, verifiers, settings, SMALL, done)) == whole
        calls = engine.calls
        everything = {(row["problem"], row["context"]) for row in whole}
        assert list(measure(found.cases, engine, verifiers, settings, SMALL, everything)) == []
    assert engine.calls == calls


def without_times(rows: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
