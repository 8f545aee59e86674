"""The server's clock, as far as the ``Date`` of its answers tells it.

A Date has whole seconds. What was answered between two moments of ours with the date D was answered at D or less than
a second later, by the clock that the Date shows; so each answer says two things: that clock is at least so far, and
less than so far, ahead of our monotonic one. The next answers make the interval narrower. It is widened as time passes,
because no two clocks run alike; an answer that contradicts it (the server's clock was set) begins a new one.

The Date is not the server's clock, though. CouchDB renews it once a second by a timer, at a phase that is chosen by
chance when a node starts: on arrival, dates were 0.08 to 1.49 s old. No date tells the phase, so the server's clock is
anywhere between the one that the Date shows and a second later.

Every clock of ours that must not run ahead uses the lower end (is it due? has the lease ended?); what must not fall
behind uses the upper end (until when is this leased?). So no error of the measurement ends a lease early.
"""

from __future__ import annotations

import math
import time
from email.utils import parsedate_to_datetime

TICK_SECONDS = 1.0
RENEWED_SECONDS = 1.0
"""By so much the clock that the Date shows may be behind the server's."""
DRIFT = 0.001
"""By how much of the time that passes the interval grows: far more than clocks differ."""


class ServerClock:
    """Measures, and tells the time. Used by any thread: what one of them notes replaces the whole interval at once."""

    def __init__(self) -> None:
        self._interval: tuple[float, float, float] | None = None  # at least, at most, measured at
        self._last_date = ("", 0.0)
        self._told = 0.0

    @property
    def is_known(self) -> bool:
        """Whether any answer has told it. Nothing else may be asked before."""
        return self._interval is not None

    def note(self, date: str, asked_at: float, answered_at: float) -> None:
        """An answer carried ``date``; it was asked for and received at these moments of the monotonic clock."""
        seconds = self._seconds(date)
        if seconds is None:
            return
        low, high = seconds - answered_at, seconds + TICK_SECONDS - asked_at
        if self._interval is not None:
            known_low, known_high, measured_at = self._interval
            grown = DRIFT * (answered_at - measured_at)
            at_least, at_most = max(low, known_low - grown), min(high, known_high + grown)
            if at_least <= at_most:
                low, high = at_least, at_most
        self._interval = (low, high, answered_at)

    def earliest(self) -> float:
        """What the server's clock shows now at the least, in seconds since the epoch."""
        return time.monotonic() + self._ends()[0]

    def latest(self) -> float:
        """What the server's clock shows now at the most."""
        return time.monotonic() + self._ends()[1] + RENEWED_SECONDS

    @property
    def error(self) -> float:
        """How many seconds lie between the two."""
        low, high = self._ends()
        return high - low + RENEWED_SECONDS

    def nearest(self, ours: float) -> float:
        """What of the times that the server's clock may show now is nearest to ``ours``.

        It does not go back while it is measured, but follows a clock of the server's that was set back.
        """
        nearest = min(max(ours, self.earliest()), self.latest())
        if nearest < self._told <= nearest + TICK_SECONDS + RENEWED_SECONDS:
            return self._told
        self._told = nearest
        return nearest

    def tells_most_at(self) -> float:
        """The next moment of the monotonic clock at which an answer makes the error half as large."""
        middle = sum(self._ends()) / 2
        return math.ceil(time.monotonic() + middle) - middle

    def _ends(self) -> tuple[float, float]:
        assert self._interval is not None, "no answer has told the time yet"
        low, high, measured_at = self._interval
        grown = DRIFT * (time.monotonic() - measured_at)
        return low - grown, high + grown

    def _seconds(self, date: str) -> float | None:
        last, seconds = self._last_date
        if date != last:
            try:
                seconds = parsedate_to_datetime(date).timestamp()
            except ValueError:
                return None
            self._last_date = (date, seconds)
        return seconds
