"""How much the server may push of what: the credits of a consumer's subscriptions. Pure.

A consumer asks the server for messages of several sources: each queue, and each band of priorities of it. The server
pushes from a source until so many of its messages are in this process and not acknowledged: that is its credit.
``shares`` divides what there is room for:

- what is waiting counts: a source where nothing waits gets one, so that the first message to come is pushed at once;
- of one queue, the most urgent band comes first: what it leaves is the next one's;
- several queues share evenly; where one needs less than its part, the others get the rest; or, in strict order, the
  first comes first, as the bands do;
- what nobody needs is given to those where something waits, so that they need not ask again soon.

Together the shares exceed the room by at most one for each source.
"""

from __future__ import annotations

from collections.abc import Sequence


def shares(room: int, waiting: Sequence[Sequence[int]], *, strict: bool) -> list[list[int]]:
    """The credit of each source, in the order of ``waiting``: for each queue, for each band, the most urgent first.

    ``waiting``: how many messages the server has there, 0 or more. Each share is at least 1.
    """
    totals = [sum(bands) for bands in waiting]
    parts = _in_order(room, totals) if strict else _evenly(room, totals)
    return [_at_least_one(_in_order(part, bands)) for part, bands in zip(parts, waiting, strict=True)]


def _in_order(room: int, needs: Sequence[int]) -> list[int]:
    """The first gets what it needs, then the second, while there is something left."""
    parts = []
    left = max(0, room)
    for need in needs:
        parts.append(min(need, left))
        left -= parts[-1]
    return _with_the_rest(parts, needs, left)


def _evenly(room: int, needs: Sequence[int]) -> list[int]:
    """The same for everyone who needs it; who needs less gets that."""
    parts = [0] * len(needs)
    left = max(0, room)
    hungry = sorted((index for index, need in enumerate(needs) if need), key=lambda index: needs[index])
    for position, index in enumerate(hungry):
        parts[index] = min(needs[index], _part(left, len(hungry) - position))
        left -= parts[index]
    return _with_the_rest(parts, needs, left)


def _with_the_rest(parts: list[int], needs: Sequence[int], left: int) -> list[int]:
    """``parts``, and what nobody needs, for those that need something, or else for the first."""
    takers = [index for index, need in enumerate(needs) if need] or [0]
    for position, index in enumerate(takers):
        extra = _part(left, len(takers) - position)
        parts[index] += extra
        left -= extra
    return parts


def _part(whole: int, by: int) -> int:
    return -(-whole // by)


def _at_least_one(parts: list[int]) -> list[int]:
    return [max(part, 1) for part in parts]
