"""Queues and topics without tasks: put, get, ack; publish, subscribe.

    with ekiden.connect("sqlite:///messages.db") as connection:
        orders = connection.queue("orders")
        orders.put({"number": 1})
        for item in orders.iterate(timeout=1):
            with item:                              # acked at the end of the block, released when it raises
                print(item.value)

A value is carried as JSON; bytes are carried as they are. What was got stays yours, however long you hold it, until
you ack or release it or close the connection: a thread of the connection renews the leases. It starts with the first
``get`` and ends with ``close``, or with the main thread for a connection that nobody closes.

A connection may be used by any thread. Its Publisher keeps those apart who put. Each queue's ``_receiving`` is the line
of those who get, the first of whom receives; its ``_ending`` keeps those apart who ack, release and renew, and guards
what is held. After a fork the child's connection works as one that was just opened, and what the parent got is the
parent's.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

import msgspec

from ekiden.codec import encode_value
from ekiden.errors import (
    ConfigurationError,
    MessageError,
    MisuseError,
    TaskArgumentsError,
    TransportClosed,
    TransportCrashed,
)
from ekiden.locks import Flag, start_thread
from ekiden.loggers import safe_logger
from ekiden.message import (
    DEFAULT_PRIORITY,
    RESERVED_HEADER_PREFIX,
    Delivery,
    Depth,
    Ending,
    HeaderValue,
    Message,
    PublishOutcome,
    SettleOutcome,
    new_id,
    unsendable,
)
from ekiden.options import Publishing
from ekiden.plugins import open_transport
from ekiden.publisher import Publisher
from ekiden.times import LONGEST_SECONDS, check_seconds, checked_timeout
from ekiden.transport import Consumer, Listener, Transport

logger = safe_logger("ekiden.messaging")

CONTENT_TYPE = "content-type"
JSON = "application/json"
BYTES = "application/octet-stream"

DEFAULT_LEASE = 60.0
MOST_HELD = 1000
"""How many items one queue object hands out before some of them are acked or released."""

_PUBLISHED_AT_ONCE = 500
_HOW = Publishing(timeout=60.0, retry=None)
"""A put ends within the transport's own time limit; this is for the line of those who put at the same time."""

_LONGEST_WAIT = 10.0
_LOOK_AGAIN = 0.2
_MAIN_THREAD_LOOKED_AT_EVERY = 1.0

# The first byte of a payload on a topic, which has no headers: what the others are.
_JSON_FOLLOWS, _BYTES_FOLLOW = b"\x01", b"\x02"


def connect(url: str, *, lease: float = DEFAULT_LEASE) -> Connection:
    """Open the broker at ``url``.

    ``lease``: how many seconds after this process died others may get what it held; while it lives, leases are
    renewed. Raises ConfigurationError for a URL or a lease that cannot work.
    """
    return Connection(url, lease=lease)


class Connection:
    """A broker's queues and topics. A context manager that closes itself."""

    def __init__(self, url: str, *, lease: float = DEFAULT_LEASE) -> None:
        check_seconds("lease", lease)
        self._transport = open_transport(url)
        self._lease = lease
        self._closed = False
        shortest = self._transport.description.shortest_lease
        if lease < shortest:
            self._transport.close()
            raise ConfigurationError(
                f"A lease of {lease:g} s is too short for this broker; it takes {shortest:g} or more."
            )
        self._start()

    def _start(self) -> None:
        self._process_id = os.getpid()
        self._publisher = Publisher(lambda: self._transport)
        self._opening = threading.Lock()
        self._over = Flag()
        self._queues: dict[str, Queue] = {}
        self._renewing: threading.Thread | None = None

    def queue(self, name: str) -> Queue:
        """The queue called ``name``; it need not exist. Always the same object for a name."""
        self._check_open()
        reason = unsendable(Message("id", name, b""))
        if reason is not None:
            raise ConfigurationError(f"{name!r} cannot be a queue: {reason}.")
        with self._opening:
            return self._queues.setdefault(name, Queue(self, name))

    def topic(self, name: str) -> Topic:
        """The topic called ``name``."""
        self._check_open()
        return Topic(self, name)

    def close(self) -> None:
        """Give back what is held, wake who waits, and close. May be called again."""
        self._closed = True
        self._over.set()
        self._transport.close()
        with self._opening:
            renewing = self._renewing
        if renewing is not None and renewing is not threading.current_thread():
            renewing.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def opened(self) -> Transport:
        """The transport below, for what this layer does not offer; its ``publish`` belongs to one thread at a time."""
        self._check_open()
        return self._transport

    def publish(self, messages: list[Message]) -> None:
        """Store ``messages``, or raise why the first of those that were not stored was not, and how many there are."""
        self._check_open()
        answers = self._publisher.publish(messages, _HOW)
        failed = [number for number, answer in enumerate(answers) if answer.outcome is PublishOutcome.FAILED]
        if not failed:
            return
        error = answers[failed[0]].error or MessageError("The broker did not say why it refused a message.")
        if len(messages) > 1:
            error.add_note(
                f"{len(failed)} of {len(messages)} messages were not stored; the first is number {failed[0]}."
            )
        raise error

    def consume(self, name: str) -> Consumer:
        """A consumer of one queue, whose leases this connection renews from now on."""
        consumer = self.opened().consumer([name], lease=self._lease, prefetch=MOST_HELD, name=f"messaging-{new_id()}")
        with self._opening:
            if self._renewing is None or not self._renewing.is_alive():
                renewing = threading.Thread(target=self._renew, name="ekiden-messaging-renew")
                start_thread(renewing)
                self._renewing = renewing
        return consumer

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed("This connection was closed; call ekiden.connect() again.")
        if self._process_id != os.getpid():
            queues = self._queues
            self._transport.forget()
            self._start()
            for queue in queues.values():
                queue.forget()
            self._queues = queues

    def _renew(self) -> None:
        renewed = time.monotonic()
        while threading.main_thread().is_alive():
            if self._over.wait(min(self._lease / 3, _MAIN_THREAD_LOOKED_AT_EVERY)):
                return
            if time.monotonic() - renewed >= self._lease / 3:
                renewed = time.monotonic()
                for queue in list(self._queues.values()):
                    try:
                        queue.renew()
                    except Exception:  # one queue's trouble is not that of the others, nor the end of renewing
                        logger.exception("queue %s: leases could not be renewed; tried again", queue.name)


class Queue:
    """One queue: values go in, items come out. Made by ``Connection.queue``."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.name = name
        self._connection = connection
        self.forget()

    def forget(self) -> None:
        """Begin anew: what was held is another process's."""
        self._receiving: dict[SimpleQueue[None], None] = {}
        self._ending = threading.Lock()
        self._consumer: Consumer | None = None
        self._held: dict[str, Received] = {}

    def put(
        self,
        value: object,
        *,
        priority: int = DEFAULT_PRIORITY,
        delay: float = 0.0,
        headers: Mapping[str, HeaderValue] | None = None,
    ) -> str:
        """Store ``value`` and return its id. It can be got after ``delay`` seconds; priority 9 comes before 0.

        Raises TaskArgumentsError (a TypeError) for a value that JSON cannot carry, BrokerUnavailable, BrokerRefused.
        """
        message = self._message(value, priority, delay, headers)
        self._connection.publish([message])
        return message.id

    def put_many(
        self,
        values: Iterable[object],
        *,
        priority: int = DEFAULT_PRIORITY,
        delay: float = 0.0,
        headers: Mapping[str, HeaderValue] | None = None,
    ) -> list[str]:
        """Store many values in few round trips and return their ids. Raises as ``put`` does; some are stored then."""
        remaining = iter(values)
        stored: list[str] = []
        while messages := [
            self._message(value, priority, delay, headers) for value in islice(remaining, _PUBLISHED_AT_ONCE)
        ]:
            self._connection.publish(messages)
            stored += [message.id for message in messages]
        return stored

    def get(self, timeout: float | None = None) -> Received | None:
        """The next item, or None when none came within ``timeout`` seconds. Without ``timeout`` it waits for one.

        Raises MisuseError when too many items are held already, and TransportClosed when the connection is closed.
        """
        give_up = _end_of(timeout)
        self._connection.opened()
        line, called = self._receiving, SimpleQueue[None]()
        try:
            line[called] = None
            while True:
                wait = _LONGEST_WAIT if give_up is None else min(_LONGEST_WAIT, max(0.0, give_up - time.monotonic()))
                if list(line)[:1] != [called]:
                    with suppress(Empty):
                        called.get(timeout=min(wait, _LOOK_AGAIN))
                else:
                    self._check_room()
                    deliveries = self._receive(wait)
                    if deliveries:
                        return self._hand_out(deliveries[0])
                self._connection.opened()
                if give_up is not None and time.monotonic() >= give_up:
                    return None
        finally:
            line.pop(called, None)  # the first call: an interruption comes before the try, or after this
            for first in list(line)[:1]:
                first.put(None)

    def iterate(self, *, timeout: float | None = None) -> Iterator[Received]:
        """Items as they come, until none came for ``timeout`` seconds or the connection was closed."""
        while True:
            try:
                item = self.get(timeout)
            except TransportClosed:
                return
            if item is None:
                return
            yield item

    def __iter__(self) -> Iterator[Received]:
        """Items as they come, until the connection is closed."""
        return self.iterate()

    def depth(self) -> Depth:
        """How many messages are ready, delayed and leased; None for what the broker cannot count."""
        return self._connection.opened().depth(self.name)

    def purge(self) -> int:
        """Delete what nobody holds, and return how many messages that were."""
        return self._connection.opened().purge(self.name)

    def consumer(self) -> Consumer:
        """This process's consumer of the queue, opened with the first call."""
        if self._consumer is None:
            self._consumer = self._connection.consume(self.name)
        return self._consumer

    def _receive(self, wait: float) -> list[Delivery]:
        consumer = self.consumer()
        try:
            return consumer.receive(1, wait)
        except TransportCrashed:
            with self._ending:
                self._drop_consumer(consumer)
            raise

    def _drop_consumer(self, crashed: Consumer) -> None:
        """It is of no use any more, and what it held is lost: the next ``get`` opens another one.

        The caller holds ``_ending``.
        """
        if self._consumer is not crashed:
            return
        self._consumer = None
        for item in self._held.values():
            self._warn_of_lost(item)
        self._held.clear()
        crashed.close()

    def end(self, item: Received) -> bool:
        """Settle an item's delivery; False when it is not this connection's any more."""
        self._connection.opened()
        with self._ending:
            consumer = self._holder_of(item)
            if consumer is None:
                return False
            (answer,) = consumer.settle([Ending(item.delivery)])
            if answer.outcome is SettleOutcome.FAILED:
                if isinstance(answer.error, TransportCrashed):
                    self._drop_consumer(consumer)
                raise answer.error or MessageError("The broker did not say why it did not settle a message.")
            del self._held[item.id]
            if answer.outcome is SettleOutcome.LOST:
                self._warn_of_lost(item)
            return answer.outcome is SettleOutcome.SETTLED

    def give_back(self, item: Received, delay: float) -> None:
        """Release an item's delivery; nothing happens when it is not this connection's any more."""
        try:
            self._connection.opened()
        except TransportClosed:
            return  # closing has given it back
        with self._ending:
            consumer = self._holder_of(item)
            if consumer is None:
                return
            try:
                consumer.release([item.delivery], delay)
            except TransportCrashed:
                self._drop_consumer(consumer)
                raise
            del self._held[item.id]

    def renew(self) -> None:
        """Extend the leases of all that is held. Called by the connection's thread."""
        with self._ending:
            if not self._held or self._consumer is None:
                return
            items = list(self._held.values())
            try:
                answers = self._consumer.extend([item.delivery for item in items])
            except TransportClosed:
                return
            failed = [answer.error for answer in answers if answer.outcome is SettleOutcome.FAILED]
            if any(isinstance(error, TransportCrashed) for error in failed):
                self._drop_consumer(self._consumer)
                return
            for item, answer in zip(items, answers, strict=True):
                if answer.outcome is SettleOutcome.LOST:
                    self._warn_of_lost(item)
                    del self._held[item.id]
            if failed:
                logger.warning(
                    "queue %s: the leases of %d items were not renewed; tried again: %s",
                    self.name,
                    len(failed),
                    failed[0],
                )

    def _check_room(self) -> None:
        if len(self._held) >= MOST_HELD:
            raise MisuseError(
                f"{MOST_HELD} items of queue {self.name!r} were got and neither acked nor released. Use 'with item:', "
                "or call item.ack() when you are done with one."
            )

    def _hand_out(self, delivery: Delivery) -> Received:
        item = Received(self, delivery)
        with self._ending:
            self._held[item.id] = item
        return item

    def _holder_of(self, item: Received) -> Consumer | None:
        return self._consumer if self._held.get(item.id) is item else None

    def _warn_of_lost(self, item: Received) -> None:
        logger.warning("%s: this item of queue %s may be got again by others: its lease ended", item.id, self.name)

    def _message(
        self, value: object, priority: int, delay: float, headers: Mapping[str, HeaderValue] | None
    ) -> Message:
        check_seconds("delay", delay, least=-LONGEST_SECONDS)
        body, content_type = _encode(value)
        all_headers = {CONTENT_TYPE: content_type, **(headers or {})}
        for name in headers or ():
            if name.startswith(RESERVED_HEADER_PREFIX):
                raise TaskArgumentsError(f"Headers that begin with {RESERVED_HEADER_PREFIX!r} are ekiden's: {name!r}.")
            if name == CONTENT_TYPE and content_type == JSON:
                raise TaskArgumentsError(f"Only bytes can have a {CONTENT_TYPE!r} of their own; this value is JSON.")
        due = float(time.time() + delay) if delay > 0 else None
        return Message(new_id(), self.name, body, all_headers, priority, due)


class Received:
    """One item out of a queue, held until it is acked or released.

    As a context manager it acks itself at the end of the block, and releases itself when the block raises.
    ``attempt`` counts how often it was handed out and not released: 1, 2, ...
    """

    __slots__ = ("_queue", "delivery")

    def __init__(self, queue: Queue, delivery: Delivery) -> None:
        self._queue = queue
        self.delivery = delivery

    def __repr__(self) -> str:
        return f"<Received {self.id} from {self.delivery.message.queue!r}, attempt {self.attempt}>"

    @property
    def id(self) -> str:
        """What ``put`` returned."""
        return self.delivery.message.id

    @property
    def attempt(self) -> int:
        """Which hand-out this is."""
        return self.delivery.attempt

    @property
    def headers(self) -> Mapping[str, HeaderValue]:
        """What ``put`` was given, and the content type."""
        return self.delivery.message.headers

    @property
    def body(self) -> bytes:
        """The bytes that were carried."""
        return self.delivery.message.body

    @property
    def value(self) -> Any:
        """What was put, decoded anew each time. Raises MessageError when it says that it is JSON and is not."""
        message = self.delivery.message
        if message.headers.get(CONTENT_TYPE) != JSON:
            return message.body
        return _decode(message.body, f"message {message.id} of queue {message.queue!r}")

    def ack(self) -> bool:
        """It is done: delete it. False when that is not for this connection to say any more: others may have got it.

        Raises BrokerUnavailable; it is still held then.
        """
        return self._queue.end(self)

    def release(self, *, delay: float = 0.0) -> None:
        """Give it back, to be got again after ``delay`` seconds. Nothing happens when it is not held any more.

        Raises ConfigurationError for a delay that is no number of seconds.
        """
        check_seconds("delay", delay, least=-LONGEST_SECONDS)
        self._queue.give_back(self, delay)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.release()
        else:
            self.ack()


class Topic:
    """One topic: everybody who has subscribed hears what is published. Made by ``Connection.topic``."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.name = name
        self._connection = connection

    def publish(self, value: object) -> None:
        """Send ``value`` to everybody who is subscribed now."""
        body, content_type = _encode(value)
        mark = _JSON_FOLLOWS if content_type == JSON else _BYTES_FOLLOW
        self._connection.opened().broadcast(self.name, [mark + body])

    def subscribe(self) -> Subscription:
        """Hear what is published from now on."""
        return Subscription(self._connection.opened().listen(self.name), self.name)


class Broadcast(msgspec.Struct, frozen=True):
    """One value that was heard on a topic."""

    value: Any


class Subscription:
    """Hears one topic until it is closed. A context manager, and an iterator that ends when it is closed."""

    def __init__(self, listener: Listener, topic: str) -> None:
        self._listener = listener
        self._topic = topic
        self._heard: list[bytes] = []

    def receive(self, timeout: float | None = None) -> Broadcast | None:
        """The next broadcast, or None when none came within ``timeout`` seconds. Without ``timeout`` it waits for one.

        Raises TransportClosed when the subscription or its connection is closed. For one thread at a time.
        """
        give_up = _end_of(timeout)
        while not self._heard:
            wait = _LONGEST_WAIT if give_up is None else min(_LONGEST_WAIT, max(0.0, give_up - time.monotonic()))
            self._heard = self._listener.receive(wait)
            if not self._heard and give_up is not None and time.monotonic() >= give_up:
                return None
        return self._decoded(self._heard.pop(0))

    def __iter__(self) -> Iterator[Broadcast]:
        while True:
            try:
                broadcast = self.receive()
            except TransportClosed:
                return
            except MessageError as error:  # somebody else's: it must not end the loop
                logger.warning("%s It is passed over.", error)
                continue
            if broadcast is not None:
                yield broadcast

    def close(self) -> None:
        """Hear nothing more; wakes who waits. May be called again."""
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _decoded(self, payload: bytes) -> Broadcast:
        mark, content = payload[:1], payload[1:]
        if mark == _JSON_FOLLOWS:
            return Broadcast(_decode(content, f"a broadcast on topic {self._topic!r}"))
        if mark == _BYTES_FOLLOW:
            return Broadcast(content)
        raise MessageError(f"a broadcast on topic {self._topic!r} was not sent by ekiden.connect(...).topic(...).")


def _end_of(timeout: float | None) -> float | None:
    """When a wait ends that begins now, on the monotonic clock; None: never."""
    seconds = checked_timeout(timeout)
    return None if seconds is None else time.monotonic() + seconds


def _encode(value: object) -> tuple[bytes, str]:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value), BYTES
    try:
        return encode_value(value), JSON
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise TaskArgumentsError(
            f"A value of type {type(value).__name__} cannot be put: {error}. JSON values and bytes can."
        ) from error


def _decode(body: bytes, what: str) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"{what} cannot be read: {error}.") from error
