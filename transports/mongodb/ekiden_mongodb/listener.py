"""Hears what is broadcast on a topic.

    <prefix>.events     a feed: {topic: its name, payloads: [some bytes, ...]}

A listener follows its topic in a thread from when it is made until it is closed. The feed keeps the latest events, so
one that was cut off for a while misses nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from ekiden.errors import EkidenError, TransportClosed
from ekiden.locks import Flag
from ekiden.transport import Listener

from ekiden_mongodb.client import Client
from ekiden_mongodb.contexts import in_own_context
from ekiden_mongodb.feeds import Document, Feed, Position
from ekiden_mongodb.watching import Watch

KEPT_BYTES = 32 * 1024 * 1024
"""So much of what was broadcast is kept, at most, for listeners that were cut off."""

_EVENT_BYTES = 1024 * 1024
"""Payloads that are smaller together travel as one event."""


class MongoDBListener(Listener):
    """One topic. ``_lock`` guards what was heard and not received yet; ``_called`` is set when there is something."""

    def __init__(self, client: Client, topic: str, *, left: Callable[[MongoDBListener], None]) -> None:
        self._client = client
        self._topic = topic
        self._left = left
        self._lock = threading.Lock()
        self._called = Flag()
        self._heard: deque[bytes] = deque()
        self._closed = False
        feed = events(client)
        with client.asking():
            feed.make()
            position = Position(feed, {"topic": topic})
            position.unseen()  # it need not hear what was there before
        self._watch = Watch(
            feed,
            thread_name="ekiden-mongodb-events",
            told=self._hear,
            stopped=self._called.set,
            position=position,
            longest_poll=1.5,
        )
        self._watch.want(position.matching)

    @in_own_context
    def receive(self, timeout: float) -> list[bytes]:
        give_up = time.monotonic() + timeout
        self._check_open()
        while True:
            self._called.clear()
            with self._lock:
                heard = list(self._heard)
                self._heard.clear()
            trouble = self._trouble()
            left = give_up - time.monotonic()
            if heard or self._closed or trouble is not None or left <= 0:
                break
            self._called.wait(left)
        if trouble is not None and not heard and not self._closed:
            raise trouble
        return heard

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"The listener to topic {self._topic!r} was closed.")

    @in_own_context
    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._called.set()
        self._watch.close()
        self._left(self)

    def abandon(self) -> None:
        """In a forked child: the thread is the parent's, and so is what it hears."""
        self._lock = threading.Lock()
        self._closed = True
        self._watch.abandon()

    def _hear(self, events: Sequence[Document]) -> None:
        with self._lock:
            for event in events:
                payloads = event.get("payloads")
                if isinstance(payloads, list):
                    self._heard.extend(bytes(payload) for payload in payloads if isinstance(payload, bytes))
        self._called.set()

    def _trouble(self) -> EkidenError | None:
        """Why it could not be heard for as long as a call may take. Before, it may still be a short interruption."""
        return self._watch.trouble(self._client.options.timeout)


def events(client: Client) -> Feed:
    """Where everything is that is broadcast."""
    return Feed(client, "events", max_bytes=KEPT_BYTES)


def broadcast(client: Client, topic: str, payloads: Sequence[bytes]) -> None:
    """Send ``payloads``, in order, to everyone who listens to ``topic``. Raises what the client raises."""
    if payloads:
        events(client).append([{"topic": topic, "payloads": some} for some in _by_size(payloads)])


def _by_size(payloads: Sequence[bytes]) -> Iterator[list[bytes]]:
    """In parts of which each, unless it is a single payload, is small."""
    some: list[bytes] = []
    size = 0
    for payload in payloads:
        if some and size + len(payload) > _EVENT_BYTES:
            yield some
            some, size = [], 0
        some.append(payload)
        size += len(payload)
    yield some
