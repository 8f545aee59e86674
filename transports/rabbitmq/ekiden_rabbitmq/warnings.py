"""What an operator should change at a RabbitMQ server, as far as a client of it can see.

AMQP tells how many messages are ready in a queue, and nothing of policies, disks or clusters. How a queue was
declared is told by declaring it again in our own way: the server refuses, and names the first argument that differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pika.exceptions

from ekiden_rabbitmq import refusals
from ekiden_rabbitmq.connection import Connection
from ekiden_rabbitmq.declaring import Declarer
from ekiden_rabbitmq.delays import STRANDED
from ekiden_rabbitmq.options import RabbitMQOptions
from ekiden_rabbitmq.topology import Next, Topology, after_making, is_temporary
from ekiden_rabbitmq.versions import OLDEST_SUPPORTED, Server


async def warnings_about(
    queues: Sequence[str], declarer: Declarer, options: RabbitMQOptions, *, publishing: Connection, url: str
) -> list[str]:
    """One sentence for each thing that should be different. On the I/O thread. ``url`` begins the sentences.

    ``publishing`` is the connection that the server blocks when it is short of something. Raises what pika raises, but
    for what this user may not ask.
    """
    found = list(_of_server(await publishing.opened(), options, blocked=publishing.blocked))
    topology = await declarer.topology()
    found += await _of_stranded(declarer)
    for queue in queues:
        found += await _of_queue(declarer, topology, queue)
    return [f"{url}: {sentence}." for sentence in found]


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
        difference = refusals.difference(error.reply_text)
        if difference.argument == "durable":
            return [f"the queue {declared.name} is not durable: it goes, with its messages, when the server stops"]
        return [
            f"the queue {declared.name} was not declared by ekiden, or with other options: its {difference.argument} "
            f"differs ({difference.text}). It is used as it is; see that it drops no messages: no x-delivery-limit, "
            "x-max-length or x-message-ttl without a dead-letter exchange"
        ]
    return []
