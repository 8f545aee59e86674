"""What has been pushed to a consumer and was not received yet, by where it came from, and in which order it is taken.

    Source         one queue at the server: a queue's messages of one band (or all of a queue that has no bands)
    Subscription   one ``basic.consume`` of a source, with its credit; a new credit takes a new subscription
    Arrival        one delivery, from its arrival to its end; also what a Delivery's ``tag`` is

Counters are written by the I/O thread alone. What is in ``parked`` is put there by the I/O thread and taken by the
thread that receives, each in single steps; states change under the consumer's lock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from enum import Enum, auto

from ekiden_rabbitmq.connection import Channel


class State(Enum):
    """PARKED: not received. HELD: handed out. ENDING: being settled or given back. SENT: the server was told.

    ENDED: it is over. LOST: the server has taken it back, and it is another's.
    """

    PARKED = auto()
    HELD = auto()
    ENDING = auto()
    SENT = auto()
    ENDED = auto()
    LOST = auto()


class Arrival:
    """One delivery: its number on the ``channel`` that it came on, and what it consists of.

    ``uncounted``: it was handed out once more than it says itself. ``followed_by``: the messages of its ending that are
    stored already, by queue and id; the server would not know them again.
    """

    __slots__ = (
        "body",
        "channel",
        "followed_by",
        "number",
        "properties",
        "redelivered",
        "source",
        "state",
        "subscription",
        "uncounted",
    )

    def __init__(  # noqa: PLR0917 - one for each delivery: keywords cost
        self,
        subscription: Subscription,
        channel: Channel,
        number: int,
        redelivered: bool,
        properties: bytes,
        body: bytes,
    ) -> None:
        self.subscription = subscription
        self.source = subscription.source
        self.channel = channel
        self.number = number
        self.redelivered = redelivered
        self.properties = properties
        self.body = body
        self.state = State.PARKED
        self.uncounted = False
        self.followed_by: frozenset[tuple[str, str]] = frozenset()


class Subscription:
    """The server pushes until ``unacked`` reaches ``credit``. ``expects``: so many were waiting when it was made."""

    __slots__ = ("arrived", "credit", "expects", "source", "tag", "unacked")

    def __init__(self, source: Source, tag: str, credit: int, expects: int) -> None:
        self.source = source
        self.tag = tag
        self.credit = credit
        self.expects = expects
        self.unacked = 0
        self.arrived = 0

    @property
    def is_full(self) -> bool:
        """There may be more at the server, which it does not push."""
        return self.unacked >= self.credit

    @property
    def is_settling_in(self) -> bool:
        """What was waiting when it was made has not arrived yet."""
        return self.arrived < self.expects


class Source:
    """The messages of ``queue`` with one priority; ``name`` is the queue's at the server.

    ``left_alone_until``: on the monotonic clock, when the server has ended the subscription.
    """

    __slots__ = ("left_alone_until", "name", "parked", "priority", "queue", "subscription", "unacked", "was_full")

    def __init__(self, queue: str, priority: int, name: str) -> None:
        self.queue = queue
        self.priority = priority
        self.name = name
        self.parked: deque[Arrival] = deque()
        self.subscription: Subscription | None = None
        self.unacked = 0
        self.was_full = False
        self.left_alone_until = 0.0

    @property
    def is_left_alone(self) -> bool:
        """Whether it is too early to subscribe again."""
        return self.left_alone_until > time.monotonic()

    def arrived(self, arrival: Arrival) -> None:
        """One more is here."""
        subscription = arrival.subscription
        subscription.arrived += 1
        subscription.unacked += 1
        self.unacked += 1
        if subscription.is_full:
            self.was_full = True

    def ended(self, arrival: Arrival) -> None:
        """The server is told that it has ended."""
        arrival.subscription.unacked -= 1
        self.unacked -= 1

    @property
    def may_have_more(self) -> bool:
        """Whether the server may have messages here that have not arrived."""
        subscription = self.subscription
        return subscription is None or subscription.is_full or subscription.is_settling_in


class Sources:
    """All of a consumer's, by queue, the most urgent band first."""

    def __init__(self, queues: Sequence[str], *, strict: bool) -> None:
        self.by_queue: dict[str, list[Source]] = {queue: [] for queue in dict.fromkeys(queues)}
        self.strict = strict and len(self.by_queue) > 1
        self._turn = deque(self.by_queue)

    def add(self, source: Source) -> None:
        """One more; bands are kept in the order of their urgency."""
        bands = self.by_queue[source.queue]
        bands.append(source)
        bands.sort(key=lambda band: -band.priority)

    def all(self) -> list[Source]:
        """Every source."""
        return [source for bands in self.by_queue.values() for source in bands]

    @property
    def could_have_more(self) -> bool:
        """Whether the server may have messages that it does not push, for want of a credit."""
        return any(
            source.subscription.is_full if source.subscription is not None else not source.is_left_alone
            for source in self.all()
        )

    def take(self, most: int, *, verified: bool) -> list[Arrival]:
        """Up to ``most`` of what is parked, in order: of a queue the most urgent first, the queues in turn.

        A source that may have more bars the less urgent ones of its queue: what is before them would be overtaken. In
        strict order it bars the queues behind it too, and, unless it was ``verified`` that nothing is before them at
        the server or on its way, any queue bars those.
        """
        taken: list[Arrival] = []
        served: str | None = None
        for position, queue in enumerate(self._turn):
            if self.strict and position and not verified:
                break
            barred = self._take_from(queue, most, taken)
            if taken and served is None:
                served = queue
            if len(taken) >= most or (barred and self.strict):
                break
        if served is not None and not self.strict:
            self._turn.remove(served)
            self._turn.append(served)  # who was served stands at the back
        return taken

    def _take_from(self, queue: str, most: int, taken: list[Arrival]) -> bool:
        """Take from one queue; whether something in it may be before what is behind."""
        for source in self.by_queue[queue]:
            parked = source.parked
            while parked and len(taken) < most:
                taken.append(parked.popleft())
            if len(taken) >= most or source.may_have_more:
                return True
        return False
