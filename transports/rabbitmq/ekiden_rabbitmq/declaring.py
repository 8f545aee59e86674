"""Makes at the server what ``topology`` and ``delays`` say, over one connection; on the I/O thread.

Each step is tried on a channel that serves for nothing else, because the server answers an error by closing the
channel. What was made or found is remembered until the connection is lost, or until ``forget``: a queue that somebody
deletes meanwhile is noticed by whoever uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import pika.exceptions
from ekiden.errors import BrokerUnavailable
from ekiden.message import DEFAULT_PRIORITY

from ekiden_rabbitmq.connection import Channel, Connection
from ekiden_rabbitmq.delays import Delays, Route, delays_of
from ekiden_rabbitmq.io_thread import Work, start
from ekiden_rabbitmq.options import RabbitMQOptions
from ekiden_rabbitmq.topology import (
    ACCESS_REFUSED,
    NOT_FOUND,
    BindExchange,
    BindQueue,
    DeclareExchange,
    DeclareQueue,
    Next,
    Step,
    Topology,
    after_looking,
    after_making,
)

T = TypeVar("T")

INTERNAL_ERROR = 541

SPARE_CHANNELS = 4
LOOKS_AT_ONCE = 100

MADE_AGAIN_AFTER_SECONDS = 0.2
"""A queue that was deleted is made again so long after this was noticed, not sooner.

A server (3.10.8) that finds a quorum queue of the same name when it tells the consumers of a deleted one, some
milliseconds later, hands them over to it without a word, and what the new queue pushes to them reaches nobody.
"""

ASKED_AGAIN_AFTER_SECONDS = 60.0
"""So long a queue is left alone for which the server has ended the connection.

Servers from 4.0 on do that when what they say of it has 255 characters, but more bytes: a long answer ("locked by
another connection") about a name that is not ASCII.
"""

BOUND_AGAIN_AFTER_SECONDS = 60.0
"""Who only publishes delayed messages does not notice that their queue was deleted, and its binding with it."""


class NotAskedFor(BrokerUnavailable):
    """The server has ended the connection when it was asked for this queue, and is not asked again for a while."""


class Declarer:
    """What there is at the server, as far as this connection has seen or made it."""

    def __init__(self, connection: Connection, options: RabbitMQOptions) -> None:
        self._connection = connection
        self._options = options
        self._generation = 0
        self._known: set[str] = set()
        self._names: dict[tuple[str, int], str] = {}
        self._targets: dict[str, float] = {}
        self._gone: dict[str, float] = {}
        self._harmful: dict[str, float] = {}
        self._levels = -1
        self._spare: list[Channel] = []

    async def topology(self) -> Topology:
        """What to make at the server that is connected now."""
        server = await self._connection.opened()
        if self._generation != self._connection.generation:
            self._generation = self._connection.generation
            self._known.clear()
            self._names.clear()
            self._targets.clear()
            self._levels = -1
            self._spare.clear()
        return Topology(self._options, server.differences)

    async def queue(self, queue: str, priority: int = DEFAULT_PRIORITY) -> bool:
        """Make the queue for messages of this priority, if it is not there; whether it was not known here before."""
        topology = await self.topology()
        declared = topology.queue(queue, priority)
        was_deleted = declared.name in self._gone
        is_new = await self._make(declared)
        self._names[queue, priority] = declared.name
        if is_new and was_deleted:
            self._gone.pop(declared.name, None)
            await self._make_target_again(declared.name, delays_of(topology))
        return is_new

    def known(self, queue: str, priority: int) -> str | None:
        """The name at the server of the queue that ``queue`` has seen or made on the connection that is up now."""
        if self._generation != self._connection.generation or not self._connection.is_open:
            return None
        name = self._names.get((queue, priority))
        return name if name in self._known else None

    async def exchange(self, exchange: DeclareExchange) -> None:
        """Make the exchange, if it is not there."""
        await self.topology()
        await self._make(exchange)

    async def delay(self, queue: str, seconds: float) -> Route | None:
        """Make the levels for a delay of a message to the queue of this name at the server; how it is published.

        None: the delay is over, or the queue is temporary and not there.
        """
        begun = time.monotonic()
        delays = delays_of(await self.topology())
        route = delays.route(queue, seconds)
        if route is None:
            return None
        await self._levels_up_to(route.level, delays)
        if self._targets.get(queue, 0.0) <= begun:
            await self.alone(lambda channel: channel.bind(delays.target(queue)))
            self._targets[queue] = begun + BOUND_AGAIN_AFTER_SECONDS
        # To make levels for the first time takes a part of the delay.
        return delays.route(queue, seconds - (time.monotonic() - begun))

    def forget(self, name: str) -> None:
        """The queue of this name is gone, or the levels of its delayed messages are, or may be."""
        self._known.discard(name)
        self._targets.pop(name, None)
        self._levels = -1
        self._gone[name] = time.monotonic() + MADE_AGAIN_AFTER_SECONDS

    async def look(self, names: Sequence[str]) -> list[int | None]:
        """How many messages are ready in each queue, by its name at the server; None: there is no such queue."""
        await self.topology()
        counts: list[int | None] = []
        for begin in range(0, len(names), LOOKS_AT_ONCE):
            looks = [start(self._look(name)) for name in names[begin : begin + LOOKS_AT_ONCE]]
            counts += [await look for look in looks]
        return counts

    async def alone(self, call: Callable[[Channel], Work[T]]) -> T:
        """Make a call on a channel where an error harms nobody."""
        channel = self._spare.pop() if self._spare else None
        if channel is None or not channel.is_open:
            channel = await self._connection.channel()
        result = await call(channel)
        if len(self._spare) < SPARE_CHANNELS:
            self._spare.append(channel)
        else:
            await channel.close()
        return result

    async def _levels_up_to(self, highest: int, delays: Delays) -> None:
        if self._levels < 0:
            await self._carry_out(delays.foundation())
        for level in range(self._levels + 1, highest + 1):
            await self._carry_out(delays.level(level))
            self._levels = max(self._levels, level)

    async def _make_target_again(self, name: str, delays: Delays) -> None:
        """What is delayed now shall find the queue, too, and others believe that it can."""
        try:
            await self.alone(lambda channel: channel.bind(delays.target(name)))
        except pika.exceptions.ChannelClosedByBroker as error:
            # Nothing was ever delayed here; or this user does not delay anything, and may not.
            if error.reply_code not in {NOT_FOUND, ACCESS_REFUSED}:
                raise

    async def _carry_out(self, steps: Iterable[Step]) -> None:
        for step in steps:
            if isinstance(step, BindQueue | BindExchange):
                binding = step
                await self.alone(lambda channel, binding=binding: channel.bind(binding))  # type: ignore[misc]
            else:
                await self._look_or_make(step)

    async def _make(self, step: DeclareQueue | DeclareExchange) -> bool:
        key = f"{type(step).__name__} {step.name}" if isinstance(step, DeclareExchange) else step.name
        if key in self._known:
            return False
        await self._look_or_make(step)
        self._known.add(key)
        return True

    async def _look_or_make(self, step: DeclareQueue | DeclareExchange) -> None:
        try:
            await self._ask_for(step.name, lambda channel: _declare(channel, step, passive=True))
        except pika.exceptions.ChannelClosedByBroker as error:
            if after_looking(error.reply_code) is Next.FAIL:
                raise
            await self._connection.io.sleep(self._gone.get(step.name, 0.0) - time.monotonic())
            await self._make_now(step)

    async def _make_now(self, step: DeclareQueue | DeclareExchange) -> None:
        try:
            await self.alone(lambda channel: _declare(channel, step, passive=False))
        except pika.exceptions.ChannelClosedByBroker as error:
            if after_making(error.reply_code, error.reply_text) is Next.FAIL:
                raise

    async def _ask_for(self, name: str, call: Callable[[Channel], Work[T]]) -> T:
        """Make a call about the queue or exchange of this name, unless that has ended a connection just now."""
        if self._harmful.get(name, 0.0) > time.monotonic():
            raise NotAskedFor(_not_asked_for(name))
        try:
            return await self.alone(call)
        except pika.exceptions.ConnectionClosedByBroker as error:
            if error.reply_code != INTERNAL_ERROR or name.isascii():
                raise
            self._harmful[name] = time.monotonic() + ASKED_AGAIN_AFTER_SECONDS
            raise NotAskedFor(_not_asked_for(name)) from error

    async def _look(self, name: str) -> int | None:
        try:
            looked_for = DeclareQueue(name)
            _, ready = await self._ask_for(name, lambda channel: channel.declare_queue(looked_for, passive=True))
        except pika.exceptions.ChannelClosedByBroker as error:
            if error.reply_code == NOT_FOUND:
                return None
            raise
        return ready


def _not_asked_for(name: str) -> str:
    return (
        f"The server ended the connection when it was asked for the queue {name}; its log says why. The queue is left "
        f"alone for {ASKED_AGAIN_AFTER_SECONDS:.0f} s."
    )


async def _declare(channel: Channel, step: DeclareQueue | DeclareExchange, *, passive: bool) -> None:
    if isinstance(step, DeclareQueue):
        await channel.declare_queue(step, passive=passive)
    else:
        await channel.declare_exchange(step, passive=passive)
