"""Delays that the broker holds, of any length, without a plugin, and without one message waiting for another.

A queue whose messages all live equally long hands them on in the order in which they came, so nothing in it waits for
anything but its own time. Level k is such a queue: a message that enters it leaves it ``UNIT * 2**k`` later. A delay
in units, written in binary, says at which levels a message rests, so that 2**31 delays need 31 queues:

    1.3 s = 13 units = 1101 in binary: 0.8 s at level 3, 0.4 s at level 2, nothing at level 1, 0.1 s at level 0

     publish, key  <word>.1.0.1.1          (the word of the target queue, then bits 0, 1, 2, 3)
        |
        v                    bit 3 is 1
     [exchange level 3] -----------------> |queue level 3, 0.8 s|
        | bit 3 is 0                          |  expired: dead-lettered with its routing key
        v                                     |
     [exchange level 2] <---------------------'
        |           `--- bit 2 is 1 -----> |queue level 2, 0.4 s| ---.
        v                                                            |
     [exchange level 1] <--------------------------------------------'
        ...
     [exchange ekiden.delivery] --- <word>.# ---> the target queue
        `--- no such word ---> [exchange ekiden.stranded] ---> |queue ekiden.stranded|

The names carry the level and its time, so that levels with another unit would be others. The levels belong to the
virtual host, not to a prefix: a server with many applications needs them once. They are made when the first delay
needs them, up to the largest one needed. Where the server can, they are quorum queues that hand on *at least once*:
a message leaves its level when the next queue has confirmed it. Classic ones hand on at most once: what is just
between two levels when the server dies is lost. The two have names of their own and are never mixed.

What a prefix-less pattern of an operator's policy does to every queue (a message TTL, a maximum length), it does to
these too; see the transport's page.
"""

from __future__ import annotations

import math
from hashlib import blake2b

import msgspec

from ekiden_rabbitmq.topology import (
    BindExchange,
    BindQueue,
    DeclareExchange,
    DeclareQueue,
    Step,
    Topology,
    quorum_arguments,
)
from ekiden_rabbitmq.versions import Differences

UNIT_SECONDS = 0.1
LEVELS = 31
"""The last level holds 2**30 units, 3.4 years: well below the longest TTL that servers take (some ten years)."""

LONGEST_UNITS = 2**LEVELS - 1

EARLY_SECONDS = 0.001
"""A delay that exceeds a number of units by less than this is rounded down: the clock made it so, not a user."""

STRANDED = "ekiden.stranded"
"""The exchange and the queue of messages whose target queue was gone when their delay ended."""

_WORD_BYTES = 8


class Route(msgspec.Struct, frozen=True):
    """Where a delayed message is published. ``level`` and all below it must exist.

    ``further``: the delay is longer than all levels together. Then this is the first lap only: who receives the
    message publishes it again for what remains of its time.
    """

    exchange: str
    routing_key: str
    level: int
    further: bool = False


class Delays(msgspec.Struct, frozen=True):
    """The levels of one kind, quorum or classic, in one virtual host."""

    quorum: bool
    differences: Differences

    def route(self, queue: str, seconds: float) -> Route | None:
        """Where to publish what the queue named ``queue`` (at the server) shall get in ``seconds``; None: at once."""
        units = units_of(seconds)
        if units <= 0:
            return None
        lap = min(units, LONGEST_UNITS)
        bits = f"{lap:b}"[::-1]
        level = len(bits) - 1
        return Route(self.level_name(level), f"{word_of(queue)}.{'.'.join(bits)}", level, units > lap)

    def level_name(self, level: int) -> str:
        """The name of the queue and of the exchange of one level."""
        return f"ekiden.delay.{'' if self.quorum else 'classic.'}{level:02}-{round(UNIT_SECONDS * 2**level, 1)}s"

    @property
    def delivery(self) -> str:
        """The exchange that leads from the last level to the target queues."""
        return f"ekiden.delivery{'' if self.quorum else '.classic'}"

    def foundation(self) -> list[Step]:
        """What has to be there before the first level: the way to the target queues, and to the stranded ones."""
        return [
            DeclareExchange(STRANDED, "fanout"),
            DeclareQueue(STRANDED, quorum_arguments(self.differences) if self.quorum else {}),
            BindQueue(STRANDED, STRANDED),
            DeclareExchange(self.delivery, "topic", {"alternate-exchange": STRANDED}),
        ]

    def level(self, level: int) -> list[Step]:
        """What makes one level, on top of ``foundation()`` and of the levels below it."""
        name = self.level_name(level)
        below = self.level_name(level - 1) if level else self.delivery
        arguments: dict[str, str | int] = {
            "x-message-ttl": round(UNIT_SECONDS * 1000) * 2**level,
            "x-dead-letter-exchange": below,
        }
        if self.quorum:
            arguments["x-queue-type"] = "quorum"
            arguments["x-dead-letter-strategy"] = "at-least-once"
            # The strategy holds only together with this; with the default it is silently another one.
            arguments["x-overflow"] = "reject-publish"
        skipped = "*." * (level + 1)
        return [
            DeclareExchange(name, "topic"),
            BindExchange(below, name, f"{skipped}0.#"),
            DeclareQueue(name, arguments),
            BindQueue(name, name, f"{skipped}1.#"),
        ]

    def target(self, queue: str) -> BindQueue:
        """Makes ``queue`` (its name at the server) a target. It must exist: else 404, and the channel is closed.

        Deleting a queue deletes this binding. Repeat it whenever the queue was made anew, and now and then.
        """
        return BindQueue(queue, self.delivery, f"{word_of(queue)}.#")


def delays_of(topology: Topology) -> Delays:
    """The levels that go with the queues that ``topology`` makes."""
    return Delays(topology.quorum and topology.differences.quorum_time_to_live, topology.differences)


LONGEST_SECONDS = 1e12
"""Of longer delays nobody sees the difference, and for ever is one of them."""


def units_of(seconds: float) -> int:
    """``seconds`` in units, rounded up, so that nothing is early; 0 or less: it is due. What is no number is due."""
    if math.isnan(seconds):
        return 0
    return math.ceil((min(max(seconds, 0.0), LONGEST_SECONDS) - EARLY_SECONDS) / UNIT_SECONDS)


def word_of(queue: str) -> str:
    """What stands for a queue in routing keys: names may be as long as a key, and hold dots, ``*`` and ``#``."""
    return blake2b(queue.encode(), digest_size=_WORD_BYTES).hexdigest()
