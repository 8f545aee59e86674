"""Rate limits: how many starts of a task are granted now, over all workers.

The state is a record in the backend, changed by compare-and-set. What is not granted is given back to the broker until
its turn; a worker holds nothing that may not start. Where no backend stores, each worker process limits by itself.
"""

from __future__ import annotations

import threading

import msgspec

from ekiden.codec import UNREADABLE
from ekiden.loggers import safe_logger
from ekiden.results import Backend, Record

logger = safe_logger("ekiden.worker")

RATE_PREFIX = "rate/"
AHEAD_SECONDS = 0.1
CLOCKS_APART_SECONDS = 60.0
LONGEST_WAIT_SECONDS = 86_400.0
"""After so long it is asked again, even where the turn is later."""

_KEPT_SECONDS = 3600.0


class RateState(msgspec.Struct, frozen=True):
    """When the next start may be granted, and when the turn is of the next one that has to wait.

    Both are seconds since the epoch.
    """

    next_start: float = 0.0
    next_turn: float = 0.0


def grant(state: RateState, rate: float, count: int, now: float) -> tuple[RateState, list[float]]:
    """Share out starts among ``count`` calls: for each how many seconds it has to wait, 0 for those that may start.

    ``rate``: starts per second. Starts due within ``AHEAD_SECONDS`` are granted at once.
    """
    interval = 1.0 / rate
    next_start = max(state.next_start, now)
    waits: list[float] = []
    while len(waits) < count and next_start <= now + AHEAD_SECONDS:
        waits.append(0.0)
        next_start += interval
    next_turn = max(state.next_turn, next_start)
    while len(waits) < count:
        waits.append(min(next_turn - now, LONGEST_WAIT_SECONDS))
        next_turn += interval
    return RateState(next_start, next_turn), waits


_decoder = msgspec.json.Decoder(RateState)


def _state_in(record: Record, rate: float, now: float) -> RateState:
    """What the record says. One that cannot be, or that cannot be read, is begun anew: the next write replaces it."""
    try:
        state = _decoder.decode(record.value)
    except UNREADABLE as error:
        logger.warning("the record %s is no state of a rate limit, and is begun anew: %s", record.key, error)
        return RateState()
    if state.next_start > now + AHEAD_SECONDS + 1.0 / rate + CLOCKS_APART_SECONDS:
        # A start is granted ahead by this much at most; with a later one all calls would wait for that.
        logger.warning("the record %s grants no start before %.0f, and is begun anew", record.key, state.next_start)
        return RateState()
    return RateState(state.next_start, min(state.next_turn, now + LONGEST_WAIT_SECONDS))


class RateLimiter:
    """Grants starts out of the record that all workers share. Used by one thread, the receiving one."""

    def __init__(self, backend: Backend | None) -> None:
        self._backend = backend if backend is not None and backend.stores else None
        self._own: dict[str, RateState] = {}

    def take(self, task_name: str, rate: float, count: int, now: float) -> list[float]:
        """For each of ``count`` calls how many seconds it has to wait. Raises BackendError."""
        if self._backend is None:
            self._own[task_name], waits = grant(self._own.get(task_name, RateState()), rate, count, now)
            return waits
        key = RATE_PREFIX + task_name
        pause = threading.Event()
        while True:
            (record,) = self._backend.read([key])
            state = RateState() if record is None else _state_in(record, rate, now)
            changed, waits = grant(state, rate, count, now)
            version = 0 if record is None else record.version
            kept = _KEPT_SECONDS + min(max(0.0, changed.next_turn - now), LONGEST_WAIT_SECONDS)
            if (
                self._backend.write(key, msgspec.json.encode(changed), expected_version=version, expires=kept)
                is not None
            ):
                return waits
            pause.wait(0.001)
