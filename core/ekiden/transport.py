"""The abstract Transport and Consumer: everything ekiden asks of a broker.

A transport moves bytes and knows nothing of tasks. The classes below state the promises; the conformance kit
(``ekiden.testing.conformance``) checks them; ``ekiden.memory`` is the implementation to read first.

Promises that hold across methods:

- **Leases.** A delivery is its consumer's until it is settled or released, or ``lease`` seconds have passed since it
  was handed out or extended. A dead consumer's deliveries come back in bounded time. Opening a consumer under a
  ``name`` whose earlier holder still has deliveries gives those back first.
- **Tags are fresh per hand-out**, so a consumer that wakes up late can settle, extend or release nothing that
  somebody else now holds; it is told LOST.
- **Attempts rise when a message is handed out.** ``release`` takes that back unless it is told to keep it; a lost
  lease and ``close`` do not.
- **The broker holds delayed messages**, and time is the broker's where it has a clock.
- **Every wait is bounded, every call ends**: with an answer or a typed error from ``ekiden.errors`` within the
  transport's own time limit, or sooner where the caller gives a deadline (``publish``). Reconnecting is the
  transport's work.
- **Order** is by priority (9 first), then by age, best effort; none is promised after a retry. Several queues are
  served in turn unless ``strict``.
- **Queues named** ``reply.*`` vanish with their messages some time after their consumer; publishing to one that
  does not exist is dropped silently and never creates it. All other queues come to be when first used.
- **A crash is no trouble of the broker's.** Where the transport's own code fails on a thread of its own (a bug), the
  transport logs that as CRITICAL, and whatever is asked next gets a new thread. What was under way there raises
  TransportCrashed, and so does, for good, each consumer or listener that lost its state (``settle`` and ``extend``
  answer FAILED with it): never BrokerUnavailable, which says that waiting helps. A worker ends with it and is replaced.
- **What was stored and cannot be read** (another program's, damaged) harms no other message and nobody who receives,
  browses or purges: the transport logs it, and buries it in ``<queue>.dead`` or delivers it with a content type that no
  worker takes for a call.
- **After close** every method but ``close`` raises TransportClosed; a wait that ``close`` interrupts returns none.
- **Threads.** ``Consumer.receive`` is called by one thread; ``settle``, ``release`` and ``extend`` by one other
  meanwhile; ``stop`` by any. ``Transport.publish`` is called by one thread at a time; the other methods by any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

import msgspec

if TYPE_CHECKING:
    from ekiden.message import Delivery, Depth, Ending, Message, Published, Seen, Settled
    from ekiden.urls import BrokerURL


class TransportDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What a transport promises beyond the contract, in words and times.

    ``ekiden transports`` prints it, the table in the docs is generated from it, and the conformance kit takes its
    times from it and holds the transport to them. The core reads it to bound leases from below, to refuse a broker that
    other processes cannot see, and to say what a command cannot do there; no task is treated differently by it.

    ``shortest_lease`` and ``dead_consumer_noticed_within`` (beyond the lease) are seconds; ``wakes_within`` is the
    longest an idle consumer may take to notice a message when the wake-up signal was lost, in seconds.
    ``connection_is_lease``: a delivery is its consumer's as long as that is connected, whatever ``lease`` says.
    ``browsing_counts``: a broker that can show a message only by handing it out counts that as an attempt, and may
    change the order.
    """

    summary: str
    durability: str
    hand_over: str
    wake_up: str
    shortest_lease: float
    dead_consumer_noticed_within: float
    wakes_within: float
    connection_is_lease: bool = False
    names_duplicates: bool = True
    browsing_counts: bool = False
    purges_delayed: bool = True
    browses_delayed: bool = True
    browses_leased: bool = True
    counts_delayed: bool = True
    counts_leased: bool = True
    shared_between_processes: bool = True
    survives_restart: bool = True
    url_example: str = ""
    options: type[msgspec.Struct] | None = None


class Transport(ABC):
    """One broker, opened once per app and process.

    Made with the parsed URL; the constructor checks the URL and its options but need not connect. Raises
    ConfigurationError for what is wrong with the URL.
    """

    description: ClassVar[TransportDescription]

    @abstractmethod
    def __init__(self, url: BrokerURL) -> None: ...

    @abstractmethod
    def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
        """Store ``messages`` and return one answer for each, in their order, when the broker has them.

        ``deadline`` (``time.monotonic()`` seconds): the call ends by then, waiting for locks, connecting, sending and
        ringing included; without one, and where it lies later, within the transport's own time limit. What has no
        answer by then is answered FAILED with BrokerUnavailable, or that is raised; it may have been stored.

        An id that the queue still holds is answered DUPLICATE and stores nothing. One bad message is answered FAILED
        and does not spoil the others: with BrokerRefused where ``message.unsendable`` has a reason or the broker will
        never take it, with BrokerUnavailable where the broker is full. Raises BrokerUnavailable or BrokerRefused when
        nothing could be asked at all; then any of them may or may not have been stored.
        """

    @abstractmethod
    def consumer(
        self,
        queues: Sequence[str],
        *,
        lease: float,
        prefetch: int,
        name: str,
        strict: bool = False,
    ) -> Consumer:
        """A consumer of ``queues``, in turn, or (``strict``) the first before the second and so on.

        ``lease``: seconds; not below ``description.shortest_lease``. ``prefetch``: the most deliveries it will hold.
        ``name``: the worker slot; deliveries that an earlier consumer of this name still holds are given back first.
        """

    @abstractmethod
    def browse(self, queue: str, *, after: str | None = None, limit: int = 100) -> list[Seen]:
        """Up to ``limit`` messages of ``queue`` behind the cursor ``after``; claims nothing and changes nothing."""

    @abstractmethod
    def depth(self, queue: str) -> Depth:
        """How many messages ``queue`` holds: none of each for a queue that does not exist."""

    @abstractmethod
    def purge(self, queue: str) -> int:
        """Delete the ready and delayed messages of ``queue`` and return how many there were; leased ones stay.

        Delayed ones stay too where ``description.purges_delayed`` is False.
        """

    @abstractmethod
    def broadcast(self, topic: str, payloads: Sequence[bytes]) -> None:
        """Send ``payloads`` to everyone who is listening to ``topic`` now; nobody listening is no error."""

    @abstractmethod
    def listen(self, topic: str) -> Listener:
        """A listener that is subscribed to ``topic`` when this returns."""

    def warnings(self, queues: Sequence[str]) -> list[str]:
        """What an operator should change at this broker as it is set up now, and at ``queues``: one sentence each.

        ``ekiden doctor`` shows them. Raises BrokerUnavailable when the broker cannot be asked.
        """
        return []

    def delivery_limits(self, queues: Sequence[str]) -> dict[str, int]:
        """By queue: after it came back so often, not counting ``release``, the broker itself drops a message.

        Without the queues where it never does. A worker warns at its start where that is before a message would go to
        the dead letters. Raises BrokerUnavailable when the broker cannot be asked.
        """
        return {}

    @property
    def longest_hold(self) -> float | None:
        """After so many seconds the broker takes a delivery back however often it is extended; None: never."""
        return None

    def stalled(self) -> str | None:
        """Which thread of the transport's own is stuck, and for how long; None while all of them work.

        A worker asks about once a second, from a thread of its own, and does not count as alive meanwhile. Asks no
        broker, and never blocks; a broker that does not answer is not meant.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Close every consumer, listener and connection. May be called again; never raises for a lost broker."""

    @abstractmethod
    def forget(self) -> None:
        """In a forked child: drop every connection, lock and consumer without touching the parent's sockets or files.

        The transport is usable afterwards and connects anew.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Consumer(ABC):
    """Receives from some queues, and ends what it received."""

    @abstractmethod
    def receive(self, limit: int, timeout: float) -> list[Delivery]:
        """Up to ``limit`` deliveries: at once when there are some, else within ``timeout`` seconds, else none.

        Returns early (with none) once ``stop`` was called. Raises BrokerUnavailable when the broker cannot be
        reached; the consumer stays usable and the next call tries again.
        """

    @abstractmethod
    def settle(self, endings: Sequence[Ending]) -> list[Settled]:
        """Store each ending's messages, then forget its delivery. One answer per ending, in their order.

        LOST: another consumer holds it now; nothing of that ending is published where that is known beforehand.
        FAILED: its messages could not be stored, or the broker could not be reached; the delivery is still held and
        may be settled again: with the same messages, unless the error is BrokerRefused, which says that this broker
        will never take them. What an earlier call had settled although its answer was lost is SETTLED then, not LOST,
        while the lease lasts, unless the connection is the lease: a worker that settles first rests on it. Never
        raises for one bad ending or for an unreachable broker.
        """

    @abstractmethod
    def release(self, deliveries: Sequence[Delivery], delay: float = 0.0, *, keep_attempt: bool = False) -> None:
        """Give back what was never started, and its attempt too, to be delivered after ``delay`` seconds.

        ``keep_attempt``: it was started, so this hand-out counts; the next one has the next attempt. Lost deliveries
        are passed over. Raises BrokerUnavailable when it could not be done.
        """

    @abstractmethod
    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        """Hold each for another lease from now. SETTLED: held; LOST: not any more; FAILED: could not be asked."""

    @abstractmethod
    def stop(self) -> None:
        """Claim no more and wake ``receive``. What the broker pushed but nobody received goes back."""

    @abstractmethod
    def close(self) -> None:
        """Stop, and give back everything still held, without taking back its attempt. May be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Listener(ABC):
    """Hears what is broadcast on one topic from the moment it was made."""

    @abstractmethod
    def receive(self, timeout: float) -> list[bytes]:
        """What was broadcast since the last call, in order; waits up to ``timeout`` seconds for something.

        Raises BrokerUnavailable when the broker cannot be reached.
        """

    @abstractmethod
    def close(self) -> None:
        """Unsubscribe and wake ``receive``. May be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
