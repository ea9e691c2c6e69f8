"""Ctrl-C and termination signals: finish the step, save, and say how to go on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

TIME_IS_UP = signal.SIGUSR1
"""What batch systems send some time before the limit, and what a run's own deadline counts as."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, TIME_IS_UP)


class Interrupt:
    """While entered, the first stop signal sets `requested`; a second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self.received: signal.Signals | None = None
        self._on_request = on_request
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self.received is not None

    def __enter__(self) -> Interrupt:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        self._on_request()
