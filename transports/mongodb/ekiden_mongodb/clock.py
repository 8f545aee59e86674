"""The server's clock, as far as it can be known here: never ahead of it.

A server that is asked for its time answers some time before the answer is here, so what it said, plus what has passed
since the answer came, is a lower bound of its clock. What passes is measured by this machine's monotonic clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

MEASURED_FOR_SECONDS = 60.0
"""After so long the server is asked again: clocks drift apart."""

_JUMP_SECONDS = 0.5
"""When this machine's wall clock moved by so much against its monotonic clock it slept, or somebody set its time."""

_ASKED = 3
"""How often the server is asked for one measurement: the first answer may have waited for a connection."""


class Reading(msgspec.Struct, frozen=True):
    """One measurement: the server's time is ``offset`` seconds or more beyond the monotonic clock, not ``+ error``."""

    offset: float
    error: float
    measured_at: float
    wall_clock: float
    server: object


class ServerClock:
    """The time of whichever server is the primary; for any number of threads.

    ``ask`` asks the server for its time (seconds since the epoch); ``server`` says which one it would be.
    """

    def __init__(self, ask: Callable[[], float], server: Callable[[], object]) -> None:
        self._ask = ask
        self._server = server
        self._lock = threading.Lock()
        self._reading: Reading | None = None

    def now(self) -> float:
        """The server's time at its lower bound, in seconds since the epoch. Asks the server now and then."""
        return time.monotonic() + self.reading().offset

    def reading(self) -> Reading:
        """The measurement that holds now."""
        reading = self._reading
        if reading is not None and self._holds(reading):
            return reading
        with self._lock:
            reading = self._reading
            if reading is None or not self._holds(reading):
                reading = self._reading = self._measure()
            return reading

    def doubt(self) -> None:
        """The connection broke: another server may be the one now."""
        self._reading = None

    def _holds(self, reading: Reading) -> bool:
        now = time.monotonic()
        return (
            now - reading.measured_at < MEASURED_FOR_SECONDS
            and abs(time.time() - now - reading.wall_clock) < _JUMP_SECONDS
            and reading.server == self._server()
        )

    def _measure(self) -> Reading:
        best: tuple[float, float] | None = None
        for _ in range(_ASKED):
            asked = time.monotonic()
            told = self._ask()
            answered = time.monotonic()
            if best is None or answered - asked < best[1]:
                best = told - answered, answered - asked
        assert best is not None
        now = time.monotonic()
        return Reading(best[0], best[1], now, time.time() - now, self._server())
