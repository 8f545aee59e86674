"""The broker and the result store in this process's memory: the reference for every other transport and backend.

``memory://`` and ``memory://NAME`` each mean one broker and one result store per process and name, shared by all
who open that URL, in any thread. They live until the process ends; nothing of them is seen by another process, and a
forked child begins with empty ones.

A message is in exactly one of three places, and always in its queue's ``held`` as well:

    queue.ready[priority]    waiting to be received, oldest first
    queue.delayed            a heap by due time
    consumer.leased          handed out, by tag; the next lease to end comes first

``receive`` moves it from ready to leased, the passing of time from delayed to ready, ``release``, ``close`` and the
end of a lease from leased to ready, and ``settle`` removes it. Nothing watches the clock: whoever looks at a queue
first moves what is due and takes back ended leases, and whoever waits does so until the next of these.

One lock guards a whole broker, another a whole store. Methods of the classes with an underscore expect it held.
"""

from __future__ import annotations

import heapq
import math
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import count, islice
from typing import Generic, TypeVar

import msgspec

from ekiden.errors import BackendError, BrokerRefused, BrokerUnavailable, ConfigurationError, TransportClosed
from ekiden.message import (
    DUPLICATE,
    HIGHEST_PRIORITY,
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
    unsendable,
)
from ekiden.results import Backend, BeginOutcome, Begun, Joined, Record, Start, StoredResult
from ekiden.states import RETRY, STARTED, is_final, may_follow
from ekiden.transport import Consumer, Listener, Transport, TransportDescription
from ekiden.urls import BrokerURL

Value = TypeVar("Value")


class MemoryOptions(msgspec.Struct, frozen=True):
    """What may stand behind the ``?`` of a ``memory://`` URL.

    ``max_messages``: how many messages the broker holds before it answers that it is full.
    ``max_message_bytes``: the largest body it takes.
    """

    max_messages: int = 10_000_000
    max_message_bytes: int = 64 * 1024 * 1024


class MemoryTransport(Transport):
    """A broker in this process. It copies what it is given, so nobody shares a value with anybody."""

    description = TransportDescription(
        summary="a broker inside one process, for tests and for work that may be lost with it",
        durability="none: everything is gone when the process ends",
        hand_over="follow-ups are stored and the delivery is settled in one act",
        wake_up="a condition variable per waiting consumer",
        shortest_lease=0.01,
        dead_consumer_noticed_within=0.0,
        wakes_within=0.0,
        shared_between_processes=False,
        survives_restart=False,
        url_example="memory://",
        options=MemoryOptions,
    )

    def __init__(self, url: BrokerURL) -> None:
        self._name = _name_in(url)
        self._limits = url.options_as(MemoryOptions)
        self._broker = _in_this_process.named(self._name).broker
        self._closed = False

    def publish(self, messages: Sequence[Message]) -> list[Published]:
        broker = self._broker
        with broker.lock:
            self._check_open()
            return [self._publish_one(message) for message in messages]

    def consumer(
        self, queues: Sequence[str], *, lease: float, prefetch: int, name: str, strict: bool = False
    ) -> Consumer:
        with self._broker.lock:
            self._check_open()
            consumer = MemoryConsumer(
                self, self._broker, queues, lease=lease, prefetch=prefetch, name=name, strict=strict
            )
            self._broker.enter(consumer)
            return consumer

    def browse(self, queue: str, *, after: str | None = None, limit: int = 100) -> list[Seen]:
        with self._broker.lock:
            self._check_open()
            found = self._broker.look_at(queue)
            return found.browse(after=int(after) if after is not None else 0, limit=limit) if found else []

    def depth(self, queue: str) -> Depth:
        with self._broker.lock:
            self._check_open()
            found = self._broker.look_at(queue)
            return found.depth() if found else Depth(0, 0, 0)

    def purge(self, queue: str) -> int:
        with self._broker.lock:
            self._check_open()
            found = self._broker.look_at(queue)
            return found.purge() if found else 0

    def broadcast(self, topic: str, payloads: Sequence[bytes]) -> None:
        with self._broker.lock:
            self._check_open()
            for listener in self._broker.listeners.get(topic, ()):
                listener.hear(payloads)

    def listen(self, topic: str) -> Listener:
        with self._broker.lock:
            self._check_open()
            listener = MemoryListener(self, self._broker, topic)
            self._broker.listeners.setdefault(topic, []).append(listener)
            return listener

    def close(self) -> None:
        with self._broker.lock:
            self._closed = True
            consumers = [consumer for consumer in self._broker.consumers if consumer.transport is self]
            listening = [listener for heard in self._broker.listeners.values() for listener in heard]
            listeners = [listener for listener in listening if listener.transport is self]
        for consumer in consumers:
            consumer.close()
        for listener in listeners:
            listener.close()

    def forget(self) -> None:
        self._broker = _in_this_process.named(self._name).broker

    def store_all(self, messages: Sequence[Message], *, leaving: int = 0) -> Exception | None:
        """Store every message, or none and say why. ``leaving`` messages are about to make room."""
        if len(messages) > leaving and self._broker.size + len(messages) - leaving > self._limits.max_messages:
            return self._full()
        for message in messages:
            refused = self._refusal(message)
            if refused is not None:
                return refused
        for message in messages:
            self._broker.store(message)
        return None

    def _publish_one(self, message: Message) -> Published:
        refused = self._refusal(message)
        if refused is not None:
            return Published(PublishOutcome.FAILED, refused)
        if self._broker.size >= self._limits.max_messages:
            return Published(PublishOutcome.FAILED, self._full())
        return STORED if self._broker.store(message) else DUPLICATE

    def _refusal(self, message: Message) -> BrokerRefused | None:
        reason = unsendable(message)
        if reason is None and len(message.body) > self._limits.max_message_bytes:
            limit = self._limits.max_message_bytes
            reason = f"its body has {len(message.body)} bytes and max_message_bytes is {limit}"
        return BrokerRefused(f"message {message.id} for queue {message.queue!r}: {reason}.") if reason else None

    def _full(self) -> BrokerUnavailable:
        return BrokerUnavailable(f"memory://{self._name} is full: it holds max_messages={self._limits.max_messages}.")

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"memory://{self._name} was closed here; open it again.")


class MemoryConsumer(Consumer):
    """Holds what it received until it is settled or released, or its lease ends. The broker's lock guards all of it."""

    def __init__(
        self,
        transport: MemoryTransport,
        broker: _Broker,
        queues: Sequence[str],
        *,
        lease: float,
        prefetch: int,
        name: str,
        strict: bool,
    ) -> None:
        self.transport = transport
        self.name = name
        self.lease = lease
        # Every lease is equally long, so the order of handing out and extending is the order in which they end.
        self.leased: OrderedDict[int, _Held] = OrderedDict()
        self.queues = [broker.queue(queue) for queue in dict.fromkeys(queues)]
        self.called = threading.Condition(broker.lock)
        self._broker = broker
        self._prefetch = prefetch
        self._strict = strict
        self._waits_for_room = False
        self._stopped = False
        self._closed = False

    def receive(self, limit: int, timeout: float) -> list[Delivery]:
        give_up = time.monotonic() + timeout
        with self._broker.lock:
            self._check_open()
            try:
                while not self._stopped:
                    room = min(limit, self._prefetch - len(self.leased))
                    received = self._claim(room)
                    if received or not self._wait(give_up, has_room=room > 0):
                        return received
                return []
            finally:
                self._call_others()

    def settle(self, endings: Sequence[Ending]) -> list[Settled]:
        with self._broker.lock:
            self._check_open()
            answers = [self._settle_one(ending) for ending in endings]
            self._tell_of_room()
            return answers

    def release(self, deliveries: Sequence[Delivery], delay: float = 0.0) -> None:
        with self._broker.lock:
            self._check_open()
            returned = [held for delivery in deliveries if (held := self.leased.pop(delivery.tag, None)) is not None]
            for held in reversed(returned):
                held.attempt -= 1
                if delay > 0:
                    held.queue.postpone(held, time.time() + delay)
                else:
                    held.queue.give_back(held)
            self._tell_of_room()

    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        with self._broker.lock:
            self._check_open()
            lease_end = time.monotonic() + self.lease
            return [self._extend_one(delivery, lease_end) for delivery in deliveries]

    def stop(self) -> None:
        with self._broker.lock:
            self._stopped = True
            self.called.notify()

    def close(self) -> None:
        with self._broker.lock:
            if not self._closed:
                self._closed = self._stopped = True
                self.called.notify()
                self._broker.leave(self)

    def _claim(self, room: int) -> list[Delivery]:
        now = time.monotonic()
        self._broker.take_back_ended_leases(now)
        if room <= 0:
            return []
        lease_end = now + self.lease
        self._broker.next_lease_end = min(self._broker.next_lease_end, lease_end)
        return [self._hand_out(held, lease_end) for held in self._next_in_turn(room)]

    def _next_in_turn(self, room: int) -> list[_Held]:
        wall_clock = time.time()
        taken: list[_Held] = []
        for queue in list(self.queues):
            if len(taken) == room:
                break
            queue.move_due(wall_clock)
            if queue.has_ready():
                taken += queue.take(room - len(taken))
                if not self._strict:
                    self.queues.remove(queue)
                    self.queues.append(queue)  # who was served stands at the back
        return taken

    def _hand_out(self, held: _Held, lease_end: float) -> Delivery:
        tag = next(self._broker.tags)
        held.attempt += 1
        held.lease_end = lease_end
        self.leased[tag] = held
        return Delivery(_copy(held.message), tag, held.attempt)

    def _wait(self, give_up: float, *, has_room: bool) -> bool:
        """Wait until there may be something to receive; False when it is time to give up."""
        now = time.monotonic()
        if now >= give_up:
            return False
        # A lease that somebody takes during this wait ends no earlier than the shortest lease from now.
        until = min(give_up, self._broker.next_lease_end, now + self._broker.shortest_lease)
        if has_room:
            wall_clock = time.time()
            for queue in self.queues:
                queue.waiting[self] = None
                if queue.delayed:
                    until = min(until, now + queue.delayed[0][0] - wall_clock)
        self._waits_for_room = not has_room
        try:
            self.called.wait(min(until - now, threading.TIMEOUT_MAX))
        finally:
            for queue in self.queues:
                queue.waiting.pop(self, None)
        return True

    def _call_others(self) -> None:
        """Whoever leaves a queue with messages in it calls the next, so that none waits beside a message."""
        for queue in self.queues:
            if queue.waiting and queue.has_ready():
                queue.call_one()

    def _tell_of_room(self) -> None:
        if self._waits_for_room:
            self._waits_for_room = False
            self.called.notify()

    def _settle_one(self, ending: Ending) -> Settled:
        held = self.leased.get(ending.delivery.tag)
        if held is None:
            return LOST
        if ending.publish:
            error = self.transport.store_all(ending.publish, leaving=1)
            if error is not None:
                return Settled(SettleOutcome.FAILED, error)
        del self.leased[ending.delivery.tag]
        held.queue.remove(held)
        return SETTLED

    def _extend_one(self, delivery: Delivery, lease_end: float) -> Settled:
        held = self.leased.get(delivery.tag)
        if held is None:
            return LOST
        held.lease_end = lease_end
        self.leased.move_to_end(delivery.tag)
        return SETTLED

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"The consumer {self.name!r} was closed.")


class MemoryListener(Listener):
    """Hears one topic. The broker's lock guards all of it."""

    def __init__(self, transport: MemoryTransport, broker: _Broker, topic: str) -> None:
        self.transport = transport
        self._broker = broker
        self._topic = topic
        self._heard: list[bytes] = []
        self._called = threading.Condition(broker.lock)
        self._closed = False

    def hear(self, payloads: Iterable[bytes]) -> None:
        self._heard.extend(payloads)
        self._called.notify()

    def receive(self, timeout: float) -> list[bytes]:
        with self._broker.lock:
            if self._closed:
                raise TransportClosed(f"The listener to topic {self._topic!r} was closed.")
            self._called.wait_for(lambda: self._heard or self._closed, min(timeout, threading.TIMEOUT_MAX))
            heard, self._heard = self._heard, []
            return heard

    def close(self) -> None:
        with self._broker.lock:
            if self._closed:
                return
            self._closed = True
            self._called.notify()
            listeners = self._broker.listeners[self._topic]
            listeners.remove(self)
            if not listeners:
                del self._broker.listeners[self._topic]


class _Held:
    """A message while the broker has it. ``lease_end`` is on the monotonic clock, and None while nobody holds it."""

    __slots__ = ("attempt", "lease_end", "message", "order", "queue")

    def __init__(self, message: Message, queue: _Queue, order: int) -> None:
        self.message = message
        self.queue = queue
        self.order = order
        self.attempt = 0
        self.lease_end: float | None = None


class _Queue:
    """One queue: its messages by id in ``held``, and those that nobody holds in ``ready`` or ``delayed``."""

    def __init__(self, broker: _Broker) -> None:
        self.held: dict[str, _Held] = {}
        self.ready: list[deque[_Held]] = [deque() for _ in range(HIGHEST_PRIORITY + 1)]
        self.delayed: list[tuple[float, int, _Held]] = []
        self.waiting: dict[MemoryConsumer, None] = {}
        self._most_urgent_first = self.ready[::-1]
        self._broker = broker

    def add(self, message: Message, order: int) -> bool:
        if message.id in self.held:
            return False
        held = self.held[message.id] = _Held(_copy(message), self, order)
        if message.due is not None and message.due > time.time():
            self.postpone(held, message.due)
        else:
            self.ready[message.priority].append(held)
            if self.waiting:
                self.call_one()
        return True

    def postpone(self, held: _Held, due: float) -> None:
        held.lease_end = None
        heapq.heappush(self.delayed, (due, held.order, held))
        if self.delayed[0][2] is held:
            self.call_all()  # they wait for the first one to be due, and that is another one now

    def give_back(self, held: _Held) -> None:
        held.lease_end = None
        self.ready[held.message.priority].appendleft(held)
        if self.waiting:
            self.call_one()

    def remove(self, held: _Held) -> None:
        del self.held[held.message.id]
        self._broker.size -= 1

    def move_due(self, wall_clock: float) -> None:
        while self.delayed and self.delayed[0][0] <= wall_clock:
            held = heapq.heappop(self.delayed)[2]
            self.ready[held.message.priority].append(held)

    def has_ready(self) -> bool:
        return any(self.ready)

    def take(self, limit: int) -> list[_Held]:
        taken: list[_Held] = []
        for line in self._most_urgent_first:
            while line and len(taken) < limit:
                taken.append(line.popleft())
        return taken

    def call_one(self) -> None:
        consumer = next(iter(self.waiting))
        del self.waiting[consumer]
        consumer.called.notify()

    def call_all(self) -> None:
        while self.waiting:
            self.call_one()

    def browse(self, *, after: int, limit: int) -> list[Seen]:
        delayed = {held.order for _, _, held in self.delayed}
        later = (held for held in self.held.values() if held.order > after)
        return [
            Seen(_copy(held.message), _condition(held, delayed), held.attempt, str(held.order))
            for held in islice(later, limit)
        ]

    def depth(self) -> Depth:
        ready = sum(map(len, self.ready))
        return Depth(ready, len(self.delayed), len(self.held) - ready - len(self.delayed))

    def purge(self) -> int:
        doomed = [held for line in self.ready for held in line] + [held for _, _, held in self.delayed]
        for line in self.ready:
            line.clear()
        self.delayed.clear()
        for held in doomed:
            self.remove(held)
        return len(doomed)


class _Broker:
    """The queues, consumers and listeners of one ``memory://NAME``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.listeners: dict[str, list[MemoryListener]] = {}
        self.tags = count(1)
        self.size = 0
        # No lease ends before this; when it has passed, one of them may have ended.
        self.next_lease_end = math.inf
        self.shortest_lease = math.inf
        self._orders = count(1)
        self._queues: dict[str, _Queue] = {}
        self.consumers: list[MemoryConsumer] = []

    def queue(self, name: str) -> _Queue:
        found = self._queues.get(name)
        if found is None:
            found = self._queues[name] = _Queue(self)
        return found

    def look_at(self, name: str) -> _Queue | None:
        """The queue as it is at this moment, or None when there is none."""
        found = self._queues.get(name)
        if found is not None:
            self.take_back_ended_leases(time.monotonic())
            found.move_due(time.time())
        return found

    def store(self, message: Message) -> bool:
        """False when its queue holds its id already."""
        queue = self._queues.get(message.queue)
        if queue is None:
            if message.queue.startswith(REPLY_PREFIX):
                return True  # nobody waits for this reply any more
            queue = self.queue(message.queue)
        if not queue.add(message, next(self._orders)):
            return False
        self.size += 1
        return True

    def take_back_ended_leases(self, now: float) -> None:
        if now < self.next_lease_end:
            return
        self.next_lease_end = math.inf
        for consumer in self.consumers:
            ended = []
            for tag, held in consumer.leased.items():
                if held.lease_end is not None and held.lease_end > now:
                    self.next_lease_end = min(self.next_lease_end, held.lease_end)
                    break
                ended.append(tag)
            for tag in reversed(ended):
                held = consumer.leased.pop(tag)
                held.queue.give_back(held)

    def enter(self, consumer: MemoryConsumer) -> None:
        for earlier in self.consumers:
            if earlier.name == consumer.name:
                self._take_back_all(earlier)
        self.consumers.append(consumer)
        if consumer.lease < self.shortest_lease:
            self.shortest_lease = consumer.lease
            for queue in self._queues.values():
                queue.call_all()

    def leave(self, consumer: MemoryConsumer) -> None:
        self._take_back_all(consumer)
        self.consumers.remove(consumer)
        self.shortest_lease = min((other.lease for other in self.consumers), default=math.inf)
        in_use = {id(queue) for other in self.consumers for queue in other.queues}
        for name in [name for name in self._queues if name.startswith(REPLY_PREFIX)]:
            if id(self._queues[name]) not in in_use:
                self.size -= len(self._queues.pop(name).held)

    def _take_back_all(self, consumer: MemoryConsumer) -> None:
        while consumer.leased:
            _, held = consumer.leased.popitem(last=True)
            held.queue.give_back(held)


class MemoryBackend(Backend):
    """A result store in this process."""

    def __init__(self, url: BrokerURL) -> None:
        url.options_as(MemoryOptions)
        self._name = _name_in(url)
        self._store = _in_this_process.named(self._name).store
        self._waits: set[_Wait] = set()
        self._closed = False

    def put(self, results: Sequence[StoredResult]) -> list[bool]:
        with self._opened() as store:
            answers = [store.put(result) for result in results]
            store.call({result.task_id for result in results if is_final(result.state)})
            return answers

    def get(self, ids: Sequence[str]) -> list[StoredResult | None]:
        with self._opened() as store:
            return [store.get(task_id) for task_id in ids]

    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        with self._opened() as store:
            final = store.final(ids)
            if final or timeout <= 0:
                return final
            wait = _Wait(set(ids), threading.Condition(store.lock))
            store.waits.add(wait)
            self._waits.add(wait)
            try:
                wait.called.wait_for(lambda: wait.over or self._closed, min(timeout, threading.TIMEOUT_MAX))
            finally:
                store.waits.discard(wait)
                self._waits.discard(wait)
            return store.final(ids)

    def wake(self) -> None:
        with self._store.lock:
            for wait in self._waits:
                wait.end()

    def forget(self, ids: Sequence[str]) -> None:
        with self._opened() as store:
            for task_id in ids:
                store.results.discard(task_id)
                store.starts.discard(task_id)

    def begin(self, starts: Sequence[Start]) -> list[Begun]:
        with self._opened() as store:
            return [store.begin(start) for start in starts]

    def join(self, join_id: str, member: str, outcome: bytes, *, size: int, expires: float | None) -> Joined:
        with self._opened() as store:
            arrived = store.joins.get(join_id) or {}
            arrived.setdefault(member, outcome)
            store.joins.set(join_id, arrived, expires=expires)
            complete = len(arrived) >= size
            return Joined(len(arrived), complete, dict(arrived) if complete else {})

    def read(self, keys: Sequence[str]) -> list[Record | None]:
        with self._opened() as store:
            return [store.records.get(key) for key in keys]

    def write(
        self, key: str, value: bytes | None, *, expected_version: int | None = None, expires: float | None = None
    ) -> int | None:
        with self._opened() as store:
            record = store.records.get(key)
            version = record.version if record is not None else 0
            if expected_version is not None and expected_version != version:
                return None
            if value is None:
                store.records.discard(key)
                return 0
            store.records.set(key, Record(key, value, version + 1), expires=expires)
            return version + 1

    def scan(self, prefix: str) -> list[Record]:
        with self._opened() as store:
            found = (store.records.get(key) for key in sorted(store.records.keys()) if key.startswith(prefix))
            return [record for record in found if record is not None]

    def close(self) -> None:
        self._closed = True
        self.wake()

    def forget_connections(self) -> None:
        self._store = _in_this_process.named(self._name).store
        self._waits = set()

    def _opened(self) -> _Store:
        if self._closed:
            raise BackendError(f"The result backend memory://{self._name} was closed here; open it again.")
        return self._store


class _Wait:
    """Somebody waits for one of ``ids`` to be final."""

    __slots__ = ("called", "ids", "over")

    def __init__(self, ids: set[str], called: threading.Condition) -> None:
        self.ids = ids
        self.called = called
        self.over = False

    def end(self) -> None:
        self.over = True
        self.called.notify()


class _Store:
    """What one ``memory://NAME`` keeps of tasks. ``with store`` takes its lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.results: _Expiring[StoredResult] = _Expiring()
        self.starts: _Expiring[Start] = _Expiring()
        self.joins: _Expiring[dict[str, bytes]] = _Expiring()
        self.records: _Expiring[Record] = _Expiring()
        self.waits: set[_Wait] = set()

    def __enter__(self) -> _Store:
        self.lock.acquire()
        return self

    def __exit__(self, *_raised: object) -> None:
        self.lock.release()

    def put(self, result: StoredResult) -> bool:
        old = self.results.get(result.task_id)
        if old is not None and not may_follow(old.state, old.step, result.state, result.step):
            return False
        self.results.set(result.task_id, result, expires=result.expires)
        return True

    def get(self, task_id: str) -> StoredResult | None:
        stored = self.results.get(task_id)
        if stored is not None:
            return stored
        begun = self.starts.get(task_id)
        return StoredResult(task_id, STARTED, begun.step, b"", begun.expires) if begun is not None else None

    def final(self, ids: Iterable[str]) -> list[StoredResult]:
        found = (self.results.get(task_id) for task_id in ids)
        return [result for result in found if result is not None and is_final(result.state)]

    def call(self, final_ids: set[str]) -> None:
        for wait in self.waits:
            if not wait.ids.isdisjoint(final_ids):
                wait.end()

    def begin(self, start: Start) -> Begun:
        stored = self.results.get(start.task_id)
        begun = self.starts.get(start.task_id)
        if (stored is not None and stored.step > start.step) or (begun is not None and begun.step > start.step):
            return Begun(BeginOutcome.SECOND_COPY)
        if stored is not None and (is_final(stored.state) or (stored.state == RETRY and stored.step == start.step)):
            return Begun(BeginOutcome.ENDED, stored)
        if begun is not None and begun.step == start.step and begun.message_id != start.message_id:
            return Begun(BeginOutcome.SECOND_COPY)
        self.starts.set(start.task_id, start, expires=start.expires)
        return Begun(BeginOutcome.GO)


class _Expiring(Generic[Value]):
    """A mapping whose entries vanish when their time (on the monotonic clock) has come."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Value, float]] = {}
        self._ends: list[tuple[float, str]] = []

    def get(self, key: str) -> Value | None:
        entry = self._entries.get(key)
        return entry[0] if entry is not None and entry[1] > time.monotonic() else None

    def set(self, key: str, value: Value, *, expires: float | None) -> None:
        now = time.monotonic()
        while self._ends and self._ends[0][0] <= now:
            _, ended = heapq.heappop(self._ends)
            if ended in self._entries and self._entries[ended][1] <= now:
                del self._entries[ended]
        end = math.inf if expires is None else now + expires
        self._entries[key] = (value, end)
        if expires is not None:
            heapq.heappush(self._ends, (end, key))

    def discard(self, key: str) -> None:
        self._entries.pop(key, None)

    def keys(self) -> Iterable[str]:
        return self._entries.keys()


class _Shared:
    """What ``memory://NAME`` means in this process."""

    def __init__(self) -> None:
        self.broker = _Broker()
        self.store = _Store()


class _Registry:
    """Everything that this process holds in memory, by name. A forked child begins with nothing."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._process_id = os.getpid()
        self._lock = threading.Lock()
        self._by_name: dict[str, _Shared] = {}

    def named(self, name: str) -> _Shared:
        if self._process_id != os.getpid():
            self._start()  # the lock may have been taken in the parent when the child was made
        with self._lock:
            return self._by_name.setdefault(name, _Shared())

    def discard(self, name: str) -> None:
        with self._lock:
            self._by_name.pop(name, None)


# The one module-level state of ekiden: a name must mean the same broker to all who open it.
_in_this_process = _Registry()


def discard(name: str) -> None:
    """Drop the broker and the store called ``name``; who opens the name next finds them empty. For tests."""
    _in_this_process.discard(name)


def _name_in(url: BrokerURL) -> str:
    hosts = [host for host in url.hosts if host.port is None]
    if len(url.hosts) > 1 or len(hosts) != len(url.hosts) or url.path or url.username or url.variant:
        raise ConfigurationError(f"{url}: write memory:// or memory://NAME, with nothing else but options.")
    return hosts[0].name if hosts else ""


def _copy(message: Message) -> Message:
    """The same message with headers of its own; without headers there is nothing that could be changed."""
    if not message.headers:
        return message
    return Message(message.id, message.queue, message.body, dict(message.headers), message.priority, message.due)


def _condition(held: _Held, delayed: set[int]) -> Condition:
    if held.lease_end is not None:
        return Condition.LEASED
    return Condition.DELAYED if held.order in delayed else Condition.READY
