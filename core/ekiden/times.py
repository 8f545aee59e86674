"""How far times and durations may reach, and the check of those that a caller gives.

    Moment             seconds since the epoch, up to the year 3000
    Seconds            a duration, up to a hundred years; PositiveSeconds: above 0; Offset: into the past, too

Numbers beyond that (infinity, NaN and 1e308 among them) are nobody's intention and overflow somewhere: in a broker's
clock, a timer, a calendar. So they are refused where a message, an option or a retry is made, and where a message of
somebody else's is read. msgspec refuses NaN wherever a type has a bound.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, TypeGuard

from msgspec import Meta

from ekiden.errors import ConfigurationError
from ekiden.safe_text import repr_of

LATEST_TIME = 32_503_680_000.0
"""The year 3000, in seconds since the epoch."""

LONGEST_SECONDS = 3_155_760_000.0
"""A hundred years."""

Moment = Annotated[float, Meta(ge=0, le=LATEST_TIME)]
Seconds = Annotated[float, Meta(ge=0, le=LONGEST_SECONDS)]
PositiveSeconds = Annotated[float, Meta(gt=0, le=LONGEST_SECONDS)]
Offset = Annotated[float, Meta(ge=-LONGEST_SECONDS, le=LONGEST_SECONDS)]

_LONGEST_SHOWN = 40


def check_seconds(name: str, seconds: object, *, least: float = 0.0) -> None:
    """Raise ConfigurationError unless ``seconds`` is a number from ``least`` to a hundred years. ``name``: of what."""
    if not _is_number(seconds) or not least <= seconds <= LONGEST_SECONDS:
        bounds = "a hundred years at most" if least < 0 else f"{least:g} to {LONGEST_SECONDS:.0f}, a hundred years"
        raise ConfigurationError(f"{name} cannot be {shown(seconds)}; it is a number of seconds, {bounds}.")


def checked_timeout(timeout: object, name: str = "timeout") -> float | None:
    """How many seconds somebody is ready to wait; None is for ever, and so is infinity. Below 0 is not at all.

    Raises ConfigurationError for what is no number of seconds.
    """
    if timeout is None:
        return None
    if not _is_number(timeout) or not (timeout > LONGEST_SECONDS or timeout <= LONGEST_SECONDS):  # NaN is neither
        raise ConfigurationError(f"{name} cannot be {shown(timeout)}; it is a number of seconds, or None for ever.")
    return None if timeout > LONGEST_SECONDS else float(max(0.0, timeout))


def check_moment(name: str, moment: datetime) -> None:
    """Raise ConfigurationError for an aware datetime that is too far away. ``name``: of what."""
    if moment.timestamp() > LATEST_TIME:
        raise ConfigurationError(f"{name} cannot be {moment}; times are before the year 3000.")


def shown(value: object) -> str:
    """``value`` for an error message, cut where it is long."""
    text = repr_of(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
