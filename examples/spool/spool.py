"""A transport in one JSON file: the smallest that keeps its promises. docs/writing-a-transport.md walks through it.

Every call locks the file, reads all of it, and writes it again if it has changed. That is slow, and simple: there is
one state, one thread of thought at a time, and nothing to forget when a process dies.
"""

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec
from ekiden.errors import BrokerRefused, BrokerUnavailable, ConfigurationError, TransportClosed
from ekiden.message import (
    DUPLICATE,
    LOST,
    REPLY_PREFIX,
    SETTLED,
    STORED,
    Condition,
    Delivery,
    Depth,
    Ending,
    Message,
    Published,
    PublishOutcome,
    Seen,
    Settled,
    SettleOutcome,
    new_id,
    unsendable,
)
from ekiden.private_files import open_private
from ekiden.transport import Consumer, Listener, Transport, TransportDescription
from ekiden.urls import BrokerURL

Found = TypeVar("Found")

LOOK_AGAIN_SECONDS = 0.02
LOCKED_LOOK_AGAIN_SECONDS = 0.001
LONGEST_CALL_SECONDS = 10.0


# --8<-- [start:state]
class Held(msgspec.Struct):
    """A message that the broker holds. ``until``: when it is due, or, with a ``tag``, when its lease ends."""

    order: int
    message: Message
    attempt: int = 0
    until: float = 0.0
    tag: str | None = None
    holder: str | None = None

    def give_back(self) -> None:
        self.tag, self.holder, self.until = None, None, 0.0


class State(msgspec.Struct):
    """The whole file. ``held`` is in the order of age; ``consumers`` says who has opened which queues."""

    held: list[Held] = []
    consumers: dict[str, list[str]] = {}
    events: list[tuple[int, str, bytes]] = []
    next_number: int = 1

    def number(self) -> int:
        self.next_number += 1
        return self.next_number - 1

    def store(self, message: Message) -> bool:
        if any(each.message.id == message.id and each.message.queue == message.queue for each in self.held):
            return False
        queues = {queue for opened in self.consumers.values() for queue in opened}
        if not message.queue.startswith(REPLY_PREFIX) or message.queue in queues:
            self.held.append(Held(self.number(), message, until=message.due or 0.0))
        return True

    def take_over(self, name: str, queues: list[str]) -> None:
        for each in self.held:
            if each.holder == name:
                each.give_back()
        self.consumers[name] = queues

    def leave(self, name: str) -> None:
        self.take_over(name, self.consumers.get(name, []))
        gone = {queue for queue in self.consumers.pop(name) if queue.startswith(REPLY_PREFIX)}
        self.held = [each for each in self.held if each.message.queue not in gone]

    def ready(self, queue: str, now: float) -> list[Held]:
        """What may be received, the most urgent and then the oldest first. Ended leases are taken back on the way."""
        ready = [each for each in self.held if each.message.queue == queue and each.until <= now]
        for each in ready:
            each.give_back()
        return sorted(ready, key=lambda each: (-each.message.priority, each.order))

    def by_tag(self) -> dict[str | None, Held]:
        return {each.tag: each for each in self.held if each.tag is not None}


# --8<-- [end:state]


class SpoolTransport(Transport):
    """Opened with ``spool:///PATH``."""

    # --8<-- [start:description]
    description = TransportDescription(
        summary="a broker in one JSON file, to read and to learn from",
        durability="survives the death of any process",
        hand_over="follow-ups are stored and the delivery is settled in one write",
        wake_up="none: who waits looks at the file 50 times a second",
        shortest_lease=0.05,
        dead_consumer_noticed_within=1.0,
        wakes_within=1.0,
        url_example="spool:///tasks.json",
    )

    # --8<-- [end:description]

    def __init__(self, url: BrokerURL) -> None:
        if url.hosts or not url.path or url.options:
            raise ConfigurationError(f"{url}: write spool:///PATH, without options.")
        self._path = Path(url.path)
        self._closed = False
        self._opened: list[SpoolConsumer | SpoolListener] = []

    # --8<-- [start:change]
    def change(self, act: Callable[[State], Found], deadline: float | None = None) -> Found:
        """What ``act`` returns, to which the state is given to look at and to change: nobody else does meanwhile."""
        if self._closed:
            raise TransportClosed("This spool was closed; open it again.")
        give_up = time.monotonic() + LONGEST_CALL_SECONDS
        try:
            lock = os.fdopen(open_private(self._path.with_suffix(".lock")), "rb")
            try:
                with lock:
                    _lock(lock, give_up if deadline is None else min(give_up, deadline))
                    return self._change(act)
            except BaseException:
                lock.close()  # which ends it, also where a signal's exception came in the very lines that do so
                raise
        except (OSError, msgspec.DecodeError) as error:
            raise BrokerUnavailable(f"{self._path}: {error}.") from error

    def _change(self, act: Callable[[State], Found]) -> Found:
        before = self._path.read_bytes() if self._path.exists() else b"{}"
        state = msgspec.json.decode(before, type=State)
        found = act(state)
        after = msgspec.json.encode(state)
        if after != before:
            new = self._path.with_suffix(".new")
            with os.fdopen(open_private(new, os.O_WRONLY | os.O_TRUNC), "wb") as file:
                file.write(after)
            new.replace(self._path)
        return found

    # --8<-- [end:change]

    def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
        return self.change(lambda state: [self._store(state, message) for message in messages], deadline)

    def _store(self, state: State, message: Message) -> Published:
        reason = unsendable(message)
        if reason is not None:
            return Published(PublishOutcome.FAILED, BrokerRefused(f"message {message.id}: {reason}."))
        return STORED if state.store(message) else DUPLICATE

    def consumer(
        self, queues: Sequence[str], *, lease: float, prefetch: int, name: str, strict: bool = False
    ) -> Consumer:
        self.change(lambda state: state.take_over(name, list(queues)))
        consumer = SpoolConsumer(self, queues, lease=lease, prefetch=prefetch, name=name, strict=strict)
        self._opened.append(consumer)
        return consumer

    def browse(self, queue: str, *, after: str | None = None, limit: int = 100) -> list[Seen]:
        now = time.time()
        held = [each for each in self._held_in(queue) if each.order > int(after or 0)]
        return [Seen(each.message, _condition(each, now), each.attempt, str(each.order)) for each in held[:limit]]

    def depth(self, queue: str) -> Depth:
        now = time.time()
        conditions = [_condition(each, now) for each in self._held_in(queue)]
        return Depth(*(conditions.count(each) for each in (Condition.READY, Condition.DELAYED, Condition.LEASED)))

    def purge(self, queue: str) -> int:
        now = time.time()

        def delete(state: State) -> int:
            before = len(state.held)
            state.held = [
                each for each in state.held if each.message.queue != queue or _condition(each, now) is Condition.LEASED
            ]
            return before - len(state.held)

        return self.change(delete)

    def _held_in(self, queue: str) -> list[Held]:
        return self.change(lambda state: [each for each in state.held if each.message.queue == queue])

    def broadcast(self, topic: str, payloads: Sequence[bytes]) -> None:
        def add(state: State) -> None:
            state.events += [(state.number(), topic, payload) for payload in payloads]
            del state.events[:-1000]

        self.change(add)

    def listen(self, topic: str) -> Listener:
        listener = SpoolListener(self, topic, self.change(State.number))
        self._opened.append(listener)
        return listener

    def close(self) -> None:
        for each in self._opened:
            each.close()
        self._closed = True

    def forget(self) -> None:
        self._opened = []  # the file is opened anew for each call: nothing else is shared with the parent


class SpoolConsumer(Consumer):
    """What it holds stands in the file, under its name."""

    def __init__(
        self, spool: SpoolTransport, queues: Sequence[str], *, lease: float, prefetch: int, name: str, strict: bool
    ) -> None:
        self._spool = spool
        self._queues = list(queues)
        self._lease, self._prefetch = lease, prefetch
        self._name, self._strict = name, strict
        self._stopped = self._closed = False

    def receive(self, limit: int, timeout: float) -> list[Delivery]:
        self._check_open()
        claim = partial(self._claim, limit=limit)
        return _wait(lambda: self._spool.change(claim), timeout, lambda: self._stopped)

    # --8<-- [start:claim]
    def _claim(self, state: State, limit: int) -> list[Delivery]:
        now = time.time()
        deliveries: list[Delivery] = []
        ready = {queue: state.ready(queue, now) for queue in self._queues}
        room = min(limit, self._prefetch - sum(each.holder == self._name for each in state.held))
        while room > len(deliveries) and any(ready.values()):
            queue = next(queue for queue in self._queues if ready[queue])
            deliveries.append(self._hand_out(ready[queue].pop(0), now))
            if not self._strict:  # whose turn it was goes to the back
                self._queues.remove(queue)
                self._queues.append(queue)
        return deliveries

    def _hand_out(self, held: Held, now: float) -> Delivery:
        held.attempt += 1
        held.tag, held.holder, held.until = new_id(), self._name, now + self._lease
        return Delivery(held.message, held.tag, held.attempt)

    # --8<-- [end:claim]

    # --8<-- [start:settle]
    def settle(self, endings: Sequence[Ending]) -> list[Settled]:
        self._check_open()
        try:
            return self._spool.change(lambda state: [self._settle(state, ending) for ending in endings])
        except BrokerUnavailable as error:
            return [Settled(SettleOutcome.FAILED, error)] * len(endings)

    def _settle(self, state: State, ending: Ending) -> Settled:
        held = state.by_tag().get(ending.delivery.tag)
        if held is None:
            return LOST
        for message in ending.publish:
            reason = unsendable(message)
            if reason is not None:
                return Settled(SettleOutcome.FAILED, BrokerRefused(f"message {message.id}: {reason}."))
        state.held.remove(held)
        for message in ending.publish:
            state.store(message)
        return SETTLED

    # --8<-- [end:settle]

    def release(self, deliveries: Sequence[Delivery], delay: float = 0.0, *, keep_attempt: bool = False) -> None:
        self._check_open()

        def give_back(state: State) -> None:
            by_tag = state.by_tag()
            for held in [by_tag[each.tag] for each in deliveries if each.tag in by_tag]:
                held.give_back()
                held.attempt -= not keep_attempt
                held.until = time.time() + delay if delay > 0 else 0.0

        self._spool.change(give_back)

    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        self._check_open()

        def renew(state: State) -> list[Settled]:
            by_tag = state.by_tag()
            for held in [by_tag[each.tag] for each in deliveries if each.tag in by_tag]:
                held.until = time.time() + self._lease
            return [SETTLED if each.tag in by_tag else LOST for each in deliveries]

        try:
            return self._spool.change(renew)
        except BrokerUnavailable as error:
            return [Settled(SettleOutcome.FAILED, error)] * len(deliveries)

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        if self._closed:
            return
        self._closed = self._stopped = True
        with suppress(BrokerUnavailable):  # then the leases end by themselves
            self._spool.change(lambda state: state.leave(self._name))

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed("This consumer was closed.")


class SpoolListener(Listener):
    """Knows the number of the last event that it heard."""

    def __init__(self, spool: SpoolTransport, topic: str, heard_up_to: int) -> None:
        self._spool, self._topic, self._heard_up_to = spool, topic, heard_up_to
        self._closed = False

    def receive(self, timeout: float) -> list[bytes]:
        if self._closed:
            raise TransportClosed("This listener was closed.")
        return _wait(self._hear, timeout, lambda: self._closed)

    def _hear(self) -> list[bytes]:
        events = self._spool.change(lambda state: state.events)
        heard = [each for each in events if each[0] > self._heard_up_to and each[1] == self._topic]
        if heard:
            self._heard_up_to = heard[-1][0]
        return [payload for _, _, payload in heard]

    def close(self) -> None:
        self._closed = True


def _condition(held: Held, now: float) -> Condition:
    if held.until <= now:
        return Condition.READY
    return Condition.DELAYED if held.tag is None else Condition.LEASED


def _lock(lock: BinaryIO, give_up: float) -> None:
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= give_up:
                raise BrokerUnavailable(f"{lock.name}: others kept it until the call had to end.") from None
        time.sleep(LOCKED_LOOK_AGAIN_SECONDS)


def _wait(look: Callable[[], list[Found]], timeout: float, is_over: Callable[[], bool]) -> list[Found]:
    """What ``look`` finds, as soon as it finds something; nothing when the time is over, or it is over."""
    give_up = time.monotonic() + timeout
    while not is_over():
        found = look()
        remaining = give_up - time.monotonic()
        if found or remaining <= 0:
            return found
        time.sleep(min(LOOK_AGAIN_SECONDS, remaining))
    return []
