"""The transport in memory: the contract of ``ekiden.transport``, method by method, over a Broker."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportClosed
from ekiden.memory.broker import Broker, Held, copied
from ekiden.memory.options import MemoryOptions
from ekiden.memory.shared import in_this_process, name_in
from ekiden.memory.wakeup import Wakeup
from ekiden.message import (
    DUPLICATE,
    LOST,
    SETTLED,
    STORED,
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
from ekiden.transport import Consumer, Listener, Transport, TransportDescription
from ekiden.urls import BrokerURL

LOOK_AGAIN_SECONDS = 1.0
SHORTEST_WAIT_SECONDS = 0.0001


class MemoryTransport(Transport):
    """A broker in this process. It copies what it is given, so nobody shares a value with anybody."""

    description = TransportDescription(
        summary="a broker inside one process, for tests and for work that may be lost with it",
        durability="none: everything is gone when the process ends",
        hand_over="follow-ups are stored and the delivery is settled in one act",
        wake_up="each waiting consumer by itself",
        shortest_lease=0.01,
        dead_consumer_noticed_within=0.0,
        wakes_within=0.0,
        shared_between_processes=False,
        survives_restart=False,
        url_example="memory://",
        options=MemoryOptions,
    )

    def __init__(self, url: BrokerURL) -> None:
        self._name = name_in(url)
        self._limits = url.options_as(MemoryOptions)
        self._broker = in_this_process.named(self._name).broker
        self._closed = False

    def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
        # No deadline is missed here: nobody holds the lock while waiting.
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
        self._broker = in_this_process.named(self._name).broker

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
        broker: Broker,
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
        self.leased: OrderedDict[int, Held] = OrderedDict()
        self.queues = [broker.queue(queue) for queue in dict.fromkeys(queues)]
        self.called = Wakeup()
        self._broker = broker
        self._prefetch = prefetch
        self._strict = strict
        self._waits_for_room = False
        self._stopped = False
        self._closed = False

    def receive(self, limit: int, timeout: float) -> list[Delivery]:
        give_up = time.monotonic() + timeout
        self._check_open()
        try:
            while True:
                with self._broker.lock:
                    if self._stopped:
                        return []
                    room = min(limit, self._prefetch - len(self.leased))
                    received = self._claim(room)
                    seconds = 0.0 if received else self._enter_waiting(give_up, has_room=room > 0)
                if seconds <= 0:
                    return received
                self.called.wait(seconds)
        finally:
            self._leave_waiting()

    def settle(self, endings: Sequence[Ending]) -> list[Settled]:
        with self._broker.lock:
            self._check_open()
            answers = [self._settle_one(ending) for ending in endings]
            self._tell_of_room()
            return answers

    def release(self, deliveries: Sequence[Delivery], delay: float = 0.0, *, keep_attempt: bool = False) -> None:
        with self._broker.lock:
            self._check_open()
            for delivery in reversed(deliveries):
                held = self.leased.get(delivery.tag)
                if held is None:
                    continue
                held.attempt -= not keep_attempt
                if delay > 0:
                    held.queue.postpone(held, time.time() + delay)
                else:
                    held.queue.give_back(held)
                del self.leased[delivery.tag]
            self._tell_of_room()

    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        with self._broker.lock:
            self._check_open()
            lease_end = time.monotonic() + self.lease
            return [self._extend_one(delivery, lease_end) for delivery in deliveries]

    def stop(self) -> None:
        with self._broker.lock:
            self._stopped = True
            self.called.ring()

    def close(self) -> None:
        with self._broker.lock:
            if not self._closed:
                self._broker.leave(self)
                self._closed = self._stopped = True
                self.called.ring()

    def _claim(self, room: int) -> list[Delivery]:
        now = time.monotonic()
        self._broker.take_back_ended_leases(now)
        if room <= 0:
            return []
        lease_end = now + self.lease
        self._broker.next_lease_end = min(self._broker.next_lease_end, lease_end)
        wall_clock = time.time()
        received: list[Delivery] = []
        for queue in list(self.queues):
            if len(received) == room:
                break
            queue.move_due(wall_clock)
            if queue.has_ready():
                for line in queue.most_urgent_first:
                    for _ in range(min(len(line), room - len(received))):
                        received.append(self._hand_out(line[0], lease_end))
                        line.popleft()
                if not self._strict and len(self.queues) > 1:
                    # Who was served stands at the back. One assignment, so that no interruption can lose a queue.
                    self.queues = [*(each for each in self.queues if each is not queue), queue]
        return received

    def _hand_out(self, held: Held, lease_end: float) -> Delivery:
        tag = next(self._broker.tags)
        held.attempt += 1
        held.lease_end = lease_end
        self.leased[tag] = held
        return Delivery(copied(held.message), tag, held.attempt)

    def _enter_waiting(self, give_up: float, *, has_room: bool) -> float:
        """For how many seconds to wait until there may be something to receive; none when it is time to give up."""
        now = time.monotonic()
        # A lease that somebody takes during this wait ends no earlier than the shortest lease from now. A ring may be
        # lost with the thread that owed it, when that was interrupted.
        until = min(give_up, self._broker.next_lease_end, now + self._broker.shortest_lease, now + LOOK_AGAIN_SECONDS)
        if has_room:
            wall_clock = time.time()
            for queue in self.queues:
                queue.waiting[self] = None
                if queue.delayed:
                    until = min(until, now + queue.delayed[0][0] - wall_clock)
        self._waits_for_room = not has_room
        return give_up - now if now >= give_up else max(until - now, SHORTEST_WAIT_SECONDS)

    def _leave_waiting(self) -> None:
        """Whoever leaves a queue with messages in it calls the next, so that none waits beside a message."""
        with self._broker.lock:
            for queue in self.queues:
                queue.waiting.pop(self, None)
                if queue.waiting and queue.has_ready():
                    queue.call_one()

    def _tell_of_room(self) -> None:
        if self._waits_for_room:
            self._waits_for_room = False
            self.called.ring()

    def _settle_one(self, ending: Ending) -> Settled:
        held = self.leased.get(ending.delivery.tag)
        if held is None:
            return LOST
        if ending.publish:
            error = self.transport.store_all(ending.publish, leaving=1)
            if error is not None:
                return Settled(SettleOutcome.FAILED, error)
        held.queue.remove(held)
        del self.leased[ending.delivery.tag]
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

    def __init__(self, transport: MemoryTransport, broker: Broker, topic: str) -> None:
        self.transport = transport
        self._broker = broker
        self._topic = topic
        self._heard: list[bytes] = []
        self._called = Wakeup()
        self._closed = False

    def hear(self, payloads: Iterable[bytes]) -> None:
        self._heard.extend(payloads)
        self._called.ring()

    def receive(self, timeout: float) -> list[bytes]:
        give_up = time.monotonic() + timeout
        if self._closed:
            raise TransportClosed(f"The listener to topic {self._topic!r} was closed.")
        while True:
            with self._broker.lock:
                heard, self._heard = self._heard, []
                left = 0.0 if heard or self._closed else give_up - time.monotonic()
            if left <= 0:
                return heard
            self._called.wait(min(left, LOOK_AGAIN_SECONDS))

    def close(self) -> None:
        with self._broker.lock:
            if self._closed:
                return
            self._closed = True
            self._called.ring()
            listeners = self._broker.listeners[self._topic]
            listeners.remove(self)
            if not listeners:
                del self._broker.listeners[self._topic]
