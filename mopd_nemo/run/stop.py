"""When a run stops: at Ctrl-C, at a termination signal, when its terminal is closed, or at a deadline."""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
import termios
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TIME_IS_UP = signal.SIGUSR1
"""Batch systems send it some time before the limit. The run's own deadline counts as this signal."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, TIME_IS_UP)
REMEMBERED = 10
"""Latest times that count, for each kind of work. So the slow first step of a run is forgotten."""


class StopRequest:
    """Whether the run was asked to stop, or its time is nearly up. Use as a context manager.

    Inside, the first stop signal is a request; a second Ctrl-C raises KeyboardInterrupt at once. A signal that this
    process ignores, as SIGHUP under nohup, stays ignored.

    Args:
        limit: seconds after `started` by which the run must have saved.
        started: when the process began, in the clock's seconds. Default: now.
        on_request: called with a notice for the user.
    """

    def __init__(
        self,
        limit: float,
        started: float | None = None,
        on_request: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.reason: signal.Signals | None = None
        """The signal that asked for the stop; None: no stop was requested."""
        self._end = (clock() if started is None else started) + limit
        self._on_request = on_request
        self._clock = clock
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._previous: dict[signal.Signals, Any] = {}

    def ask(self, reason: signal.Signals, notice: str) -> None:
        """Ask the run to stop after its present work."""
        self.reason = reason
        self._on_request(notice)

    @contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Measure the time of this work."""
        started = self._clock()
        yield
        self._seconds[work].append(self._clock() - started)

    def leaves_time_for(self, work: str) -> bool:
        """Whether `work` and a save would end in time if each took as long as the longest of its latest times.

        Work that was never done is assumed to take no time.
        """
        return self._clock() + self._longest(work) + self._longest("save") <= self._end

    def _longest(self, work: str) -> float:
        return max(self._seconds[work], default=0.0)

    def __enter__(self) -> StopRequest:
        heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _forget_terminal()
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.ask(
            signal.Signals(number),
            "Stopping after this step; a checkpoint will be saved. Ctrl-C again stops at once.",
        )


def _forget_terminal() -> None:
    """Send what is still printed nowhere, where its reader is gone: a write there is an error."""
    for descriptor in (0, 1, 2):
        if _is_gone(descriptor):
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, descriptor)
            os.close(null)


def _is_gone(descriptor: int) -> bool:
    """Whether this is a terminal that was closed, or a pipe whose reader ends with it."""
    try:
        termios.tcgetattr(descriptor)
    except termios.error as error:
        if error.args[0] != errno.ENOTTY:
            return True
    poller = select.poll()
    poller.register(descriptor, 0)
    return bool(poller.poll(200) if stat.S_ISFIFO(os.fstat(descriptor).st_mode) else [])
