"""The consumer: claims messages, waits for rings and for the clock, and ends what it received."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
from ekiden.errors import TransportClosed, TransportError
from ekiden.message import REPLY_PREFIX, Delivery, Ending, Settled
from ekiden.transport import Consumer

from ekiden_couchdb.browsing import empty
from ekiden_couchdb.claiming import LOOK_AGAIN_SECONDS, Claimer
from ekiden_couchdb.client import Client
from ekiden_couchdb.coordinators import Coordinators
from ekiden_couchdb.documents import owner_of
from ekiden_couchdb.generations import Generations
from ekiden_couchdb.holding import Holdings
from ekiden_couchdb.publishing import Publisher
from ekiden_couchdb.replies import KEPT_FRESH_EVERY_SECONDS, ReplyQueues
from ekiden_couchdb.set_aside import SetAside
from ekiden_couchdb.settling import Settler
from ekiden_couchdb.signals import Signals

_LOOK_EVERYWHERE_SECONDS = 2.0
"""A consumer that always finds something looks so often for what it would not come across."""
_SHORTEST_WAIT_SECONDS = 0.005
_SLOTS_EVERY_SECONDS = 600.0


class Shared(msgspec.Struct, frozen=True):
    """What all consumers of one transport have in common."""

    client: Client
    generations: Generations
    signals: Signals
    publisher: Publisher
    replies: ReplyQueues
    set_aside: SetAside
    coordinators: Coordinators


class CouchDBConsumer(Consumer):
    """Claims messages and ends them.

    ``receive`` and ``settle`` meet in ``Holdings`` only; everything else belongs to the thread that receives.
    """

    def __init__(
        self,
        shared: Shared,
        queues: Sequence[str],
        *,
        left: Callable[[CouchDBConsumer], None],
        lease: float,
        prefetch: int,
        name: str,
        strict: bool,
    ) -> None:
        self._client = client = shared.client
        self._generations = generations = shared.generations
        self._signals = signals = shared.signals
        self._replies = shared.replies
        self._coordinators = shared.coordinators
        self._left = left
        self._queues = tuple(dict.fromkeys(queues))
        self._turns = deque(self._queues)
        self._reply_queues = [queue for queue in self._queues if queue.startswith(REPLY_PREFIX)]
        self._prefetch = prefetch
        self._name = name
        self._strict = strict
        self._holdings = Holdings()
        self._claimer = Claimer(
            client, generations, shared.set_aside, self._holdings, owner=owner_of(name), lease=lease
        )
        self._settler = Settler(client, generations, shared.publisher, self._holdings, lease=lease)
        self._receiving = threading.Lock()
        self._waits_for_room = False
        self._keep_at = 0.0
        self._slots_at = self._lost_claims_at = 0.0
        self._look_everywhere_at = self._look_at = 0.0
        self._stopped = False
        self._closed = False
        generations.leases(lease)
        with client.one_deadline():
            self._coordinators.look()
            self._forget_abandoned_reply_queues()
            self._keep_reply_queues()
            recovered = self._claimer.recover()
            self._settler.give_back(recovered, attempts_less=0)
        if recovered:
            signals.ring({held.message.queue for held in recovered})
        self._waiter = signals.waiter(self._queues)

    def receive(self, limit: int, timeout: float) -> list[Delivery]:
        give_up = time.monotonic() + timeout
        with self._receiving:
            self._check_open()
            while not self._stopped:
                self._generations.tidy()
                self._tidy()
                self._keep_reply_queues()
                room = min(limit, self._room())
                is_to_look = self._is_to_look() or timeout <= 0
                if room > 0 and is_to_look and (found := self._claim(room)):
                    return found
                left = give_up - time.monotonic()
                if left <= 0 or (not self._wait(left, has_room=room > 0) and time.monotonic() >= give_up):
                    return []
            return []

    def settle(self, endings: Sequence[Ending]) -> list[Settled]:
        self._check_open()
        answers = self._settler.settle(endings)
        self._make_room()
        return answers

    def release(self, deliveries: Sequence[Delivery], delay: float = 0.0, *, keep_attempt: bool = False) -> None:
        self._check_open()
        found = [self._holdings.find(delivery) for delivery in deliveries]
        held = {id(each): each for each in found if each is not None}
        self._settler.give_back(held.values(), attempts_less=int(not keep_attempt), delay=delay)
        self._look_at = 0.0
        self._signals.ring({each.message.queue for each in held.values()})
        self._make_room()

    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        self._check_open()
        answers = self._settler.extend(deliveries)
        self._make_room()
        return answers

    def stop(self) -> None:
        self._stopped = True
        self._waiter.wake()

    def close(self) -> None:
        self.stop()
        with self._receiving:
            closed_before, self._closed = self._closed, True
            if closed_before:
                return
            self._waiter.close()
        self._left(self)
        with contextlib.suppress(TransportError), self._client.one_deadline():  # else the leases end by themselves
            held = [*self._holdings.all(), *self._claimer.unanswered()]
            self._settler.give_back(held, attempts_less=0)
            self._signals.ring({each.message.queue for each in held})
            self._claimer.leave()
            if self._reply_queues:
                self._replies.keep(self._reply_queues)

    def abandon(self) -> None:
        """In a forked child: what this holds is the parent's."""
        self._closed = self._stopped = True
        self._receiving = threading.Lock()

    def _tidy(self) -> None:
        """Remove what consumers leave behind: the slots of killed ones, and claims of ours that were lost."""
        now = time.monotonic()
        with contextlib.suppress(TransportError), self._client.one_deadline():  # nothing depends on it
            self._coordinators.look()
            if now >= self._slots_at:
                self._slots_at = now + _SLOTS_EVERY_SECONDS
                self._claimer.forget_old_slots()
            if now >= self._lost_claims_at and self._claimer.has_lost_claims:
                self._lost_claims_at = now + _LOOK_EVERYWHERE_SECONDS
                self._claimer.end_lost_claims()

    # Claiming.

    def _is_to_look(self) -> bool:
        """Whether something may be ready: it was rung, or it is by the clock, or the last look is some time ago."""
        if self._waiter.wait(0):
            self._look_at = 0.0
            self._claimer.look_for_delayed()
        return time.monotonic() >= min(self._look_at, self._claimer.next_change)

    def _claim(self, room: int) -> list[Delivery]:
        """Up to ``room`` messages, of the queues in their turn."""
        if time.monotonic() >= self._look_everywhere_at:
            self._look_everywhere()
        self._claimer.next_change = math.inf
        found: list[Delivery] = []
        for queue in list(self._queues if self._strict else self._turns):
            if len(found) >= room:
                break
            try:
                with self._client.one_deadline():
                    some = self._holdings.add(self._claimer.claim(queue, room - len(found)))
            except TransportError:
                if found:
                    break
                raise
            if some and not self._strict:
                # Who was served stands at the back.
                self._turns.remove(queue)
                self._turns.append(queue)
            found += some
        self._look_at = 0.0 if found else time.monotonic() + self._seconds_until_a_look()
        return found

    def _look_everywhere(self) -> None:
        self._look_at = 0.0
        self._claimer.look_everywhere()
        self._look_everywhere_at = time.monotonic() + _LOOK_EVERYWHERE_SECONDS

    def _room(self) -> int:
        return self._prefetch - len(self._holdings.in_force(time.monotonic()))

    def _make_room(self) -> None:
        if self._waits_for_room:
            self._waiter.wake()

    # Waiting.

    def _wait(self, seconds: float, *, has_room: bool) -> bool:
        """Wait for a ring, or for room, or until something becomes ready by the clock, or for ``seconds``.

        Returns early now and then, to look whether a ring was lost. Returns False when there is no news.
        """
        if has_room:
            by_the_clock = max(_SHORTEST_WAIT_SECONDS, self._claimer.next_change - time.monotonic())
            if by_the_clock < seconds and by_the_clock < LOOK_AGAIN_SECONDS:
                if self._waiter.wait(by_the_clock):
                    self._look_everywhere()
                return True
            if self._waiter.wait(max(0.0, min(seconds, self._look_at - time.monotonic()))):
                self._look_everywhere()
                return True
            return False
        self._waits_for_room = True
        now = time.monotonic()
        if self._room() <= 0:
            lease_end = min((held.ends for held in self._holdings.in_force(now)), default=now)
            if self._waiter.wait(max(0.0, min(seconds, lease_end - now))):
                self._look_everywhere()  # it may have been a ring
        self._waits_for_room = False
        return True

    def _seconds_until_a_look(self) -> float:
        """Not the same for all who wait, and at a moment at which the answer tells most about the server's clock."""
        if self._claimer.has_lost_claims:
            return _LOOK_EVERYWHERE_SECONDS
        look_in = LOOK_AGAIN_SECONDS * random.uniform(0.6, 0.8)
        if self._client.clock.is_known:
            look_in += (self._client.clock.tells_most_at() - time.monotonic() - look_in) % 1.0
        return look_in

    # Reply queues.

    def _keep_reply_queues(self) -> None:
        if self._reply_queues and time.monotonic() >= self._keep_at:
            self._replies.keep(self._reply_queues)
            self._keep_at = time.monotonic() + KEPT_FRESH_EVERY_SECONDS

    def _forget_abandoned_reply_queues(self) -> None:
        """Delete what was left in some that nobody keeps any more: nobody else does."""
        if not self._reply_queues:
            return
        for document in self._replies.abandoned():
            empty(self._client, self._generations, str(document.get("queue")), leased=True)
            self._replies.remove(document)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"The consumer {self._name!r} was closed.")
