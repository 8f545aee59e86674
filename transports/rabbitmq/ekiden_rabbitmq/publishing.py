"""Publishing: batches of messages, each answered when the server has stored it.

A caller's thread encodes its messages into Parcels, hands the batch to the I/O thread, and waits until every parcel is
answered or the deadline is over. On the I/O thread a batch goes this way, in one or two rounds:

    declare    each queue (band) and delay level that is not known on this connection; a new band is announced
    write      all of it in one write, on one channel in confirm mode; each publish has the next number there
    answers    a confirm for a number, or for all up to it: stored, or (a nack) not. A nack of a broadcast is no error:
               servers from 4.3 on answer so when the queue of one listener is just being deleted
               a returned message, before its confirm: its queue is gone. It is declared again, and published once more
               the channel is closed: one of the unanswered is refused, the server does not say which. They are
               published again one by one, each waited for: nobody pays for another's fault, some may be stored twice
               the connection is lost: nobody knows; the unanswered have failed

Every parcel is answered exactly once, with None (stored) or an error. The deadline answers what is left: it does not
take back what was written.

**What harms others is not sent.** The server ends a whole connection for a frame that is too large, so that is refused
before. Where our own code fails with a parcel, the others of its batch are published without it.

**Callers that are interrupted** (an exception out of a signal handler) leave their parcels on the way. A caller that
publishes the same messages next, as the next one in a group commit does, waits for the same parcels: nothing is stored
twice.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence

import msgspec
import pika.exceptions
from ekiden.errors import BrokerRefused, TransportError
from ekiden.message import DEFAULT_PRIORITY, Message, unsendable

from ekiden_rabbitmq import encoding, frames, refusals
from ekiden_rabbitmq.announcements import BandMade, encoded
from ekiden_rabbitmq.connection import BROKER_ERRORS, Channel, Connection
from ekiden_rabbitmq.declaring import Declarer, NotAskedFor
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

    __slots__ = ("_batches", "content", "error", "exchange", "is_answered", "is_returned", "properties", "routing_key")

    def __init__(self, content: Content) -> None:
        self.content = content
        self.exchange = b""
        self.routing_key = b""
        self.properties = b""
        self.is_returned = False
        self.is_answered = False
        self.error: Exception | None = None
        self._batches: tuple[Batch, ...] = ()
        if isinstance(content, ToQueue):
            self._encode(content)
        elif type(content.payload) is not bytes:
            self.answer(BrokerRefused(f"A payload is bytes, and not {type(content.payload).__name__}."))

    @property
    def body(self) -> bytes:
        """What is published."""
        return self.content.message.body if isinstance(self.content, ToQueue) else self.content.payload

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
            for batch in self._batches:
                batch.one_less()

    def belongs_to(self, batch: Batch) -> None:
        """Tell ``batch`` of the answer."""
        self._batches = (*self._batches, batch)

    def fits(self, frame_max: int) -> bool:
        """Whether frames of so many bytes carry it; answers it where they do not."""
        content = self.content
        if not isinstance(content, ToQueue):
            return True
        message, is_copy = content.message, content.delay is not None
        reason = encoding.too_large(message, self.properties, frame_max, is_copy=is_copy)
        if reason is not None:
            self.answer(BrokerRefused(f"{encoding.in_words(message)}: {reason}."))
        return reason is None

    def _encode(self, content: ToQueue) -> None:
        message = content.message
        try:
            reason = unsendable(message)
            if reason is None and message.due is not None and not math.isfinite(message.due):
                reason = f"it is due at {message.due}, which is no time"
            if reason is not None:
                raise BrokerRefused(f"{encoding.in_words(message)}: {reason}.")
            self.properties = encoding.encode(message, hand_outs=content.hand_outs)
        except BrokerRefused as error:
            self.answer(error)
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            # Of a Message whose fields are of other types than it says.
            self.answer(BrokerRefused(f"{encoding.in_words(message)} cannot be sent: {error}."))


class Batch:
    """Parcels that one caller waits for; those of ``adopted`` are on their way already, for a caller who has left."""

    def __init__(self, parcels: Sequence[Parcel], adopted: Sequence[Parcel] = ()) -> None:
        self.parcels = parcels
        self.done: Reply[None] = Reply()
        self.is_begun = False
        self._adopted = adopted
        self._left = len(adopted)
        self._finished = threading.Lock()
        self._finished.acquire()
        for parcel in parcels:
            if not parcel.is_answered:
                parcel.belongs_to(self)
                self._left += 1
        self.is_done = not self._left

    def begin(self) -> bool:
        """On the I/O thread, before all else there; False when it has begun already."""
        if self.is_begun:
            return False
        self.is_begun = True
        for parcel in self._adopted:
            parcel.belongs_to(self)
            if parcel.is_answered:
                self.one_less()
        return True

    def wait(self, seconds: float) -> bool:
        """In the caller's thread: whether all was answered in time."""
        return self._finished.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def all(self) -> list[Parcel]:
        """Also those that are on their way already."""
        return [*self.parcels, *self._adopted]

    @property
    def is_answered(self) -> bool:
        """Whether it is known of each what became of it."""
        return not self._left or all(parcel.is_answered for parcel in self.all())

    def unanswered(self) -> list[Parcel]:
        """Those that are to be published, and wait for an answer."""
        return [parcel for parcel in self.parcels if not parcel.is_answered]

    def answer_all(self, error: Exception) -> None:
        """Give up on what is unanswered."""
        for parcel in self.all():
            parcel.answer(error)

    def one_less(self) -> None:
        """One of the parcels was answered."""
        self._left -= 1
        if not self._left:
            self.is_done = True
            self._finished.release()
            self.done.set(None)

    def abandon(self) -> None:
        """The I/O thread has failed: its caller waits no more, and nothing else goes on."""
        if not self.is_done:
            self.is_done = True
            self._finished.release()


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
        channel = self._channel
        frame_max = channel.frame_max
        small = encoding.always_carried(frame_max)
        sending = [parcel for parcel in parcels if len(parcel.properties) <= small or parcel.fits(frame_max)]
        written = _Round(sending)
        if not sending:
            return written
        data: list[bytes] = []
        for parcel in sending:
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
                frame_max=frame_max,
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
        if number not in self._unconfirmed:
            return  # nothing was published under it, or its answer has come
        parcel, written = self._unconfirmed.pop(number)
        if not stored and parcel.must_arrive:
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
        self._left_behind: dict[tuple[str, str], tuple[float, Parcel]] = {}

    def publish(self, parcels: Sequence[Parcel], *, deadline: float | None = None) -> list[Exception | None]:
        """Publish them; returns for each, in their order, None (stored) or why it is not.

        ``deadline`` (on the monotonic clock): if they are to be answered sooner than others. Raises TransportClosed,
        and TransportCrashed when the I/O thread fails meanwhile.
        """
        self._io.check()
        adopted = self._adopt(parcels) if self._left_behind else None
        if adopted:
            batch = Batch([each for each in parcels if each not in adopted], [*adopted.values()])
        else:
            batch = Batch(parcels)
        seconds = self._options.timeout
        if deadline is not None:
            seconds = min(seconds, max(0.0, deadline - time.monotonic()))
        try:
            if not batch.is_done:
                self._publish_and_wait(batch, seconds)
            if adopted:
                return [adopted.get(parcel, parcel).error for parcel in parcels]
            return [parcel.error for parcel in parcels]
        except TransportError:
            raise
        except BaseException:  # out of a signal handler
            self._leave_behind(batch)
            self._io.post(lambda: self.begin(batch, seconds))  # if it was not posted, it is now
            raise

    def _publish_and_wait(self, batch: Batch, seconds: float) -> None:
        def crashed(_crash: TransportError) -> None:
            batch.abandon()

        self._io.at_crash(crashed)
        try:
            self._io.check()  # after it was said what to do then
            self._io.post(lambda: self.begin(batch, seconds))
            if not batch.wait(seconds + ANSWERS_LATE_SECONDS):
                self._io.check()
                batch.answer_all(refusals.too_late(self._server, seconds, doing="publishing"))
            elif not batch.is_answered:
                self._io.check()
        finally:
            self._io.not_at_crash(crashed)

    def _leave_behind(self, batch: Batch) -> None:
        now = time.monotonic()
        for key, (left_at, _) in list(self._left_behind.items()):
            if left_at < now - self._options.timeout:
                del self._left_behind[key]
        for parcel in batch.all():
            if isinstance(parcel.content, ToQueue):
                message = parcel.content.message
                self._left_behind[message.queue, message.id] = now, parcel

    def _adopt(self, parcels: Sequence[Parcel]) -> dict[Parcel, Parcel]:
        """By parcel of a caller: the one that is on its way with the same message."""
        adopted = {}
        for parcel in parcels:
            if isinstance(parcel.content, ToQueue) and not parcel.is_answered:
                message = parcel.content.message
                _, on_its_way = self._left_behind.pop((message.queue, message.id), (0.0, None))
                if on_its_way is not None and on_its_way.content == parcel.content:
                    adopted[parcel] = on_its_way
        return adopted

    def begin(self, batch: Batch, seconds: float | None = None) -> None:
        """Publish a batch; ``batch.done`` tells when each of its parcels is answered.

        ``seconds``: if they are to be answered sooner than others.
        """
        if not batch.begin():
            return
        patience = self._options.timeout if seconds is None else seconds
        self._io.spawn(self._publish(batch))
        if not batch.is_done:
            timer = self._io.call_later(patience, lambda: batch.answer_all(self._late(patience)))
            batch.done.then(lambda: self._io.cancel(timer))

    async def _publish(self, batch: Batch) -> None:
        try:
            await self._publish_in_rounds(batch.unanswered())
        except Exception as error:  # noqa: BLE001 - a bug of ours, with one of them
            self._io.survived(error, doing="publishing")
            await self._publish_apart(batch.unanswered())

    async def _publish_apart(self, parcels: Sequence[Parcel]) -> None:
        """Our own code has failed with one of them: with which, shows when each is published by itself."""
        for parcel in parcels:
            try:
                await self._publish_in_rounds([parcel])
            except Exception as error:  # noqa: BLE001 - told of the batch, and to the caller
                parcel.answer(BrokerRefused(f"{self._server}: {_doing(parcel)}: it cannot be published: {error!r}."))

    async def _publish_in_rounds(self, parcels: Sequence[Parcel]) -> None:
        try:
            for _ in range(ROUNDS):
                await self._publish_round([parcel for parcel in parcels if not parcel.is_answered])
                if all(parcel.is_answered for parcel in parcels):
                    return
        except BROKER_ERRORS as error:
            told = self._told(error, doing="publishing")
            for parcel in parcels:
                parcel.answer(told)
            return
        for parcel in parcels:
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
                    except (pika.exceptions.ChannelClosedByBroker, NotAskedFor) as error:
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
                    parcel.properties = encoding.encode(message, hand_outs=content.hand_outs, lap=True)
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
