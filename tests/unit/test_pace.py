"""What takes too long is excused by a slow machine, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
from ekiden.testing.conformance import pace
from ekiden.testing.conformance.pace import MOST, REFERENCE_SECONDS, SAMPLES, assert_quick, slowness


def a_clock(*, factor: float) -> Callable[[], float]:
    """One by which this machine is so many times slower than the reference."""
    readings = count()
    return lambda: next(readings) * SAMPLES * REFERENCE_SECONDS * factor


@pytest.mark.parametrize(("factor", "expected"), [(0.2, 1.0), (1.0, 1.0), (2.5, 2.5), (1000.0, MOST)])
def test_slowness_is_that_of_the_clock_within_limits(factor: float, expected: float) -> None:
    assert slowness(a_clock(factor=factor)) == pytest.approx(expected)


def test_what_is_below_its_bound_is_quick_and_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "slowness", lambda: pytest.fail("measured"))

    assert_quick(0.499, 0.5)


def test_what_is_above_its_bound_is_held_to_what_the_machine_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "slowness", lambda: 3.0)

    assert_quick(1.4, 0.5)
    with pytest.raises(AssertionError, match=r"1\.6, wanted less than 0\.5; 1\.5 on this machine.*\[1\.6, 2\.0\]"):
        assert_quick(1.6, 0.5, [1.6, 2.0])


def test_no_machine_excuses_everything() -> None:
    with pytest.raises(AssertionError, match=r"wanted less than 0\.01"):
        assert_quick(0.01 * MOST, 0.01)
