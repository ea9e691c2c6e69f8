"""Rollouts that are drawn while the student changes."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import pytest

from mopd_nemo.engines.base import InFlight, Request, Sampling
from mopd_nemo.engines.local import engine as module
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.losses.objectives import LogLikelihood
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import Rollout, TrainExample

Make = Callable[..., LocalEngine]
PROMPTS = [(5, 6, 7), (9, 8, 7, 6, 5, 4, 3), (11,), (12, 13)]
ASKED = Request(PROMPTS, 3, Sampling(20), "a")


def learn(engine: LocalEngine, rollouts: list[list[Rollout]]) -> None:
    rows = [TrainExample(0, 0, PROMPTS[0], rollout.response_ids, rollout.logprobs) for rollout in rollouts[0]]
    batch = TrainBatch(rows, [LossTerm(LogLikelihood(), tuple(range(len(rows))))])
    engine.update(batch, [None] * len(rows), learning_rate=1e-2)


def test_rollouts_ahead_are_those_of_the_weights_that_they_began_with(make: Make, monkeypatch: Any) -> None:
    engine, began, updated = make(), threading.Event(), threading.Event()
    before, whole = engine.generate(ASKED), module.sample

    def slow(*arguments: Any, **settings: Any) -> Any:
        began.set()
        assert updated.wait(30)
        return whole(*arguments, **settings)

    arrived: dict[tuple[int, int], Rollout] = {}
    with monkeypatch.context() as patch:
        patch.setattr(module, "sample", slow)
        in_flight = engine.generate_ahead(ASKED, lambda p, s, r: arrived.update({(p, s): r}))
        assert began.wait(30)
        learn(engine, before)
        updated.set()
        assert in_flight.wait() == before
    assert arrived == {(p, s): r for p, group in enumerate(before) for s, r in enumerate(group)}
    after = engine.generate(ASKED)
    assert after != before
    assert engine.generate_ahead(ASKED, lambda *_: None).wait() == after


def test_what_the_thread_raises_is_raised_where_it_is_waited_for() -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("no memory left")

    with pytest.raises(ValueError, match="no memory left"):
        InFlight(fail).wait()


def test_a_stop_ends_the_thread_at_its_next_rollout() -> None:
    def endless(_: Any, on_rollout: Any) -> Any:
        for number in range(10_000):
            time.sleep(0.01)
            on_rollout(0, number, Rollout((1,), "", True, ()))

    in_flight = InFlight(endless)
    started = time.monotonic()
    in_flight.stop()
    assert time.monotonic() - started < 5
    with pytest.raises(CancelledError):
        in_flight.wait()
