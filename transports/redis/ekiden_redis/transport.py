"""The transport: publishes to Redis, looks at its queues, opens consumers and listeners, and carries its topics."""

from __future__ import annotations

from collections.abc import Sequence

from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportClosed
from ekiden.message import Condition, Depth, Message, Published, Seen
from ekiden.transport import Consumer, Listener, Transport, TransportDescription
from ekiden.urls import BrokerURL

from ekiden_redis import scripts
from ekiden_redis.client import Client
from ekiden_redis.consumer import LOOK_AGAIN_SECONDS, RedisConsumer
from ekiden_redis.full import may_go_beyond
from ekiden_redis.keys import QueueKeys, events_key, queue_keys
from ekiden_redis.listener import EVENTS_KEPT, EVENTS_KEPT_MS, RedisListener
from ekiden_redis.options import RedisOptions
from ekiden_redis.packing import Unreadable, unpacked
from ekiden_redis.publishing import publish
from ekiden_redis.warnings import warnings_about

_CONDITIONS = {1: Condition.READY, 2: Condition.DELAYED, 3: Condition.LEASED}


def _shown(message_id: bytes, queue: str, value: bytes) -> Message:
    """A stored message; what cannot be read is shown as the dead letter's body will be."""
    try:
        return unpacked(message_id, queue, value)
    except Unreadable:
        return Message(message_id.decode("utf-8", "backslashreplace"), queue, value)


class RedisTransport(Transport):
    """Redis or Valkey as a broker: one server, whichever is the master by the Sentinels' word, or a cluster."""

    description = TransportDescription(
        summary="Redis or Valkey, for processes of any machine; also with Sentinel, and as a cluster",
        durability="the server's persistence: with appendfsync always each message, with everysec (its default for an "
        "append-only file) all but the last second or two, without an append-only file less; a failover may lose what "
        "was not yet replicated",
        hand_over="follow-ups are stored and the delivery is settled in one script; in a cluster, those for queues on "
        "other servers are stored first",
        wake_up="a doorbell per queue, on which consumers block",
        shortest_lease=0.1,
        dead_consumer_noticed_within=LOOK_AGAIN_SECONDS,
        wakes_within=LOOK_AGAIN_SECONDS,
        url_example="redis://localhost:6379/0",
        options=RedisOptions,
    )

    def __init__(self, url: BrokerURL) -> None:
        self._url = str(url)
        self._client = Client(url, unavailable=BrokerUnavailable, refused=BrokerRefused)
        self._open: set[RedisConsumer | RedisListener] = set()
        self._closed = False

    def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
        self._check_open()
        return publish(self._client, messages, deadline=deadline)

    def consumer(
        self, queues: Sequence[str], *, lease: float, prefetch: int, name: str, strict: bool = False
    ) -> Consumer:
        self._check_open()
        consumer = RedisConsumer(
            self._client,
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
        keys = self._keys(queue)
        seen: list[Seen] = []
        while len(seen) < limit:
            kind, score, message_id = after.split(" ", 2) if after else ("1", "", "")
            page = self._client.run(
                scripts.BROWSE,
                (keys.messages, keys.held, keys.ready, keys.delayed, keys.leased),
                (
                    str(min(limit - len(seen), scripts.AT_ONCE)),
                    kind,
                    score,
                    message_id.encode("utf-8", "surrogateescape"),
                ),
            )
            if not page:
                break
            for kind, score, message_id, value, attempt, is_due in page:
                after = f"{kind} {score.decode()} {message_id.decode('utf-8', 'surrogateescape')}"
                if value is not None:
                    condition = Condition.READY if is_due else _CONDITIONS[kind]
                    seen.append(Seen(_shown(message_id, queue, value), condition, attempt, after))
        return seen

    def depth(self, queue: str) -> Depth:
        self._check_open()
        keys = self._keys(queue)
        return Depth(*self._client.run(scripts.DEPTH, (keys.ready, keys.delayed, keys.leased)))

    def purge(self, queue: str) -> int:
        self._check_open()
        keys = self._keys(queue)
        purged = 0
        while True:  # others get their turn between the slices
            deleted: int = self._client.run(
                scripts.PURGE, (keys.messages, keys.held, keys.ready, keys.delayed, keys.leased)
            )
            purged += deleted
            if deleted < scripts.AT_ONCE:
                return purged

    def broadcast(self, topic: str, payloads: Sequence[bytes]) -> None:
        self._check_open()
        key = events_key(self._client.options.prefix, topic)
        for start in range(0, len(payloads), scripts.AT_ONCE):
            some = payloads[start : start + scripts.AT_ONCE]
            try:
                self._client.run(scripts.BROADCAST, (key,), (EVENTS_KEPT, EVENTS_KEPT_MS, "", *some))
            except BrokerUnavailable as error:
                # Workers are told what to do by small ones, also those of a full broker.
                if not self._client.errors.is_full(error) or not may_go_beyond(sum(map(len, some)), None):
                    raise
                self._client.run(scripts.BROADCAST, (key,), (EVENTS_KEPT, EVENTS_KEPT_MS, "1", *some))

    def listen(self, topic: str) -> Listener:
        self._check_open()
        key = events_key(self._client.options.prefix, topic)
        listener = RedisListener(self._client, topic, key, left=self._open.discard)
        self._open.add(listener)
        return listener

    def warnings(self, queues: Sequence[str]) -> list[str]:
        self._check_open()
        return warnings_about(self._client, "messages")

    def close(self) -> None:
        self._closed = True
        for one in list(self._open):
            one.close()
        self._client.close()

    def forget(self) -> None:
        for one in self._open:
            one.abandon()
        self._open = set()
        self._client.forget()

    def _keys(self, queue: str) -> QueueKeys:
        return queue_keys(self._client.options.prefix, queue)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"{self._url} was closed here; open it again.")
