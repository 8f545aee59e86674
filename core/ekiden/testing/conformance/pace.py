"""Bounds on time that hold on a slow machine, too.

A bound in a test is for a machine that has time for it. On one that is slow, or busy with other tests, the same work
takes longer, and a test that fails there says nothing of the broker. So what exceeds its bound is held to as much more
as this machine is slower at that moment than the one for which the bounds were set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

REFERENCE_SECONDS = 0.006
"""What ``_work`` takes on the machine for which the bounds were set, while nothing else runs there."""

SAMPLES = 30
MOST = 8.0
"""No machine is taken for slower than so many times the reference: then the bound says nothing any more."""


def slowness(clock: Callable[[], float] = time.perf_counter) -> float:
    """How many times slower than the reference this machine is just now, at least 1 and at most ``MOST``.

    ``clock``: what tells the time, in seconds.
    """
    began = clock()
    for _ in range(SAMPLES):
        _work()
    return min(MOST, max(1.0, (clock() - began) / SAMPLES / REFERENCE_SECONDS))


def assert_quick(took: float, bound: float, among: Sequence[float] = ()) -> None:
    """``took`` is below ``bound``, or as much above it as this machine is slow; both in seconds, or shares of a core.

    ``among``: the measurements of which ``took`` is one, for the message.
    """
    if took >= bound:
        allowed = bound * slowness()
        others = f": {[round(each, 4) for each in among]}" if among else ""
        assert took < allowed, f"{took:.4g}, wanted less than {bound:g}; {allowed:.4g} on this machine just now{others}"


def _work() -> None:
    total = 0
    for number in range(100_000):
        total += number * number
