"""Stop in time: save before a moment that is known from the start, such as the end of a batch job."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STARTED = time.monotonic()
"""When this process began, up to the time that it takes to import torch: the trainer imports this before anything else
of its own, and models load after it."""
REMEMBERED = 10
"""How many of the latest times of each kind of work count: the first step of a run, which starts what runs the models,
is forgotten after a while."""


class Deadline:
    """Knows how long each kind of work has taken, and whether there is time for another, and to save after it.

    Args:
        limit: seconds since the process began.
        clock: what counts them.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = lambda: time.monotonic() - STARTED) -> None:
        self._limit = limit
        self._clock = clock
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    @contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Remember how long this takes."""
        started = self._clock()
        yield
        self._seconds[work].append(self._clock() - started)

    def leaves_time_for(self, work: str) -> bool:
        """Whether `work` and a save would end in time if each took the longest that it took lately.

        What has not been done yet counts as nothing.
        """
        return self._clock() + self._longest(work) + self._longest("save") <= self._limit

    def _longest(self, work: str) -> float:
        return max(self._seconds[work], default=0.0)
