"""A connection that is kept up, and its channels. Everything in here runs on the I/O thread.

**Connection** owns one pika connection at a time. It opens it when somebody needs it, and again, with a pause that
doubles and is jittered, while a ``Member`` (a consumer, a listener) lives on it. Hosts are tried in a shuffled order.
``generation`` rises with every opening: what was declared, numbered or held under an earlier one is void. When the
server blocks publishers (an alarm for memory or disk) ``blocked`` has its reason.

**Channel** is one AMQP channel whose calls are awaited. The server answers an error by closing the channel: then
every call that waits raises pika's ChannelClosedByBroker, and the channel is of no more use. Contents and confirms
come from the wire straight to it (see ``wire``).

What the server sends and we cannot make sense of (a delivery for a consumer that we do not know, an answer to nothing)
costs the channel, and what cannot be read at all the connection: what was delivered there goes back. Never the thread.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import pika
import pika.exceptions
from ekiden.errors import BrokerUnavailable, ConfigurationError, TransportError
from ekiden.loggers import safe_logger
from pika import spec
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.channel import Channel as PikaChannel

from ekiden_rabbitmq import frames
from ekiden_rabbitmq.io_thread import IOThread, Reply
from ekiden_rabbitmq.topology import BindExchange, BindQueue, DeclareExchange, DeclareQueue
from ekiden_rabbitmq.versions import Server, server_in
from ekiden_rabbitmq.wire import WireConnection, connect

logger = safe_logger("ekiden_rabbitmq")

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
PAUSE_OF_A_CALLER_SECONDS = 0.5
LONGEST_SILENCE_SECONDS = 5.0
"""A caller who waits brings the next attempt forward to this."""

BROKER_ERRORS = (pika.exceptions.AMQPError, AMQPConnectorException, TransportError, OSError)
"""What a call to the server raises when it, or the way to it, is in trouble."""

Deliver = Callable[[int, bool, bytes, bytes], None]
"""Called with a delivery's number, whether it was redelivered, its properties and its body."""


class Member(Protocol):
    """Lives on a connection and wants it to be up."""

    def connection_opened(self) -> None:
        """It is up, for the first time or again."""

    def connection_lost(self, error: BaseException) -> None:
        """It is down; what was held on it is not any more."""


class BrokenOff(pika.exceptions.AMQPError):
    """A channel that was closed here, because our own code has failed with something that came on it."""


class UnexpectedDelivery(pika.exceptions.AMQPError):
    """A delivery for a consumer that does not exist, or not any more.

    Servers of 4.3 send one when something is acknowledged that a consumer held which they have cancelled.
    """


class Got:
    """A message that ``Channel.get`` brought."""

    __slots__ = ("body", "number", "properties", "redelivered")

    def __init__(self, number: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        self.number = number
        self.redelivered = redelivered
        self.properties = properties
        self.body = body


class Connection:
    """Kept up for its members, and for whoever asks. ``parameters`` is called for each attempt to connect."""

    def __init__(
        self, io: IOThread, parameters: Callable[[], Sequence[pika.ConnectionParameters]], *, name: str
    ) -> None:
        self.io = io
        self.name = name
        self.generation = 0
        self.server: Server | None = None
        self.blocked: str | None = None
        self.error: BaseException | None = None
        self._parameters = parameters
        self._members: dict[Member, None] = {}
        self._wire: WireConnection | None = None
        self._tried: WireConnection | None = None
        self._attempting: Reply[None] | None = None
        self._opening: Reply[None] | None = None
        self._retry: object | None = None
        self._retry_at_most = 0.0
        self._pause = 0.0
        self._unblocked: Reply[None] = Reply()
        self._gone: Reply[None] = Reply()
        self._closed = False

    @property
    def is_open(self) -> bool:
        """Whether it can be used now."""
        return self._wire is not None

    @property
    def wire(self) -> WireConnection:
        """The open connection. Raises what it was lost for."""
        if self._wire is None:
            raise self.error or pika.exceptions.ConnectionWrongStateError("not connected")
        return self._wire

    async def opened(self) -> Server:
        """Wait until it is up. Raises what the next attempt to connect fails with."""
        if self._wire is not None and self._wire.is_lost:
            await self._gone  # its channels have been told, and it is about to be
        if self._wire is None:
            if self._closed:
                raise pika.exceptions.ConnectionWrongStateError("closed here")
            if self._opening is None:
                self._opening = Reply()
                if self._retry is None:
                    self._attempt()
                else:
                    self._attempt_after(min(self._retry_at_most, PAUSE_OF_A_CALLER_SECONDS))
            await self._opening
        assert self.server is not None
        return self.server

    async def writable(self) -> None:
        """Wait until the server takes messages from this connection."""
        while self.blocked is not None and self._wire is not None:
            await self._unblocked

    def add(self, member: Member) -> None:
        """Keep the connection up for ``member``, until ``discard``."""
        self._members[member] = None

    def discard(self, member: Member) -> None:
        """``member`` needs it no more."""
        self._members.pop(member, None)

    def drop(self) -> None:
        """The loop has failed: end it without a word, so that the server gives others what was delivered here."""
        for wire in (self._wire, self._tried):
            if wire is not None:
                wire.drop()

    async def channel(self) -> Channel:
        """A new channel."""
        await self.opened()
        opened: Reply[PikaChannel] = Reply()
        made = self.wire.channel(on_open_callback=opened.set)
        channel = Channel(self, self.wire, made)
        channel.on_closed = opened.fail
        await opened
        channel.on_closed = None
        return channel

    async def close(self, within: float) -> None:
        """Say goodbye; after so many seconds go without an answer."""
        self._closed = True
        self._cancel_retry()
        if self._attempting is not None:
            # pika cannot give up an attempt in each of its steps.
            await self._is_there_within(within, self._attempting)
        self._fail_opening(pika.exceptions.ConnectionWrongStateError("closed here"))
        if self._wire is not None:
            wire = self._wire
            if wire.is_open and not wire.is_lost:
                wire.close()
            if not await self._is_there_within(within, self._gone):
                self._gone = Reply()
                wire.abort(pika.exceptions.ConnectionWrongStateError("closed here"))
                await self._gone

    async def _is_there_within(self, seconds: float, reply: Reply[None]) -> bool:
        try:
            await self.io.within(seconds, reply)
        except TimeoutError:
            return False
        return True

    # Opening and losing.

    def _attempt(self) -> None:
        self._cancel_retry()
        self._attempting = Reply()
        try:
            parameters = self._parameters()
        except ConfigurationError as error:  # the files of the certificates were readable at first
            self._attempted(BrokerUnavailable(str(error)))
            return
        except Exception as error:  # noqa: BLE001 - a bug of ours is told to those who want the connection
            self.io.survived(error, doing=f"connecting for {self.name}")
            self._attempted(BrokerUnavailable(f"The connection for {self.name} cannot be set up: {error!r}."))
            return
        for one in parameters:
            # For one address of the host: a silent one leaves time for the next.
            one.socket_timeout = min((one.socket_timeout or LONGEST_SILENCE_SECONDS) / 3, LONGEST_SILENCE_SECONDS)
        connect(
            random.sample(parameters, len(parameters)),
            self.io.loop,
            on_tried=self._trying,
            on_done=self._attempted,
            failed=self._unread,
        )

    def _trying(self, wire: WireConnection) -> None:
        self._tried = wire

    def _unread(self, error: Exception) -> None:
        """What came cannot be read, or our reader is wrong; pika ends the connection for it."""
        if not isinstance(error, pika.exceptions.AMQPError):
            self.io.survived(error, doing=f"reading what the server sends on the connection for {self.name}")

    def _attempted(self, result: WireConnection | BaseException) -> None:
        attempting, self._attempting = self._attempting, None
        self._tried = None
        if isinstance(result, BaseException):
            self.error = result
            self._fail_opening(result)
            self._attempt_later()
        else:
            self._opened(result)
        if attempting is not None:
            attempting.set(None)

    def _opened(self, result: WireConnection) -> None:
        if self.generation:
            logger.info("connected again, for %s", self.name)
        self._wire = result
        self._gone = Reply()
        self._pause = 0.0
        self.generation += 1
        self.server = server_in(result.server_properties or {})
        self.blocked = self.error = None
        result.add_on_close_callback(self._lost)
        result.add_on_connection_blocked_callback(self._now_blocked)
        result.add_on_connection_unblocked_callback(self._now_unblocked)
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.set(None)
        for member in list(self._members):
            member.connection_opened()

    def _lost(self, _connection: Any, reason: BaseException) -> None:
        self._wire = None
        self.error = reason
        self._now_unblocked(None, None)
        if not self._closed:
            logger.warning("lost the connection for %s: %s", self.name, reason)
        for member in list(self._members):
            member.connection_lost(reason)
        self._attempt_later()
        self._gone.set(None)

    def _fail_opening(self, error: BaseException) -> None:
        opening, self._opening = self._opening, None
        if opening is not None:
            opening.fail(error)

    def _attempt_later(self) -> None:
        if not self._closed:
            self._pause = min(self._pause * 2 or FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
            self._attempt_after(self._pause * random.uniform(0.5, 1.0))

    def _attempt_after(self, seconds: float) -> None:
        self._cancel_retry()
        self._retry_at_most = seconds
        self._retry = self.io.call_later(seconds, self._pause_is_over)

    def _pause_is_over(self) -> None:
        self._retry = None
        if self._members or self._opening is not None:
            self._attempt()

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self.io.cancel(self._retry)
            self._retry = None

    def _now_blocked(self, _connection: Any, frame: Any) -> None:
        self.blocked = str(frame.method.reason)
        logger.warning("the server takes no messages now (%s), on the connection for %s", self.blocked, self.name)

    def _now_unblocked(self, _connection: Any, _frame: Any) -> None:
        self.blocked = None
        unblocked, self._unblocked = self._unblocked, Reply()
        unblocked.set(None)


class Channel:
    """One channel; a call on one that is closed raises what it was closed for."""

    def __init__(self, connection: Connection, wire: WireConnection, channel: PikaChannel) -> None:
        self.connection = connection
        self.number = channel.channel_number
        self.error: BaseException | None = None
        self.on_closed: Callable[[BaseException], None] | None = None
        self.on_cancelled: Callable[[bytes], None] | None = None
        self.on_confirm: Callable[[int, bool, bool], None] | None = None
        self.on_returned: Callable[[int, bytes, bytes, bytes], None] | None = None
        self.on_burst: Callable[[], None] | None = None
        self._wire = wire
        self._channel = channel
        self._waiting: dict[Reply[Any], None] = {}
        self._consumers: dict[bytes, Deliver] = {}
        self._gets: deque[Reply[Got | None]] = deque()
        self._barriers: deque[Reply[None]] = deque()
        wire.readers[self.number] = self
        channel.add_on_close_callback(self._closed)
        channel.add_on_cancel_callback(self._cancelled)
        channel.add_callback(self._nothing_got, [spec.Basic.GetEmpty], one_shot=False)
        channel.add_callback(self._barrier_passed, [spec.Channel.FlowOk], one_shot=False)

    @property
    def is_open(self) -> bool:
        """Whether calls can be made."""
        return self.error is None

    # Calls.

    async def declare_queue(self, queue: DeclareQueue, *, passive: bool = False) -> tuple[str, int]:
        """Make the queue, or (``passive``) look for it; returns its name and how many messages are ready in it."""
        frame = await self._call(
            lambda answer: self._channel.queue_declare(
                queue.name,
                passive=passive,
                durable=queue.durable,
                exclusive=queue.exclusive,
                auto_delete=queue.auto_delete,
                arguments=dict(queue.arguments),
                callback=answer,
            )
        )
        return frame.method.queue, frame.method.message_count

    async def declare_exchange(self, exchange: DeclareExchange, *, passive: bool = False) -> None:
        """Make the exchange, or (``passive``) look for it."""
        await self._call(
            lambda answer: self._channel.exchange_declare(
                exchange.name,
                exchange.kind,
                passive=passive,
                durable=True,
                arguments=dict(exchange.arguments),
                callback=answer,
            )
        )

    async def bind(self, binding: BindQueue | BindExchange) -> None:
        """Make the binding, if it is not there."""
        if isinstance(binding, BindQueue):
            await self._call(
                lambda answer: self._channel.queue_bind(
                    binding.queue, binding.exchange, binding.routing_key, callback=answer
                )
            )
        else:
            await self._call(
                lambda answer: self._channel.exchange_bind(
                    binding.destination, binding.source, binding.routing_key, callback=answer
                )
            )

    async def purge(self, queue: str) -> int:
        """Delete what is ready in the queue at the server, and return how many there were."""
        frame = await self._call(lambda answer: self._channel.queue_purge(queue, callback=answer))
        count: int = frame.method.message_count
        return count

    async def set_prefetch(self, count: int) -> None:
        """What is consumed from now on is pushed until ``count`` of it are not acknowledged."""
        await self._call(lambda answer: self._channel.basic_qos(prefetch_count=count, callback=answer))

    async def consume(self, queue: str, tag: str, deliver: Deliver, *, no_ack: bool = False) -> None:
        """Have the messages of the queue pushed, to ``deliver``."""
        self._consumers[tag.encode()] = deliver
        await self._call(
            lambda answer: self._channel.basic_consume(
                queue, _never_called, auto_ack=no_ack, consumer_tag=tag, callback=answer
            )
        )

    async def cancel(self, tag: str) -> None:
        """Have no more pushed; what comes until this returns is delivered still."""
        if self.error is None and tag.encode() not in self._consumers:
            return  # the server has ended it, and pika would not answer
        await self._call(lambda answer: self._channel.basic_cancel(tag, callback=answer))
        self._consumers.pop(tag.encode(), None)

    async def confirm(self) -> None:
        """Have the server answer each publish, at ``on_confirm``."""
        await self._call(lambda answer: self._channel.confirm_delivery(_never_called, callback=answer))

    def get(self, queue: str) -> Reply[Got | None]:
        """The next message of the queue; None where there is none. Several may be on their way."""
        reply: Reply[Got | None] = Reply()
        if self._await_answer(reply):
            self._gets.append(reply)
            self.write((frames.get(self.number, queue.encode()),))
        return reply

    def barrier(self, before: Iterable[bytes] = ()) -> Reply[None]:
        """Send frames; answered when the server has carried them out, and all that was sent before."""
        reply: Reply[None] = Reply()
        if self._await_answer(reply):
            self._barriers.append(reply)
            self.write((*before, frames.barrier(self.number)))
        return reply

    def write(self, data: Iterable[bytes]) -> None:
        """Send frames of this channel. Raises what it was closed for."""
        if self.error is not None:
            raise self.error
        self._wire.write(data)

    @property
    def frame_max(self) -> int:
        """The largest frame, in bytes."""
        return self._wire.frame_max

    async def close(self) -> None:
        """Close it; what was delivered on it and not acknowledged goes back."""
        if self.error is None and self._channel.is_open and not self._wire.is_lost:
            closed: Reply[None] = Reply()
            self._channel.add_on_close_callback(lambda _channel, _reason: closed.set(None))
            self._channel.close()
            await closed

    def _call(self, send: Callable[[Callable[[Any], None]], object]) -> Reply[Any]:
        reply: Reply[Any] = Reply()
        if self._await_answer(reply):
            send(reply.set)
        return reply

    def _await_answer(self, reply: Reply[Any]) -> bool:
        """Fail the call when the channel closes; False: it is closed already."""
        if self.error is not None or not self._channel.is_open:
            reply.fail(self.error or pika.exceptions.ChannelWrongStateError("the channel is being closed"))
            return False
        self._waiting[reply] = None
        reply.then(lambda: self._waiting.pop(reply, None))
        return True

    # From the wire.

    def content(self, method: int, arguments: bytes, properties: bytes, body: bytes) -> None:
        """See ``wire.Reader``."""
        try:
            self._content(method, arguments, properties, body)
        except Exception as error:  # noqa: BLE001 - whatever a message does, it does to its channel
            self.break_off(error, doing="taking a message")

    def _content(self, method: int, arguments: bytes, properties: bytes, body: bytes) -> None:
        if method == frames.BASIC_DELIVER:
            tag, number, redelivered = frames.delivered(arguments)
            deliver = self._consumers.get(tag)
            if deliver is None:
                raise UnexpectedDelivery(f"the server delivers to a consumer that there is not: {tag!r}")
            deliver(number, redelivered, properties, body)
        elif method == frames.BASIC_GET_OK:
            number, redelivered = frames.got(arguments)
            self._gets.popleft().set(Got(number, redelivered, properties, body))
        elif self.on_returned is not None:
            code, exchange, routing_key = frames.returned(arguments)
            self.on_returned(code, exchange, routing_key, properties)

    def confirm_arrived(self, method: int, arguments: bytes) -> None:
        """See ``wire.Reader``."""
        if self.on_confirm is not None:
            try:
                number, multiple = frames.confirmed(arguments)
                self.on_confirm(number, multiple, method == frames.BASIC_ACK)
            except Exception as error:  # noqa: BLE001 - as above
                self.break_off(error, doing="taking a confirmation")

    def burst_ended(self) -> None:
        """See ``wire.Reader``."""
        if self.on_burst is not None:
            try:
                self.on_burst()
            except Exception as error:  # noqa: BLE001 - as above
                self.break_off(error, doing="telling what has come")

    def break_off(self, error: Exception, *, doing: str) -> None:
        """Close the channel because of an error on our side: what was delivered on it goes back."""
        reason = error
        if isinstance(error, pika.exceptions.AMQPError):
            logger.warning("a channel is closed, and what it held goes back: %s: %r", doing, error)
        else:
            self.connection.io.survived(error, doing=doing)
            reason = BrokenOff(f"{doing}: {error!r}")
        if self.error is None:
            self._closed(self._channel, reason)
            if not (self._wire.is_lost or self._channel.is_closing or self._channel.is_closed):
                self._channel.close()

    def _nothing_got(self, _frame: Any) -> None:
        if self._gets:
            self._gets.popleft().set(None)

    def _barrier_passed(self, _frame: Any) -> None:
        if self._barriers:
            self._barriers.popleft().set(None)

    def _cancelled(self, frame: Any) -> None:
        """The server ends a consumer: its queue was deleted, or moved, or (4.3) it held something for too long."""
        tag = frame.method.consumer_tag.encode()
        if self._consumers.pop(tag, None) is None:
            return
        if self.on_cancelled is not None:
            self.on_cancelled(tag)
        else:
            self.break_off(pika.exceptions.ConsumerCancelled(frame), doing="consuming")

    def _closed(self, _channel: Any, reason: BaseException) -> None:
        if self.error is not None:
            return
        self.error = reason
        if self._wire.readers.get(self.number) is self:
            del self._wire.readers[self.number]
        if self.on_closed is not None:
            self.on_closed(reason)  # first, so that whoever waits for an answer finds it done
        for reply in list(self._waiting):
            reply.fail(reason)


def _never_called(*_arguments: object) -> None:
    """pika asks for callbacks of what ``wire`` brings to us itself."""
