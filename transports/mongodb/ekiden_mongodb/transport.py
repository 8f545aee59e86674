"""The transport: publishes to MongoDB, looks at its queues, opens consumers and listeners, and carries its topics."""

from __future__ import annotations

from collections.abc import Sequence

from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportClosed
from ekiden.message import Depth, Message, Published, Seen
from ekiden.transport import Consumer, Listener, Transport, TransportDescription
from ekiden.urls import BrokerURL

from ekiden_mongodb import looking
from ekiden_mongodb.claiming import REAP_SECONDS
from ekiden_mongodb.client import Client
from ekiden_mongodb.consumer import LOOK_AGAIN_SECONDS, MongoDBConsumer
from ekiden_mongodb.contexts import in_own_context
from ekiden_mongodb.documents import Messages
from ekiden_mongodb.listener import MongoDBListener, broadcast
from ekiden_mongodb.options import MongoDBOptions
from ekiden_mongodb.publishing import Publisher
from ekiden_mongodb.signals import Signals
from ekiden_mongodb.warnings import warnings_about


class MongoDBTransport(Transport):
    """MongoDB as a broker: a replica set, a sharded cluster, or one server alone."""

    description = TransportDescription(
        summary="MongoDB, for processes of any machine: a replica set, a sharded cluster, or one server alone",
        durability="a majority of the members have each message in their journals before it is called stored; what a "
        "failover takes back of claims and endings is delivered again",
        hand_over="follow-ups are stored and the delivery is settled in one transaction; on a server without "
        "transactions (one alone) the follow-ups are stored first",
        wake_up="a change stream on a small collection, where the server has them; else a tailable cursor, else "
        "looking at it",
        shortest_lease=0.5,
        dead_consumer_noticed_within=max(REAP_SECONDS, LOOK_AGAIN_SECONDS),
        wakes_within=LOOK_AGAIN_SECONDS,
        url_example="mongodb://localhost:27017/ekiden",
        options=MongoDBOptions,
    )

    def __init__(self, url: BrokerURL) -> None:
        self._url = str(url)
        self._client = Client(url, unavailable=BrokerUnavailable, refused=BrokerRefused)
        self._messages = Messages(self._client)
        self._signals = Signals(self._client)
        self._publisher = Publisher(self._client, self._messages, self._signals)
        self._open: set[MongoDBConsumer | MongoDBListener] = set()
        self._closed = False

    @in_own_context
    def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
        self._check_open()
        return self._publisher.publish(messages, deadline=deadline)

    @in_own_context
    def consumer(
        self, queues: Sequence[str], *, lease: float, prefetch: int, name: str, strict: bool = False
    ) -> Consumer:
        self._check_open()
        consumer = MongoDBConsumer(
            self._client,
            self._messages,
            self._publisher,
            self._signals,
            queues,
            left=self._open.discard,
            lease=lease,
            prefetch=prefetch,
            name=name,
            strict=strict,
        )
        self._open.add(consumer)
        return consumer

    @in_own_context
    def browse(self, queue: str, *, after: str | None = None, limit: int = 100) -> list[Seen]:
        self._check_open()
        return looking.browse(self._client, self._messages, queue, after=after, limit=limit)

    @in_own_context
    def depth(self, queue: str) -> Depth:
        self._check_open()
        return looking.depth(self._client, self._messages, queue)

    @in_own_context
    def purge(self, queue: str) -> int:
        self._check_open()
        return looking.purge(self._client, self._messages, queue)

    @in_own_context
    def broadcast(self, topic: str, payloads: Sequence[bytes]) -> None:
        self._check_open()
        broadcast(self._client, topic, payloads)

    @in_own_context
    def listen(self, topic: str) -> Listener:
        self._check_open()
        listener = MongoDBListener(self._client, topic, left=self._open.discard)
        self._open.add(listener)
        return listener

    @in_own_context
    def warnings(self, queues: Sequence[str]) -> list[str]:
        self._check_open()
        return warnings_about(self._client, "messages")

    @in_own_context
    def close(self) -> None:
        self._closed = True
        for one in list(self._open):
            one.close()
        self._signals.close()
        self._client.close()

    def forget(self) -> None:
        for one in self._open:
            one.abandon()
        self._open = set()
        self._signals.forget()
        self._messages = Messages(self._client)
        self._client.forget()
        self._publisher = Publisher(self._client, self._messages, self._signals)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"{self._url} was closed here; open it again.")
