"""The transport: publishes to CouchDB, looks at its queues, opens consumers and listeners, and carries its topics."""

from __future__ import annotations

from collections.abc import Sequence

from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportClosed
from ekiden.message import Depth, Message, Published, Seen
from ekiden.transport import Consumer, Listener, Transport, TransportDescription
from ekiden.urls import BrokerURL

from ekiden_couchdb import browsing
from ekiden_couchdb.claiming import LOOK_AGAIN_SECONDS
from ekiden_couchdb.client import Client
from ekiden_couchdb.clock import RENEWED_SECONDS, TICK_SECONDS
from ekiden_couchdb.consumer import CouchDBConsumer, Shared
from ekiden_couchdb.coordinators import Coordinators
from ekiden_couchdb.events import broadcast
from ekiden_couchdb.generations import Generations
from ekiden_couchdb.listener import CouchDBListener
from ekiden_couchdb.options import CouchDBOptions
from ekiden_couchdb.publishing import Publisher
from ekiden_couchdb.replies import ReplyQueues
from ekiden_couchdb.set_aside import SetAside
from ekiden_couchdb.signals import Signals
from ekiden_couchdb.warnings import warnings_about

_CLOCK_SECONDS = TICK_SECONDS + RENEWED_SECONDS
"""So uncertain is the server's time: a lease may be given for so much longer, and be ended so much later."""


class CouchDBTransport(Transport):
    """CouchDB as a broker: one server, or the nodes of a cluster."""

    description = TransportDescription(
        summary="CouchDB, for processes of any machine: hundreds of messages a second, where CouchDB is what there is",
        durability="each message is written to disk before publish returns; in a cluster by a majority of its copies",
        hand_over="follow-ups are stored first, then the delivery is settled",
        wake_up="one feed of changes per process",
        shortest_lease=1.0,
        dead_consumer_noticed_within=LOOK_AGAIN_SECONDS + 2 * _CLOCK_SECONDS,
        wakes_within=LOOK_AGAIN_SECONDS,
        url_example="couchdb://user:password@localhost:5984/ekiden",
        options=CouchDBOptions,
    )

    def __init__(self, url: BrokerURL) -> None:
        self._url = str(url)
        self._client = Client(url, unavailable=BrokerUnavailable, refused=BrokerRefused)
        self._generations = Generations(self._client)
        self._signals = Signals(self._client)
        self._replies = ReplyQueues(self._client)
        self._set_aside = SetAside()
        self._coordinators = Coordinators(self._client, "signals")
        self._publisher = Publisher(self._client, self._generations, self._signals, self._replies, self._coordinators)
        self._open: set[CouchDBConsumer | CouchDBListener] = set()
        self._closed = False

    def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
        self._check_open()
        return self._publisher.publish(messages, deadline=deadline)

    def consumer(
        self, queues: Sequence[str], *, lease: float, prefetch: int, name: str, strict: bool = False
    ) -> Consumer:
        self._check_open()
        consumer = CouchDBConsumer(
            Shared(
                self._client,
                self._generations,
                self._signals,
                self._publisher,
                self._replies,
                self._set_aside,
                self._coordinators,
            ),
            queues,
            left=self._open.discard,
            lease=lease,
            prefetch=prefetch,
            name=name,
            strict=strict,
        )
        self._open.add(consumer)
        return consumer

    def browse(self, queue: str, *, after: str | None = None, limit: int = 100) -> list[Seen]:
        self._check_open()
        return browsing.browse(self._client, self._generations, queue, after_cursor=after, limit=limit)

    def depth(self, queue: str) -> Depth:
        self._check_open()
        return browsing.depth(self._client, self._generations, self._set_aside, queue)

    def purge(self, queue: str) -> int:
        self._check_open()
        return browsing.empty(self._client, self._generations, queue)

    def broadcast(self, topic: str, payloads: Sequence[bytes]) -> None:
        self._check_open()
        broadcast(self._client, topic, payloads)

    def listen(self, topic: str) -> Listener:
        self._check_open()
        listener = CouchDBListener(self._client, topic, left=self._open.discard)
        self._open.add(listener)
        return listener

    def warnings(self, queues: Sequence[str]) -> list[str]:
        self._check_open()
        return warnings_about(self._client, "messages", self._coordinators) + self._generations.warnings()

    def close(self) -> None:
        self._closed = True
        for one in list(self._open):
            one.close()
        self._generations.close()
        self._signals.close()
        self._client.close()

    def forget(self) -> None:
        for one in self._open:
            one.abandon()
        self._open = set()
        self._client.forget()
        self._set_aside = SetAside()
        self._coordinators.forget()
        self._generations.forget()
        self._signals.forget()
        self._replies.forget()
        self._publisher.forget()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"{self._url} was closed here; open it again.")
