"""When a run should stop: Ctrl-C, a termination signal, or a moment that is known from the start."""

from __future__ import annotations

import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TIME_IS_UP = signal.SIGUSR1
"""Batch systems send it some time before the limit. A run's own deadline counts as the same."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, TIME_IS_UP)
REMEMBERED = 10
"""How many of the latest times of each kind of work count. The slow first step of a run is forgotten after a while."""


class StopRequest:
    """Whether someone has asked the run to stop, or its time is nearly up.

    While entered, the first stop signal is a request; a second Ctrl-C raises KeyboardInterrupt at once.

    Args:
        limit: seconds after `started` by which the run must have saved.
        started: when the process began, in the clock's seconds. Default: now.
        on_request: called with what to tell the user.
    """

    def __init__(
        self,
        limit: float,
        started: float | None = None,
        on_request: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.reason: signal.Signals | None = None
        """The signal that counts as the reason; None until someone asks to stop."""
        self._end = (clock() if started is None else started) + limit
        self._on_request = on_request
        self._clock = clock
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._previous: dict[signal.Signals, Any] = {}

    def ask(self, reason: signal.Signals, notice: str) -> None:
        """Ask the run to stop after what it is doing."""
        self.reason = reason
        self._on_request(notice)

    @contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Remember how long this takes."""
        started = self._clock()
        yield
        self._seconds[work].append(self._clock() - started)

    def leaves_time_for(self, work: str) -> bool:
        """Whether `work` and a save would end in time if each took the longest that it took lately.

        Work that has not been done yet is assumed to take no time.
        """
        return self._clock() + self._longest(work) + self._longest("save") <= self._end

    def _longest(self, work: str) -> float:
        return max(self._seconds[work], default=0.0)

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.ask(
            signal.Signals(number),
            "Stopping after this step; a checkpoint will be saved. Ctrl-C again stops at once.",
        )
