"""The consumer: claims what is ready, waits for rings and for the clock, and ends what it holds."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from ekiden.errors import TransportClosed, TransportError
from ekiden.locks import Flag
from ekiden.message import Delivery, Ending, Settled, SettleOutcome
from ekiden.transport import Consumer

from ekiden_mongodb.claiming import AT_ONCE, Claimer
from ekiden_mongodb.client import Client
from ekiden_mongodb.contexts import in_own_context
from ekiden_mongodb.documents import Messages, document_id
from ekiden_mongodb.holding import Holdings
from ekiden_mongodb.publishing import Publisher
from ekiden_mongodb.settling import Settler
from ekiden_mongodb.signals import Signals

LOOK_AGAIN_SECONDS = 3.0
"""How long a waiter trusts that it will be rung."""

_SOONEST_SECONDS = 0.001
"""What becomes ready so soon is waited for so long: dates are whole milliseconds."""


class MongoDBConsumer(Consumer):
    """Claims messages and ends them.

    ``_holdings`` is what it holds; ``receive`` adds to it, the thread that settles removes. Everything else belongs to
    the thread that receives. ``_look_at`` is when it is to look for ready messages, unless it is rung before;
    ``_next_change`` when something becomes ready by the clock, or None where that is to be asked; both are times of
    the monotonic clock. ``_trusts``: it is to look then only because a ring may have been lost.
    """

    def __init__(
        self,
        client: Client,
        messages: Messages,
        publisher: Publisher,
        signals: Signals,
        queues: Sequence[str],
        *,
        left: Callable[[MongoDBConsumer], None],
        lease: float,
        prefetch: int,
        name: str,
        strict: bool,
    ) -> None:
        self._client = client
        self._signals = signals
        self._queues = list(dict.fromkeys(queues))
        self._left = left
        self._prefetch = prefetch
        self._name = name
        self._holdings = Holdings()
        self._claimer = Claimer(
            client, messages, publisher, self._holdings, queues, lease=lease, name=name, strict=strict
        )
        self._settler = Settler(client, messages, publisher, self._holdings, lease=lease)
        self._look_at = 0.0
        self._next_change: float | None = None
        self._trusts = False
        self._receiving = threading.Lock()
        self._room_made = Flag()
        self._stopped = False
        self._closed = False
        if self._claimer.open():
            signals.ring(self._queues)
        self._waiter = signals.waiter(self._queues)

    @in_own_context
    def receive(self, limit: int, timeout: float) -> list[Delivery]:
        give_up = time.monotonic() + timeout
        with self._receiving:
            self._check_open()
            while not self._stopped:
                room = min(limit, self._room())
                if room > 0 and (timeout <= 0 or self._is_to_look()) and (found := self._claim(room)):
                    return found
                left = give_up - time.monotonic()
                if left <= 0:
                    return []
                if room > 0:
                    self._wait(left)
                else:
                    self._wait_for_room(left)
            return []

    @in_own_context
    def settle(self, endings: Sequence[Ending]) -> list[Settled]:
        self._check_open()
        answers = self._settler.settle(endings)
        self._drop(
            ending.delivery
            for ending, answer in zip(endings, answers, strict=True)
            if answer.outcome is not SettleOutcome.FAILED
        )
        return answers

    @in_own_context
    def release(self, deliveries: Sequence[Delivery], delay: float = 0.0, *, keep_attempt: bool = False) -> None:
        self._check_open()
        self._settler.release(deliveries, delay=delay, keep_attempt=keep_attempt)
        self._drop(deliveries)
        self._signals.ring({delivery.message.queue for delivery in deliveries})

    @in_own_context
    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        self._check_open()
        answers = self._settler.extend(deliveries)
        self._drop(
            delivery
            for delivery, answer in zip(deliveries, answers, strict=True)
            if answer.outcome is SettleOutcome.LOST
        )
        return answers

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._waiter.wake()
            self._room_made.set()

    @in_own_context
    def close(self) -> None:
        self.stop()
        with self._receiving:
            closed_before, self._closed = self._closed, True
            if closed_before:
                return
            self._waiter.close()
        self._left(self)
        with contextlib.suppress(TransportError):  # then the leases end by themselves
            if held := self._holdings.by_token() | self._claimer.unanswered():
                self._settler.give_back(held)
                self._signals.ring(self._queues)

    def abandon(self) -> None:
        """In a forked child: what this holds is the parent's."""
        self._closed = self._stopped = True
        self._receiving = threading.Lock()

    # Claiming and waiting.

    def _is_to_look(self) -> bool:
        """Whether something may be ready. Where only a lost ring would say so, the clock's question tells as well."""
        if time.monotonic() < self._look_at:
            return False
        if self._trusts:
            self._ask_for_next_change()
        return time.monotonic() >= self._look_at

    def _claim(self, room: int) -> list[Delivery]:
        self._trusts = False
        found, may_be_more = self._claimer.claim(room)
        # What comes after a claim that took all there was rings: waiting is the quicker way to hear of it.
        self._look_at = 0.0 if may_be_more else self._known_change()
        if not found:
            self._next_change = None  # it may be for something delayed that it was rung
        return found

    def _wait(self, seconds: float) -> None:
        """Wait for a ring, or until something becomes ready by the clock, or for ``seconds``."""
        if self._next_change is None or self._next_change <= time.monotonic():
            self._ask_for_next_change()
        wait = min(seconds, self._look_at - time.monotonic())
        if self._waiter.wait(max(0.0, wait)):
            self._look_at, self._trusts = 0.0, False

    def _ask_for_next_change(self) -> None:
        """Find out when to look again, and make ready what nobody holds any more."""
        with self._client.asking():
            change = self._claimer.next_change()
            if change is not None and change.seconds <= 0:
                if change.leased and self._claimer.reap() > AT_ONCE // 2:
                    self._signals.ring(self._queues)  # that is work for several
                self._look_at, self._trusts = 0.0, False
                return
        now = time.monotonic()
        trusted = now + LOOK_AGAIN_SECONDS * random.uniform(0.8, 1.0)  # not all waiters at once
        changes = math.inf if change is None else now + max(change.seconds, _SOONEST_SECONDS)
        self._look_at = self._next_change = min(trusted, changes)
        self._trusts = trusted < changes

    def _known_change(self) -> float:
        """When something becomes ready by the clock, as far as was asked; now, where it was not."""
        return 0.0 if self._next_change is None else self._next_change

    def _wait_for_room(self, seconds: float) -> None:
        self._room_made.clear()
        lease_end = self._holdings.first_end()
        if self._room() <= 0 and not self._stopped:
            ends = math.inf if lease_end is None else lease_end - time.monotonic()
            self._room_made.wait(max(0.0, min(seconds, ends)))

    def _room(self) -> int:
        room = self._prefetch - len(self._holdings)
        if room <= 0:
            self._holdings.drop_expired()
            room = self._prefetch - len(self._holdings)
        return room

    def _drop(self, deliveries: Iterable[Delivery]) -> None:
        """These are not held any more."""
        for delivery in deliveries:
            self._holdings.drop(document_id(delivery.message.queue, delivery.message.id), delivery.tag)
        self._room_made.set()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"The consumer {self._name!r} was closed.")
