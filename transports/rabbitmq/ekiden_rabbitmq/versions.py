"""What differs between the versions of RabbitMQ, in one table, chosen by what the server says of itself.

Sources: the release notes of 3.8.0, 3.10.0, 4.0.1 and 4.3.0, and the pages "Quorum Queues", "Dead Letter Exchanges",
"Time-To-Live", "Consumers" (delivery acknowledgement timeout), "Deprecated Features" and "Configuration"
(max_message_size) of the documentation. Run against: 3.10.8, 4.0.5 and 4.3.6. What is said of other versions
was read.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

Version = tuple[int, int, int]

MIB = 1024 * 1024


class Differences(msgspec.Struct, frozen=True, kw_only=True):
    """What is true of servers from version ``since`` on, until the next line of the table.

    ``quorum_queues``: they exist. ``quorum_time_to_live``: their messages can expire, and be dead-lettered at least
    once; the levels of delay need both. ``hand_out_counters``: headers that count earlier hand-outs of a message of a
    quorum queue, the largest counts. ``nack_counts``: ``basic.nack`` with requeue raises ``x-delivery-count``.
    ``delivery_limit``: after so many counted deliveries a quorum queue drops a message, unless it was declared
    otherwise; None is never. ``unlimited_deliveries``: the value of ``x-delivery-limit`` that says never; None where
    nothing needs to be said. ``looking_needs_a_right``: a passive declaration needs the configure, the write or the
    read permission; before, none.
    ``classic_consumer_timeout``: the consumer timeout (30 minutes) holds on classic queues too.
    ``consumer_timeout_cancels``: it cancels the consumer; before, it closed the channel.
    ``largest_message``: the default of ``max_message_size`` in bytes; the server tells no client what it is.
    """

    since: tuple[int, int]
    quorum_queues: bool
    quorum_time_to_live: bool
    hand_out_counters: tuple[str, ...]
    nack_counts: bool
    delivery_limit: int | None
    unlimited_deliveries: int | None
    looking_needs_a_right: bool
    classic_consumer_timeout: bool
    consumer_timeout_cancels: bool
    largest_message: int


_OLDEST = Differences(
    since=(0, 0),
    quorum_queues=False,
    quorum_time_to_live=False,
    hand_out_counters=(),
    nack_counts=True,
    delivery_limit=None,
    unlimited_deliveries=None,
    looking_needs_a_right=False,
    classic_consumer_timeout=True,
    consumer_timeout_cancels=False,
    largest_message=128 * MIB,
)

_3_8 = msgspec.structs.replace(
    _OLDEST,
    since=(3, 8),
    quorum_queues=True,
    hand_out_counters=("x-delivery-count",),
)

_3_10 = msgspec.structs.replace(
    _3_8,
    since=(3, 10),
    quorum_time_to_live=True,
)

# "Quorum queues now have a default delivery limit of 20"; -1 is "no limit", as an argument only, not as a policy.
_4_0 = msgspec.structs.replace(
    _3_10,
    since=(4, 0),
    delivery_limit=20,
    unlimited_deliveries=-1,
    largest_message=16 * MIB,
)

_4_3 = msgspec.structs.replace(
    _4_0,
    since=(4, 3),
    hand_out_counters=("x-delivery-count", "x-acquired-count"),
    nack_counts=False,
    looking_needs_a_right=True,
    classic_consumer_timeout=False,
    consumer_timeout_cancels=True,
)

TABLE = (_OLDEST, _3_8, _3_10, _4_0, _4_3)
"""One line per version that changed something, oldest first; each says only what is new in it."""

OLDEST_SUPPORTED = (3, 10)


class Server(msgspec.Struct, frozen=True):
    """The server at the other end of a connection: what it is, its version, and what that version does."""

    product: str
    version: Version
    differences: Differences

    @property
    def text(self) -> str:
        """``RabbitMQ 3.10.8``."""
        return f"{self.product} {'.'.join(map(str, self.version))}"


def server_in(properties: Mapping[str, object]) -> Server:
    """The server that sent ``properties`` when the connection was opened (``connection.params`` is the client's side).

    An AMQP broker that tells no version that can be read is taken for the oldest, which asks for the least.
    """
    version = _version(properties.get("version"))
    return Server(str(properties.get("product") or "AMQP broker"), version, differences_of(version))


def differences_of(version: tuple[int, ...]) -> Differences:
    """The line of the table that holds for ``version``."""
    return max((line for line in TABLE if line.since <= version[:2]), key=lambda line: line.since)


def _version(text: object) -> Version:
    """``4.1.0-rc.2`` is (4, 1, 0)."""
    numbers = []
    for part in str(text or "").split(".")[:3]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits[:9]))
    major, minor, patch, *_ = (*numbers, 0, 0, 0)
    return major, minor, patch
