"""Publishing: batches of messages, each answered when the server has stored it.

A caller's thread encodes its messages into Parcels, hands the batch to the I/O thread, and waits until every parcel is
answered or the deadline is over. On the I/O thread a batch goes this way, in one or two rounds:

    declare    each queue (band) and delay level that is not known on this connection; a new band is announced
    write      all of it in one write, on one channel in confirm mode; each publish has the next number there
    answers    a confirm for a number, or for all up to it: stored, or (a nack) not
               a returned message, before its confirm: its queue is gone. It is declared again, and published once more
               the channel is closed: one of the unanswered is refused, the server does not say which. They are
               published again one by one, each waited for: nobody pays for another's fault, some may be stored twice
               the connection is lost: nobody knows; the unanswered have failed

Every parcel is answered exactly once, with None (stored) or an error. The deadline answers what is left: it does not
take back what was written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import msgspec
import pika.exceptions
from ekiden.errors import BrokerRefused, TransportError
from ekiden.message import DEFAULT_PRIORITY, Message, unsendable

from ekiden_rabbitmq import frames, refusals
from ekiden_rabbitmq.announcements import BandMade, encoded
from ekiden_rabbitmq.connection import BROKER_ERRORS, Channel, Connection
from ekiden_rabbitmq.declaring import Declarer
from ekiden_rabbitmq.encoding import encode
from ekiden_rabbitmq.io_thread import IOThread, Reply
from ekiden_rabbitmq.options import RabbitMQOptions
from ekiden_rabbitmq.topology import DeclareExchange, is_temporary, queue_name, topic_key

ANSWERS_LATE_SECONDS = 5.0
"""How much later than the deadline a caller stops waiting for the I/O thread, which answers at the deadline."""

ROUNDS = 3
NOT_FOUND = 404


class ToQueue(msgspec.Struct, frozen=True, gc=False):
    """A message for its queue, that has been handed out so often before.

    ``delay``: seconds from now, instead of the message's ``due``.
    """

    message: Message
    hand_outs: int = 0
    delay: float | None = None


class ToTopic(msgspec.Struct, frozen=True):
    """A payload for whoever listens to a topic."""

    topic: str
    payload: bytes


class ToTransports(msgspec.Struct, frozen=True):
    """A payload for every transport of this prefix."""

    payload: bytes


Content = ToQueue | ToTopic | ToTransports


class Parcel:
    """One content on its way, and what became of it. Belongs to the I/O thread once its batch was handed over."""

    __slots__ = ("_batch", "content", "error", "exchange", "is_answered", "is_returned", "properties", "routing_key")

    def __init__(self, content: Content) -> None:
        self.content = content
        self.exchange = b""
        self.routing_key = b""
        self.properties = b""
        self.is_returned = False
        self.is_answered = False
        self.error: Exception | None = None
        self._batch: Batch | None = None
        if isinstance(content, ToQueue):
            self._encode(content)

    @property
    def body(self) -> bytes:
        """What is published."""
        return self.content.message.body if isinstance(self.content, ToQueue) else self.content.payload

    @property
    def message_id(self) -> str:
        """The id of the message; nothing where it is none."""
        return self.content.message.id if isinstance(self.content, ToQueue) else ""

    @property
    def is_stored(self) -> bool:
        """Whether the server has it, as far as is known now."""
        return self.is_answered and self.error is None

    @property
    def must_arrive(self) -> bool:
        """Whether it is an error that it reaches nobody."""
        return isinstance(self.content, ToQueue)

    def answer(self, error: Exception | None) -> None:
        """Stored (None), or why not. The first answer counts."""
        if not self.is_answered:
            self.is_answered = True
            self.error = error
            if self._batch is not None:
                self._batch.one_less()

    def belongs_to(self, batch: Batch) -> None:
        """Tell ``batch`` of the answer."""
        self._batch = batch

    def _encode(self, content: ToQueue) -> None:
        message = content.message
        reason = unsendable(message)
        if reason is not None:
            self.answer(BrokerRefused(f"message {message.id} for queue {message.queue!r}: {reason}."))
            return
        try:
            self.properties = encode(message, hand_outs=content.hand_outs)
        except BrokerRefused as error:
            self.answer(error)


class Batch:
    """Parcels that one caller waits for."""

    def __init__(self, parcels: Sequence[Parcel]) -> None:
        self.parcels = parcels
        self.done: Reply[None] = Reply()
        self._left = 0
        self._finished = threading.Lock()
        self._finished.acquire()
        for parcel in parcels:
            if not parcel.is_answered:
                parcel.belongs_to(self)
                self._left += 1
        self.is_done = not self._left

    def wait(self, seconds: float) -> bool:
        """In the caller's thread: whether all was answered in time."""
        return self._finished.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def unanswered(self) -> list[Parcel]:
        """Those that wait for an answer."""
        return [parcel for parcel in self.parcels if not parcel.is_answered]

    def answer_all(self, error: Exception) -> None:
        """Give up on what is unanswered."""
        for parcel in self.unanswered():
            parcel.answer(error)

    def one_less(self) -> None:
        """One of the parcels was answered."""
        self._left -= 1
        if not self._left:
            self.is_done = True
            self._finished.release()
            self.done.set(None)


class _Round:
    """Parcels that were written together. ``ended`` is set when none of them is on its way any more."""

    __slots__ = ("closed", "ended", "on_the_way", "unanswered")

    def __init__(self, parcels: Sequence[Parcel]) -> None:
        self.on_the_way = len(parcels)
        self.unanswered: list[Parcel] = []
        self.closed: BaseException | None = None
        self.ended: Reply[None] = Reply()
        if not parcels:
            self.ended.set(None)

    def one_less(self) -> None:
        self.on_the_way -= 1
        if not self.on_the_way:
            self.ended.set(None)


class _ConfirmingChannel:
    """A channel whose publishes are numbered and answered."""

    def __init__(self, channel: Channel, server: str) -> None:
        self._channel = channel
        self._server = server
        self._number = 0
        self._unconfirmed: dict[int, tuple[Parcel, _Round]] = {}
        self.was_refused = False
        """Whether the server has answered something that was published on it with a nack."""
        channel.on_confirm = self._confirmed
        channel.on_returned = self._returned
        channel.on_closed = self._closed

    @property
    def is_open(self) -> bool:
        """Whether it can be published on."""
        return self._channel.is_open

    @property
    def is_idle(self) -> bool:
        """Whether everything that was published on it has been answered."""
        return not self._unconfirmed

    async def publish(self, parcels: Sequence[Parcel]) -> _Round:
        """Write ``parcels``, and wait until the server has answered or the channel is gone."""
        written = _Round(parcels)
        data: list[bytes] = []
        channel = self._channel
        for parcel in parcels:
            self._number += 1
            self._unconfirmed[self._number] = (parcel, written)
            parcel.is_returned = False
            data += frames.publish(
                channel.number,
                parcel.exchange,
                parcel.routing_key,
                parcel.properties,
                parcel.body,
                mandatory=parcel.must_arrive,
                frame_max=channel.frame_max,
            )
        channel.write(data)
        await written.ended
        return written

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    def _confirmed(self, number: int, multiple: bool, stored: bool) -> None:
        if not multiple:
            self._answered(number, stored)
            return
        confirmed = []
        for earlier in self._unconfirmed:
            if earlier > number:
                break
            confirmed.append(earlier)
        for earlier in confirmed:
            self._answered(earlier, stored)

    def _answered(self, number: int, stored: bool) -> None:
        parcel, written = self._unconfirmed.pop(number)
        if not stored:
            self.was_refused = True
            parcel.answer(refusals.nacked(self._server, parcel.routing_key.decode()))
        elif not parcel.is_returned:
            parcel.answer(None)
        elif isinstance(parcel.content, ToQueue) and is_temporary(parcel.content.message.queue):
            parcel.answer(None)  # nobody waits for this reply
        written.one_less()

    def _returned(self, _code: int, exchange: bytes, routing_key: bytes, properties: bytes) -> None:
        """It reached no queue; its confirm follows. What is returned has no number, but it is one of the first."""
        for parcel, _ in self._unconfirmed.values():
            if (
                not parcel.is_returned
                and parcel.routing_key == routing_key
                and parcel.properties == properties
                and parcel.exchange == exchange
            ):
                parcel.is_returned = True
                return

    def _closed(self, reason: BaseException) -> None:
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for parcel, written in unconfirmed.values():
            written.closed = reason
            written.unanswered.append(parcel)
            written.one_less()


class Publisher:
    """Publishes over one connection. ``publish`` is for other threads, the rest is for the I/O thread."""

    def __init__(self, io: IOThread, connection: Connection, options: RabbitMQOptions, *, server: str) -> None:
        self._io = io
        self._connection = connection
        self._options = options
        self._server = server
        self._declarer = Declarer(connection, options)
        self._shared: _ConfirmingChannel | None = None
        self._opening: Reply[None] | None = None

    def publish(self, parcels: Sequence[Parcel], *, deadline: float | None = None) -> None:
        """Publish them, and return when each is answered. Raises only when the transport was closed.

        ``deadline`` (on the monotonic clock): if they are to be answered sooner than others.
        """
        self._io.check()
        batch = Batch(parcels)
        if batch.is_done:
            return
        seconds = self._options.timeout
        if deadline is not None:
            seconds = min(seconds, max(0.0, deadline - time.monotonic()))
        self._io.post(lambda: self.begin(batch, seconds))
        if not batch.wait(seconds + ANSWERS_LATE_SECONDS):
            self._io.check()
            batch.answer_all(refusals.too_late(self._server, seconds, doing="publishing"))

    def begin(self, batch: Batch, seconds: float | None = None) -> None:
        """Publish a batch; ``batch.done`` tells when each of its parcels is answered.

        ``seconds``: if they are to be answered sooner than others.
        """
        patience = self._options.timeout if seconds is None else seconds
        self._io.spawn(self._publish(batch))
        if not batch.is_done:
            timer = self._io.call_later(patience, lambda: batch.answer_all(self._late(patience)))
            batch.done.then(lambda: self._io.cancel(timer))

    async def _publish(self, batch: Batch) -> None:
        try:
            for _ in range(ROUNDS):
                await self._publish_round(batch.unanswered())
                if batch.is_done:
                    return
        except BROKER_ERRORS as error:
            batch.answer_all(self._told(error, doing="publishing"))
            return
        for parcel in batch.unanswered():
            parcel.answer(refusals.missing_queue(self._server, parcel.routing_key.decode()))

    def _late(self, seconds: float) -> TransportError:
        if self._connection.blocked is not None:
            return refusals.blocked(self._server, self._connection.blocked, seconds, doing="publishing")
        if not self._connection.is_open and self._connection.error is not None:
            return self._told(self._connection.error, doing="publishing")
        return refusals.too_late(self._server, seconds, doing="publishing")

    def _told(self, error: BaseException, *, doing: str, right: str = "write") -> TransportError:
        return refusals.refusal(error, self._server, doing=doing, right=right)

    async def _publish_round(self, parcels: Sequence[Parcel]) -> None:
        routed = await self._route(parcels)
        largest = (await self._connection.opened()).differences.largest_message
        # The server may take more than its default, and may not: nobody else shall pay for trying.
        alone = [parcel for parcel in routed if len(parcel.body) > largest]
        together = [parcel for parcel in routed if len(parcel.body) <= largest]
        if together:
            alone = [*await self._publish_together(together), *alone]
        if alone:
            await self._publish_one_by_one(alone)
        for parcel in routed:
            if parcel.is_returned and not parcel.is_answered:
                self._declarer.forget(self._queue_name(parcel))

    async def _publish_together(self, parcels: Sequence[Parcel]) -> list[Parcel]:
        """Publish them in one write; returns those of which nothing is known, because the server closed the channel."""
        await self._connection.writable()
        channel = await self._shared_channel()
        waiting = [parcel for parcel in parcels if not parcel.is_answered]  # their deadline is not over
        if not waiting:
            return []
        written = await channel.publish(waiting)
        if written.closed is None:
            if channel.was_refused:
                await self._replace(channel)
            return []
        if self._is_lost(written.closed):
            raise written.closed
        return written.unanswered

    async def _replace(self, channel: _ConfirmingChannel) -> None:
        """Have later batches take another channel, and close this one once nobody waits for its answers.

        A channel that began to publish to a quorum queue while its leader was down refuses everything for that queue
        from then on, also when there is a new leader (3.10).
        """
        if self._shared is channel:
            self._shared = None
        if channel.is_open and channel.is_idle:
            await channel.close()

    async def _publish_one_by_one(self, parcels: Sequence[Parcel]) -> None:
        own: _ConfirmingChannel | None = None
        for parcel in parcels:
            await self._connection.writable()
            if parcel.is_answered:
                continue  # the deadline was over
            if own is None or not own.is_open:
                own = await self._confirming_channel()
            written = await own.publish([parcel])
            if written.closed is not None:
                if self._is_lost(written.closed):
                    raise written.closed
                if getattr(written.closed, "reply_code", 0) == NOT_FOUND and not parcel.is_returned:
                    parcel.is_returned = True  # an exchange was deleted: it is made again
                else:
                    parcel.answer(self._told(written.closed, doing=_doing(parcel)))
        if own is not None:
            await own.close()

    def _is_lost(self, reason: BaseException) -> bool:
        return not isinstance(reason, pika.exceptions.ChannelClosedByBroker)

    # Where to.

    async def _route(self, parcels: Sequence[Parcel]) -> list[Parcel]:
        """Say of each parcel where it is published, once that is there; answers those for which that cannot be."""
        routed: list[Parcel] = []
        failed: dict[tuple[str, int], TransportError] = {}
        for parcel in parcels:
            content = parcel.content
            if isinstance(content, ToQueue):
                message = content.message
                target = (message.queue, message.priority)
                if message.due is None and not content.delay and (known := self._declarer.known(*target)) is not None:
                    parcel.exchange, parcel.routing_key = b"", known.encode()
                    routed.append(parcel)
                    continue
                if target not in failed:
                    try:
                        routed += await self._route_message(parcel, content)
                        continue
                    except pika.exceptions.ChannelClosedByBroker as error:
                        doing = f"declaring the queue {content.message.queue}"
                        failed[target] = self._told(error, doing=doing, right="configure")
                parcel.answer(failed[target])
            else:
                await self._route_broadcast(parcel, content)
                routed.append(parcel)
        return [parcel for parcel in routed if not parcel.is_answered]

    async def _route_message(self, parcel: Parcel, content: ToQueue) -> list[Parcel]:
        message = content.message
        temporary = is_temporary(message.queue)
        routed = []
        if not temporary:
            is_new = await self._declarer.queue(message.queue, message.priority)
            if is_new and message.priority != DEFAULT_PRIORITY:
                announcement = Parcel(ToTransports(encoded(BandMade(message.queue, message.priority))))
                await self._route_broadcast(announcement, announcement.content)
                routed.append(announcement)
        name = self._queue_name(parcel)
        parcel.exchange, parcel.routing_key = b"", name.encode()
        seconds = content.delay
        if seconds is None and message.due is not None:
            seconds = message.due - time.time()
        if seconds is not None and seconds > 0:
            try:
                route = await self._declarer.delay(name, seconds)
            except pika.exceptions.ChannelClosedByBroker as error:
                if error.reply_code != NOT_FOUND:
                    raise
                if temporary:
                    parcel.answer(None)  # nobody waits for this reply
                    return routed
                self._declarer.forget(name)  # deleted since it was known here
                await self._declarer.queue(message.queue, message.priority)
                route = await self._declarer.delay(name, seconds)
            if route is not None:
                parcel.exchange, parcel.routing_key = route.exchange.encode(), route.routing_key.encode()
                if route.further:
                    parcel.properties = encode(message, hand_outs=content.hand_outs, lap=True)
        return [*routed, parcel]

    async def _route_broadcast(self, parcel: Parcel, content: Content) -> None:
        topology = await self._declarer.topology()
        exchange: DeclareExchange = topology.announcements
        if isinstance(content, ToTopic):
            exchange = topology.topics
            parcel.routing_key = topic_key(content.topic).encode()
        await self._declarer.exchange(exchange)
        parcel.exchange = exchange.name.encode()
        parcel.properties = NO_PROPERTIES

    def _queue_name(self, parcel: Parcel) -> str:
        assert isinstance(parcel.content, ToQueue)
        message = parcel.content.message
        priority = DEFAULT_PRIORITY if is_temporary(message.queue) else message.priority
        return queue_name(self._options.prefix, message.queue, priority)

    # Channels.

    async def _shared_channel(self) -> _ConfirmingChannel:
        while self._shared is None or not self._shared.is_open:
            if self._opening is None:
                self._opening = Reply()
                try:
                    self._shared = await self._confirming_channel()
                finally:
                    opening, self._opening = self._opening, None
                    opening.set(None)
            else:
                await self._opening
        return self._shared

    async def _confirming_channel(self) -> _ConfirmingChannel:
        channel = await self._connection.channel()
        confirming = _ConfirmingChannel(channel, self._server)
        await channel.confirm()
        return confirming


NO_PROPERTIES = b"\0\0"


def _doing(parcel: Parcel) -> str:
    if isinstance(parcel.content, ToQueue):
        return f"publishing to the queue {parcel.content.message.queue}"
    return "broadcasting"
