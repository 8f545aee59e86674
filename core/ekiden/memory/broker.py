"""The queues of one broker in memory, and who waits at them. Every method expects the broker's lock held."""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections import deque
from itertools import count, islice
from typing import TYPE_CHECKING

from ekiden.message import HIGHEST_PRIORITY, REPLY_PREFIX, Condition, Depth, Message, Seen

if TYPE_CHECKING:
    from ekiden.memory.transport import MemoryConsumer, MemoryListener


class Held:
    """A message while the broker has it. ``lease_end`` is on the monotonic clock, and None while nobody holds it."""

    __slots__ = ("attempt", "lease_end", "message", "order", "queue")

    def __init__(self, message: Message, queue: Queue, order: int) -> None:
        self.message = message
        self.queue = queue
        self.order = order
        self.attempt = 0
        self.lease_end: float | None = None


class Queue:
    """One queue: its messages by id in ``held``, and those that nobody holds in ``ready`` or ``delayed``."""

    def __init__(self, broker: Broker) -> None:
        self.held: dict[str, Held] = {}
        self.ready: list[deque[Held]] = [deque() for _ in range(HIGHEST_PRIORITY + 1)]
        self.delayed: list[tuple[float, int, Held]] = []
        self.waiting: dict[MemoryConsumer, None] = {}
        self.most_urgent_first = self.ready[::-1]
        self._broker = broker

    def add(self, message: Message, order: int) -> bool:
        if message.id in self.held:
            return False
        held = Held(copied(message), self, order)
        line = self.ready[message.priority]
        is_delayed = message.due is not None and message.due > time.time()
        try:
            if is_delayed:
                heapq.heappush(self.delayed, (message.due or 0.0, order, held))
            else:
                line.append(held)
            self.held[message.id] = held
            self._broker.size += 1
        except BaseException:  # interrupted: it is stored, or it is not, but not by half
            self._forget(held)
            raise
        if is_delayed and self.delayed[0][2] is held:
            self.call_all()  # they wait for the first one to be due, and that is another one now
        elif self.waiting and not is_delayed:
            self.call_one()
        return True

    def _forget(self, held: Held) -> None:
        self.delayed = [each for each in self.delayed if each[2] is not held]
        heapq.heapify(self.delayed)
        line = self.ready[held.message.priority]
        if line and line[-1] is held:
            line.pop()
        self.remove(held)

    def postpone(self, held: Held, due: float) -> None:
        heapq.heappush(self.delayed, (due, held.order, held))
        held.lease_end = None
        if self.delayed[0][2] is held:
            self.call_all()  # they wait for the first one to be due, and that is another one now

    def give_back(self, held: Held) -> None:
        self.ready[held.message.priority].appendleft(held)
        held.lease_end = None
        if self.waiting:
            self.call_one()

    def remove(self, held: Held) -> None:
        if self.held.get(held.message.id) is held:
            del self.held[held.message.id]
            self._broker.size -= 1

    def move_due(self, wall_clock: float) -> None:
        while self.delayed and self.delayed[0][0] <= wall_clock:
            held = self.delayed[0][2]
            self.ready[held.message.priority].append(held)
            heapq.heappop(self.delayed)

    def has_ready(self) -> bool:
        return any(self.ready)

    def call_one(self) -> None:
        consumer = next(iter(self.waiting))
        consumer.called.ring()
        del self.waiting[consumer]

    def call_all(self) -> None:
        while self.waiting:
            self.call_one()

    def browse(self, *, after: int, limit: int) -> list[Seen]:
        delayed = {held.order for _, _, held in self.delayed}
        later = (held for held in self.held.values() if held.order > after)
        return [
            Seen(copied(held.message), _condition(held, delayed), held.attempt, str(held.order))
            for held in islice(later, limit)
        ]

    def depth(self) -> Depth:
        ready = sum(map(len, self.ready))
        return Depth(ready, len(self.delayed), len(self.held) - ready - len(self.delayed))

    def purge(self) -> int:
        doomed = [held for line in self.ready for held in line] + [held for _, _, held in self.delayed]
        for held in doomed:
            self.remove(held)
        for line in self.ready:
            line.clear()
        self.delayed.clear()
        return len(doomed)


class Broker:
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
        self._queues: dict[str, Queue] = {}
        self.consumers: list[MemoryConsumer] = []

    def queue(self, name: str) -> Queue:
        found = self._queues.get(name)
        if found is None:
            found = self._queues[name] = Queue(self)
        return found

    def look_at(self, name: str) -> Queue | None:
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
        return queue.add(message, next(self._orders))

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
                held = consumer.leased[tag]
                held.queue.give_back(held)
                del consumer.leased[tag]

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
            tag, held = next(reversed(consumer.leased.items()))
            held.queue.give_back(held)
            del consumer.leased[tag]


def copied(message: Message) -> Message:
    """The same message with headers of its own; without headers there is nothing that could be changed."""
    if not message.headers:
        return message
    return Message(message.id, message.queue, message.body, dict(message.headers), message.priority, message.due)


def _condition(held: Held, delayed: set[int]) -> Condition:
    if held.lease_end is not None:
        return Condition.LEASED
    return Condition.DELAYED if held.order in delayed else Condition.READY
