"""What an operator should change at a RabbitMQ server, as far as a client of it can see.

AMQP tells how many messages are ready in a queue, and nothing of policies, disks or clusters. How a queue was
declared is told by declaring it again in our own way: the server refuses, and names the first argument that differs.
All of this is asked on a connection that serves for nothing else, because a server may end it for a question: from 4.0
on it does when its answer about a queue has more bytes than AMQP carries.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pika.exceptions

from ekiden_rabbitmq import refusals
from ekiden_rabbitmq.announcements import PRIORITIES
from ekiden_rabbitmq.connection import Connection
from ekiden_rabbitmq.declaring import Declarer
from ekiden_rabbitmq.delays import STRANDED
from ekiden_rabbitmq.options import RabbitMQOptions
from ekiden_rabbitmq.topology import (
    DeclareQueue,
    Next,
    Topology,
    after_making,
    is_temporary,
    queue_name,
    quorum_arguments,
)
from ekiden_rabbitmq.versions import OLDEST_SUPPORTED, Server

_CURRENT_LIMIT = re.compile(r"current is (?:the value )?'(-?\d+)'")


async def warnings_about(
    queues: Sequence[str], declarer: Declarer, options: RabbitMQOptions, *, publishing: Connection, url: str
) -> list[str]:
    """One sentence for each thing that should be different. On the I/O thread. ``url`` begins the sentences.

    ``declarer`` has the connection for this; ``publishing`` is the one that the server blocks when it is short of
    something. Raises what pika raises, but for what this user may not ask.
    """
    server = await publishing.opened()
    found = list(_of_server(server, options, blocked=publishing.blocked))
    topology = await declarer.topology()
    found += await _of_stranded(declarer)
    for queue in queues:
        found += await _of_queue(declarer, topology, queue)
    return [f"{url}: {sentence}." for sentence in found]


async def delivery_limits(queues: Sequence[str], declarer: Declarer, options: RabbitMQOptions) -> dict[str, int]:
    """By queue: after how many returns the server drops a message of it, as far as its declaration tells."""
    topology = await declarer.topology()
    limits: dict[str, int] = {}
    for queue in queues:
        if is_temporary(queue) or not topology.differences.quorum_queues:
            continue
        names = [queue_name(options.prefix, queue, priority) for priority in PRIORITIES]
        counts = await declarer.look(names)
        there = [name for name, count in zip(names, counts, strict=True) if count is not None]
        found = [await _delivery_limit(declarer, topology, name) for name in there]
        limited = [limit for limit in found if limit is not None]
        if limited:
            limits[queue] = min(limited)
    return limits


async def _delivery_limit(declarer: Declarer, topology: Topology, name: str) -> int | None:
    """Of a queue that is there; None: it has none, or that cannot be told."""
    as_ours = DeclareQueue(name, quorum_arguments(topology.differences))
    try:
        await declarer.alone(lambda channel: channel.declare_queue(as_ours))
    except pika.exceptions.ChannelClosedByBroker as error:
        return _limit_in(refusals.difference(error.reply_text), topology)
    except pika.exceptions.ConnectionClosedByBroker:
        return None  # for its answer, which was too long
    return None


def _limit_in(difference: refusals.Difference, topology: Topology) -> int | None:
    """The server's default holds where a quorum queue was declared without a limit: only 4.0 and newer have one."""
    if difference.argument != "x-delivery-limit":
        return None
    if "received the value" in difference.text:
        return topology.differences.delivery_limit
    current = _CURRENT_LIMIT.search(difference.text)
    return int(current[1]) if current is not None and int(current[1]) >= 0 else None


def _of_server(server: Server, options: RabbitMQOptions, *, blocked: str | None) -> Iterator[str]:
    differences = server.differences
    oldest = ".".join(map(str, OLDEST_SUPPORTED))
    if server.product != "RabbitMQ":
        yield f"this is {server.text}, with which ekiden was never run"
    elif server.version[:2] < OLDEST_SUPPORTED:
        yield (
            f"{server.text} is older than {oldest}: what is delayed there may be lost when the server dies. Upgrade it"
        )
    if blocked is not None:
        yield f"the server takes no messages now, because it is {blocked}"
    if options.queue_type == "quorum" and not differences.quorum_queues:
        yield f"{server.text} has no quorum queues: those that ekiden makes are classic, whatever queue_type says"


async def _of_stranded(declarer: Declarer) -> list[str]:
    try:
        (stranded,) = await declarer.look([STRANDED])
    except pika.exceptions.ChannelClosedByBroker as error:
        return [f"whether delayed messages are stranded cannot be told ({error.reply_text})"]
    if not stranded:
        return []
    return [
        f"{stranded} delayed messages are in the queue {STRANDED}, because their own queue had been deleted when they "
        "were due; consume them from there, or purge it"
    ]


async def _of_queue(declarer: Declarer, topology: Topology, queue: str) -> list[str]:
    declared = topology.queue(queue)
    if is_temporary(queue):
        return []
    try:
        (ready,) = await declarer.look([declared.name])
        if ready is None:
            return []
        await declarer.alone(lambda channel: channel.declare_queue(declared))
    except pika.exceptions.ChannelClosedByBroker as error:
        if after_making(error.reply_code, error.reply_text) is not Next.ADOPT:
            return [str(refusals.closed(error.reply_code, error.reply_text, f"the queue {declared.name}")).rstrip(".")]
        return [_of_difference(refusals.difference(error.reply_text), topology, declared.name)]
    except pika.exceptions.ConnectionClosedByBroker as error:
        return [f"how the queue {declared.name} was declared cannot be told ({error.reply_text})"]
    return []


def _of_difference(difference: refusals.Difference, topology: Topology, name: str) -> str:
    if difference.argument == "durable":
        return f"the queue {name} is not durable: it goes, with its messages, when the server stops"
    limit = _limit_in(difference, topology)
    if limit is not None:
        how = (
            f"with an x-delivery-limit of {limit}"
            if _CURRENT_LIMIT.search(difference.text)
            else "without an x-delivery-limit"
        )
        return (
            f"the queue {name} was not declared by ekiden, or when the server was older: it was made {how}, and the "
            f"server drops a message that comes back more than {limit} times, as it does when the worker that has it "
            "dies. Set a policy with a higher delivery-limit for it, if none is set, or have it made anew"
        )
    unlimited = topology.differences.unlimited_deliveries
    limits = "no x-delivery-limit" if unlimited is None else f"an x-delivery-limit of {unlimited}"
    return (
        f"the queue {name} was not declared by ekiden, or with other options: its {difference.argument} differs "
        f"({difference.text}). It is used as it is; see that it drops no messages: {limits}, and no x-max-length or "
        "x-message-ttl without a dead-letter exchange"
    )
