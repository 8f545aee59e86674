"""The consumer: claims messages with one script, waits at their bells, and ends them.

A delivery's tag is its token and its id; ``ekiden_redis.scripts`` says what that means. A claim that was not answered
may have been carried out: its messages are taken back, by its token, before the next claim. A message that cannot be
read goes to the dead letters at once, with what was stored for its body.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Any

import msgspec
from ekiden.errors import EkidenError, TransportClosed, TransportError
from ekiden.loggers import safe_logger
from ekiden.message import REPLY_PREFIX, Delivery, Ending, Message, Settled, SettleOutcome, unreadable
from ekiden.transport import Consumer

from ekiden_redis import scripts
from ekiden_redis.client import Call, Client
from ekiden_redis.connection import Reply
from ekiden_redis.doorbell import Doorbell
from ekiden_redis.keys import queue_keys
from ekiden_redis.packing import Unreadable, unpacked
from ekiden_redis.publishing import REPLY_QUEUE_KEPT_MS
from ekiden_redis.settling import Settler, sliced

logger = safe_logger(__name__)

LOOK_AGAIN_SECONDS = 2.0
"""How long a waiter trusts that it will be rung. Fifty of them that look more often keep a processor busy."""

_LATE_SHARE = 0.1
"""Of a wait that need not end at a certain time: it may take so much longer, if that is less work."""

_LONGEST_DELAY_SECONDS = scripts.LATEST_MS / 1000
"""Since 1970, so that what is given back for longer is never due."""

_PASS_ON_SECONDS = 1.0
"""How long a consumer that stops tries to pass its ring on."""


class RedisConsumer(Consumer):
    """Claims messages and ends them.

    ``_held`` is what it holds: queue -> tag -> when the lease ends on the monotonic clock. ``receive`` adds to it, the
    thread that settles removes; each does so in single steps. Everything else belongs to the thread that receives.
    """

    def __init__(
        self,
        client: Client,
        queues: Sequence[str],
        *,
        left: Callable[[RedisConsumer], None],
        lease: float,
        prefetch: int,
        name: str,
        strict: bool,
    ) -> None:
        self._client = client
        self._left = left
        self._keys = {queue: queue_keys(client.options.prefix, queue) for queue in queues}
        self._turns = deque(self._keys)
        self._reply_queues = [queue for queue in self._keys if queue.startswith(REPLY_PREFIX)]
        self._lease = lease
        self._lease_ms = b"%d" % round(lease * 1000)
        self._prefetch = prefetch
        self._name = name
        self._owner = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=scripts.NAME_BYTES).digest()
        self._strict = strict
        self._settler = Settler(client, lease, self._holds)
        self._held: dict[str, dict[bytes, float]] = {queue: {} for queue in self._keys}
        self._unanswered: bytes | None = None
        self._next_change = 0.0
        self._took_all = False
        self._waits_for_room = False
        self._may_have_been_rung = False
        self._receiving = threading.Lock()
        self._stopped = False
        self._closed = False
        self._give_back_all_of(self._owner, attempts_less=0)
        self._doorbell = Doorbell(client, [keys.bell for keys in self._keys.values()])

    def receive(self, limit: int, timeout: float) -> list[Delivery]:
        give_up = time.monotonic() + timeout
        with self._receiving:
            self._check_open()
            while not self._stopped:
                room = min(limit, self._room())
                left = give_up - time.monotonic()
                # What came after a claim that took all there was has rung: waiting is the quicker way to hear of it.
                took_all, self._took_all = self._took_all, False
                if room > 0 and not (took_all and left > 0) and (found := self._claim(room)):
                    self._took_all = len(found) < min(room, scripts.AT_ONCE) and self._unanswered is None
                    return found
                if left <= 0 or (not self._wait(left, has_room=room > 0) and time.monotonic() >= give_up):
                    return []
            self._pass_on()
            return []

    def settle(self, endings: Sequence[Ending]) -> list[Settled]:
        self._check_open()
        answers = self._settler.settle(endings)
        self._drop(
            ending.delivery
            for ending, answer in zip(endings, answers, strict=True)
            if answer.outcome is not SettleOutcome.FAILED
        )
        return answers

    def release(self, deliveries: Sequence[Delivery], delay: float = 0.0, *, keep_attempt: bool = False) -> None:
        self._check_open()
        by_queue: dict[str, list[bytes]] = {}
        for delivery in deliveries:
            by_queue.setdefault(delivery.message.queue, []).append(delivery.tag)
        self._give_back(by_queue, attempts_less=int(not keep_attempt), delay=delay)
        self._drop(deliveries)

    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        self._check_open()
        ends = time.monotonic() + self._lease
        answers = self._settler.extend(deliveries)
        for delivery, answer in zip(deliveries, answers, strict=True):
            held = self._held[delivery.message.queue]
            if answer.outcome is SettleOutcome.SETTLED and delivery.tag in held:
                held[delivery.tag] = ends
        self._drop(
            delivery
            for delivery, answer in zip(deliveries, answers, strict=True)
            if answer.outcome is SettleOutcome.LOST
        )
        return answers

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._doorbell.knock()

    def close(self) -> None:
        self.stop()
        with self._receiving:
            closed_before, self._closed = self._closed, True
            if closed_before:
                return
            self._pass_on()
            self._doorbell.close()
        self._left(self)
        with contextlib.suppress(TransportError):  # then the leases end by themselves
            self._give_back({queue: list(held) for queue, held in self._held.items()}, attempts_less=0)
            self._keep_reply_queues()

    def abandon(self) -> None:
        """In a forked child: what this holds is the parent's."""
        self._closed = self._stopped = True
        self._receiving = threading.Lock()
        self._doorbell.abandon()

    # Claiming.

    def _claim(self, room: int) -> list[Delivery]:
        """Up to ``room`` messages, of the queues in their turn."""
        if self._unanswered is not None:
            self._give_back_all_of(self._unanswered, attempts_less=1)
        token = self._unanswered = self._owner + os.urandom(scripts.TOKEN_BYTES - scripts.NAME_BYTES)
        room = min(room, scripts.AT_ONCE)
        self._next_change = math.inf
        found: list[Delivery] = []
        # In a cluster each queue may be on another server. All are visited although there may be no room left: where
        # something stays ready, the ring that called us is passed on.
        groups = [[queue] for queue in self._turns] if self._client.is_cluster else [list(self._turns)]
        for queues in groups:
            try:
                found += self._claim_from(queues, room - len(found), token)
            except TransportError:
                if not found:
                    raise
                break
        else:
            self._unanswered = None
        return found

    def _claim_from(self, queues: Sequence[str], room: int, token: bytes) -> list[Delivery]:
        """Up to ``room`` messages of ``queues``, which are on one server."""
        keys: list[bytes] = []
        for queue in queues:
            of = self._keys[queue]
            keys += (of.messages, of.held, of.ready, of.delayed, of.leased, of.bell)
        now = time.monotonic()
        calls = [Call(scripts.CLAIM, keys, (b"%d" % room, self._lease_ms, token)), *self._keep_calls(queues)]
        reply, *_ = self._client.run_all(calls)
        if isinstance(reply, EkidenError):
            raise reply
        if reply[0] != b"":
            self._next_change = min(self._next_change, time.monotonic() + reply[0] / 1000)
        deliveries: list[Delivery] = []
        for at in range(1, len(reply), 4):
            queue = queues[int(reply[at])]
            received, unreadables = self._received(queue, reply[at + 1 : at + 4], token)
            deliveries += received
            self._held[queue].update(dict.fromkeys([delivery.tag for delivery in received], now + self._lease))
            if unreadables:
                self._set_aside(unreadables)
            if not self._strict:
                # Who was served stands at the back.
                self._turns.remove(queue)
                self._turns.append(queue)
        return deliveries

    def _received(
        self, queue: str, claimed: Sequence[Sequence[Any]], token: bytes
    ) -> tuple[list[Delivery], list[Ending]]:
        """The deliveries among what CLAIM answered for a queue, and how those end that cannot be read."""
        deliveries: list[Delivery] = []
        unreadables: list[Ending] = []
        for message_id, value, attempt in zip(*claimed, strict=True):
            if value is None:
                logger.warning(
                    "%s: message %r is gone: nobody but ekiden may delete keys, and the server must not evict any",
                    queue,
                    message_id,
                )
                continue
            try:
                deliveries.append(Delivery(unpacked(message_id, queue, value), token + message_id, attempt))
            except Unreadable as error:
                logger.error("%s: message %r goes to the dead letters: %s", queue, message_id, error)
                name = message_id.decode("utf-8", "backslashreplace")
                dead = unreadable(queue, name, value, str(error), attempt=attempt)
                delivery = Delivery(Message(name, queue, value), token + message_id, attempt)
                unreadables.append(Ending(delivery, () if dead is None else (dead,)))
        return deliveries, unreadables

    def _set_aside(self, unreadables: Sequence[Ending]) -> None:
        """Send to the dead letters what cannot be read. Where that fails it comes again when its lease ends."""
        for ending, answer in zip(
            unreadables, Settler(self._client, self._lease, self._holds).settle(unreadables), strict=True
        ):
            if answer.outcome is SettleOutcome.FAILED:
                message = ending.delivery.message
                logger.error("%s: message %r cannot be set aside now: %s", message.queue, message.id, answer.error)

    def _holds(self, delivery: Delivery) -> bool:
        return self._held[delivery.message.queue].get(delivery.tag, 0.0) > time.monotonic()

    def _room(self) -> int:
        room = self._prefetch - sum(map(len, self._held.values()))
        if room <= 0:
            now = time.monotonic()
            for held in self._held.values():
                for tag, ends in held.copy().items():
                    if ends <= now:
                        held.pop(tag, None)
            room = self._prefetch - sum(map(len, self._held.values()))
        return room

    # Waiting.

    def _wait(self, seconds: float, *, has_room: bool) -> bool:
        """Wait for a ring, or for room, or until something becomes ready by the clock, or for ``seconds``.

        Returns early now and then, to look whether a ring was lost. Returns False when there is no news.
        """
        if has_room:
            self._may_have_been_rung = True
            by_the_clock = self._next_change - time.monotonic()
            seconds = min(seconds, LOOK_AGAIN_SECONDS * random.uniform(0.8, 1.0))  # not all waiters at once
            if by_the_clock < seconds:
                self._doorbell.wait(by_the_clock)
                return True
            return self._doorbell.wait(seconds, at_most_late=_LATE_SHARE * seconds)
        self._waits_for_room = True
        if self._room() <= 0:
            now = time.monotonic()
            lease_end = min((ends for held in self._held.values() for ends in list(held.values())), default=now)
            if self._doorbell.pause(max(0.0, min(seconds, lease_end - now))):
                self._ring_for_others()
        self._waits_for_room = False
        return True

    def _pass_on(self) -> None:
        """This consumer claims no more: a ring that it has heard, or was about to hear, is for another."""
        if not self._may_have_been_rung:
            return
        self._may_have_been_rung = False
        self._doorbell.hang_up()
        self._ring_for_others()

    def _ring_for_others(self) -> None:
        """Ring where something is ready. Where this fails, the others look by themselves soon."""
        rings = [Call(scripts.RING, (keys.ready, keys.bell), ()) for keys in self._keys.values()]
        self._client.run_all(rings, within=_PASS_ON_SECONDS)

    # Giving back.

    def _give_back_all_of(self, owner: bytes, *, attempts_less: int) -> None:
        """Give back what is held by tokens that begin with ``owner``, and keep the reply queues."""
        at: dict[str, bytes] = dict.fromkeys(self._keys, b"0")
        while at:
            calls = [
                Call(
                    scripts.RECLAIM,
                    (keys.held, keys.ready, keys.leased, keys.bell),
                    (owner, str(attempts_less), cursor),
                )
                for keys, cursor in ((self._keys[queue], cursor) for queue, cursor in at.items())
            ]
            cursors = _without_errors(self._client.run_all(calls))
            at = {queue: cursor for queue, cursor in zip(at, cursors, strict=True) if cursor != b"0"}
        self._unanswered = None
        self._keep_reply_queues()

    def _give_back(self, by_queue: dict[str, list[bytes]], *, attempts_less: int, delay: float = 0.0) -> None:
        delay_ms = math.ceil(min(max(0.0, delay), _LONGEST_DELAY_SECONDS) * 1000)
        calls: list[Call] = []
        for queue, tags in by_queue.items():
            of = self._keys[queue]
            keys = (of.held, of.ready, of.delayed, of.leased, of.bell)
            for some in sliced(tags):
                calls.append(Call(scripts.GIVE_BACK, keys, (str(attempts_less), str(delay_ms), *some)))
        _without_errors(self._client.run_all(calls))

    def _keep_reply_queues(self) -> None:
        _without_errors(self._client.run_all(self._keep_calls(self._reply_queues)))

    def _keep_calls(self, queues: Iterable[str]) -> list[Call]:
        """What keeps those of ``queues`` alive that vanish with their consumer."""
        if not self._reply_queues:
            return []
        prefix = self._client.options.prefix
        return [
            Call(scripts.KEEP, msgspec.structs.astuple(queue_keys(prefix, queue)), (REPLY_QUEUE_KEPT_MS,))
            for queue in queues
            if queue in self._reply_queues
        ]

    def _drop(self, deliveries: Iterable[Delivery]) -> None:
        """These are not held any more."""
        for delivery in deliveries:
            self._held[delivery.message.queue].pop(delivery.tag, None)
        if self._waits_for_room:
            self._doorbell.knock()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"The consumer {self._name!r} was closed.")


def _without_errors(replies: Sequence[Reply | EkidenError]) -> Sequence[Reply]:
    """``replies``, or the first error among them is raised."""
    for reply in replies:
        if isinstance(reply, EkidenError):
            raise reply
    return replies
