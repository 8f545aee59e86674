"""The names, arguments and bindings of what ekiden makes at a RabbitMQ server. Values only: nothing here does I/O.

    shop                     queue      the messages of queue shop with the default priority (4)
    shop.priority.9          queue      those with priority 9: a band, made when the first such message is published
    reply.7c41               queue      a temporary queue: gone 60 s after its last consumer
    ekiden.topics            direct     broadcasts, by topic; each listener has an exclusive queue of its own
    ekiden.announcements     fanout     what the transports of this prefix tell each other
    ekiden.consumer.7c41     queue      shows for a minute that a consumer was opened: see ``announcements``
    ekiden.delay.07-12.8s    topic, queue    the levels of delay, shared by the virtual host: see ``delays``
    ekiden.delivery          topic      from the last level to the queue that a delayed message is for
    ekiden.stranded          fanout, queue   delayed messages whose queue has been deleted meanwhile

The prefix of the URL stands before all of these but the last four.

**How to make a queue or exchange** (``DeclareQueue``, ``DeclareExchange``): on a channel that serves for nothing else,
declare it passively. It exists: adopt it as it is, whatever its arguments. 404 (the channel is closed): declare it on
a new channel. 406 then: somebody else has made it otherwise in between; adopt it. ``after_looking`` and
``after_making`` decide this. Binding (``BindQueue``, ``BindExchange``) is repeated freely: a binding that is there
stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from hashlib import blake2b

import msgspec
from ekiden.message import DEFAULT_PRIORITY, REPLY_PREFIX

from ekiden_rabbitmq.options import RabbitMQOptions
from ekiden_rabbitmq.versions import Differences

LONGEST_NAME_BYTES = 255
"""AMQP carries the names of queues and exchanges, and routing keys, in short strings."""

LONGEST_NAME_BYTES_BEYOND_ASCII = 128
"""Servers from 4.0 on close the connection (541) when what they say of a queue has 255 characters but more bytes."""

REPLY_QUEUE_EXPIRES_SECONDS = 60.0
MARK_EXPIRES_SECONDS = 60.0
LISTENER_HOLDS = 10_000
"""Broadcasts that a listener may be behind; the oldest are dropped."""

ACCESS_REFUSED, NOT_FOUND, RESOURCE_LOCKED, PRECONDITION_FAILED = 403, 404, 405, 406

Argument = str | int
Arguments = Mapping[str, Argument]

_BAND = re.compile(r"\.priority\.[0-9]\Z")
_DIGEST_BYTES = 16


class DeclareQueue(msgspec.Struct, frozen=True):
    """A queue, and how it is made where it does not exist. ``arguments`` go into ``basic.declare`` as they are."""

    name: str
    arguments: Arguments = {}
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False


class DeclareExchange(msgspec.Struct, frozen=True):
    """A durable exchange, and how it is made where it does not exist."""

    name: str
    kind: str
    arguments: Arguments = {}


class BindQueue(msgspec.Struct, frozen=True):
    """Messages of ``exchange`` whose routing key matches go to ``queue``."""

    queue: str
    exchange: str
    routing_key: str = ""


class BindExchange(msgspec.Struct, frozen=True):
    """Messages of ``source`` whose routing key matches go on to the exchange ``destination``."""

    destination: str
    source: str
    routing_key: str


Step = DeclareQueue | DeclareExchange | BindQueue | BindExchange
"""One thing to be made at the server. Steps are carried out in their order."""


class Next(Enum):
    """What to do after a declaration closed its channel. ADOPT: it exists, use it. MAKE: declare it. FAIL: tell it."""

    ADOPT = "adopt"
    MAKE = "make"
    FAIL = "fail"


def after_looking(reply_code: int) -> Next:
    """What follows when a passive declaration closed the channel with ``reply_code``."""
    return Next.MAKE if reply_code == NOT_FOUND else Next.FAIL


def after_making(reply_code: int, reply_text: str) -> Next:
    """What follows when a declaration closed the channel.

    An inequivalent argument means that it exists, as somebody else has just made it. Other 406 (an argument that this
    server does not take) are errors.
    """
    inequivalent = reply_code == PRECONDITION_FAILED and "inequivalent" in reply_text
    return Next.ADOPT if inequivalent else Next.FAIL


class Topology(msgspec.Struct, frozen=True):
    """What this transport makes at one server: by its options and the server's version."""

    options: RabbitMQOptions
    differences: Differences

    @property
    def quorum(self) -> bool:
        """Whether the queues of tasks that are made are quorum queues."""
        return self.differences.quorum_queues and self.options.queue_type != "classic"

    def queue(self, queue: str, priority: int = DEFAULT_PRIORITY) -> DeclareQueue:
        """The queue at the server for messages of this priority to ``queue``; temporary ones have one for all."""
        if is_temporary(queue):
            return self.reply_queue(queue)
        arguments = quorum_arguments(self.differences) if self.quorum else {}
        if self.options.queue_expires is not None:
            arguments["x-expires"] = round(self.options.queue_expires * 1000)
        return DeclareQueue(queue_name(self.options.prefix, queue, priority), arguments)

    def reply_queue(self, queue: str) -> DeclareQueue:
        """A temporary queue. Durable: shared queues that are not are deprecated, and a server may refuse them."""
        return DeclareQueue(
            queue_name(self.options.prefix, queue, DEFAULT_PRIORITY),
            {**self._classic_arguments(), "x-expires": round(REPLY_QUEUE_EXPIRES_SECONDS * 1000)},
        )

    def listener_queue(self) -> DeclareQueue:
        """The queue of one listener, named by the server, which ends with its connection."""
        arguments = {**self._classic_arguments(), "x-max-length": LISTENER_HOLDS}
        return DeclareQueue("", arguments, durable=False, exclusive=True, auto_delete=True)

    def mark(self, name: str, instance: str) -> DeclareQueue:
        """The queue that a consumer leaves behind when it opens: none but its connection can have made it."""
        text = f"{self.options.prefix}\n{name}\n{instance}".encode(errors="surrogatepass")
        digest = blake2b(text, digest_size=_DIGEST_BYTES).hexdigest()
        arguments = {**self._classic_arguments(), "x-expires": round(MARK_EXPIRES_SECONDS * 1000)}
        return DeclareQueue(f"ekiden.consumer.{digest}", arguments, durable=False, exclusive=True)

    @property
    def topics(self) -> DeclareExchange:
        """Carries broadcasts; the routing key is ``topic_key``."""
        return DeclareExchange(shortened(f"{self.options.prefix}ekiden.topics"), "direct")

    @property
    def announcements(self) -> DeclareExchange:
        """Carries what the transports of one prefix tell each other, to all of them."""
        return DeclareExchange(shortened(f"{self.options.prefix}ekiden.announcements"), "fanout")

    def _classic_arguments(self) -> dict[str, Argument]:
        # Said aloud: a virtual host may have quorum as its default type.
        return {"x-queue-type": "classic"} if self.differences.quorum_queues else {}


def quorum_arguments(differences: Differences) -> dict[str, Argument]:
    """The arguments of a quorum queue that drops nothing, however often a message of it was delivered."""
    arguments: dict[str, Argument] = {"x-queue-type": "quorum"}
    if differences.unlimited_deliveries is not None:
        arguments["x-delivery-limit"] = differences.unlimited_deliveries
    return arguments


def queue_name(prefix: str, queue: str, priority: int = DEFAULT_PRIORITY) -> str:
    """The name at the server. No two (queue, priority) share one.

    The default priority has the queue's own name, so that queues that exist are found. A queue whose own name looks
    like a band's is named as a band of the default priority.
    """
    band = f".priority.{priority}" if priority != DEFAULT_PRIORITY or _BAND.search(queue) else ""
    return shortened(f"{prefix}{queue}", band)


def topic_key(topic: str) -> str:
    """The routing key of a topic's broadcasts."""
    return shortened(topic)


def is_temporary(queue: str) -> bool:
    """Whether this is a ``reply.*`` queue: it vanishes after its consumer, and publishing never makes it."""
    return queue.startswith(REPLY_PREFIX)


def shortened(name: str, ending: str = "") -> str:
    """``name`` + ``ending`` where AMQP and the server can carry it.

    Else as much of ``name`` as fits, its digest, and ``ending``. Total: half of a surrogate pair, which no encoding
    carries, is left out, and counts in the digest.
    """
    encoded = name.encode(errors="surrogatepass")
    carried = encoded.decode(errors="ignore")
    longest = LONGEST_NAME_BYTES if name.isascii() else LONGEST_NAME_BYTES_BEYOND_ASCII
    if len(encoded) + len(ending) <= longest and carried == name:
        return name + ending
    digest = blake2b(encoded, digest_size=_DIGEST_BYTES).hexdigest()
    room = longest - len(digest) - len(ending) - 1
    return f"{encoded[:room].decode(errors='ignore')}~{digest}{ending}"
