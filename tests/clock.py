"""Time that passes only where it is slept, so that hours of waiting are tested in no time."""

import heapq
import itertools
import time
from typing import Any


class Clock:
    """What a module knows as ``time``: its sleep takes no time, and does what was planned for it."""

    #: Seconds after which a test is taken to hang.
    END = 100_000.0

    @classmethod
    def of_client(cls, monkeypatch: Any) -> "Clock":
        """The time of the client, from 0 on."""
        clock = cls()
        for module in ("_waiting", "_read_back", "client"):
            monkeypatch.setattr(f"synthgen.{module}.time", clock)
        return clock

    def __init__(self):
        self.now = 0.0
        self._plans = []
        self._order = itertools.count()

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        end = self.now + seconds
        while self._plans and self._plans[0][0] <= end:
            self.now, _, action = heapq.heappop(self._plans)
            action()
        self.now = end
        assert end < self.END, "waited for ever"

    def strftime(self, form):
        return time.strftime(form, time.gmtime(self.now))

    def at(self, seconds, action):
        """Plan what happens when that time has come."""
        heapq.heappush(self._plans, (seconds, next(self._order), action))
