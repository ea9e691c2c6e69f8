import math
import signal

import pytest

from mopd_nemo.run.stop import REMEMBERED, StopRequest


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def work(stop: StopRequest, clock: Clock, name: str, seconds: float) -> None:
    with stop.timed(name):
        clock.now += seconds


def test_a_step_starts_only_if_it_and_a_save_would_end_in_time() -> None:
    clock = Clock()
    stop = StopRequest(100, clock=clock)
    work(stop, clock, "step", 30)
    work(stop, clock, "save", 10)
    work(stop, clock, "evaluation", 21)  # now 61 of 100
    assert not stop.leaves_time_for("step") and stop.leaves_time_for("evaluation")
    clock.now = 60
    assert stop.leaves_time_for("step")


def test_what_was_never_done_counts_as_nothing_until_the_deadline_is_there() -> None:
    clock = Clock()
    stop = StopRequest(10, clock=clock)
    clock.now = 10
    assert stop.leaves_time_for("step")
    clock.now = 10.1
    assert not stop.leaves_time_for("step")


def test_the_longest_of_the_latest_times_counts() -> None:
    clock = Clock()
    stop = StopRequest(3600, clock=clock)
    work(stop, clock, "step", 600)
    for _ in range(REMEMBERED):
        work(stop, clock, "step", 10)
    clock.now = 3589
    assert stop.leaves_time_for("step")
    work(stop, clock, "step", 12)
    clock.now = 3589
    assert not stop.leaves_time_for("step")


def test_the_time_before_the_first_measurement_counts() -> None:
    clock = Clock()
    clock.now = 500
    assert not StopRequest(100, started=399, clock=clock).leaves_time_for("step")
    assert StopRequest(100, started=400, clock=clock).leaves_time_for("step")


def test_a_signal_is_a_request_and_a_second_ctrl_c_stops_at_once() -> None:
    said: list[str] = []
    with StopRequest(math.inf, on_request=said.append) as stop:
        assert stop.reason is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason is signal.SIGTERM and "Stopping after this step" in said[0]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_closed_terminal_is_a_request_unless_the_process_ignores_it() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        with StopRequest(math.inf) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason is signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with StopRequest(math.inf) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
