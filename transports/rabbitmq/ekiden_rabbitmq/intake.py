"""Keeps the server pushing to one consumer, and sends back what is not wanted. On the I/O thread.

One coroutine, ``_serve``, does everything that takes several steps, one after the other; it is woken by a bell:

    open       a channel for this consumer alone. Closing it gives back what is held on it
    recount    the server tells of some redeliveries only that they are ones (classic queues): publish a copy that
               counts, acknowledge the original; the copy comes like any other message. The same for another program's
               message without an id, which gets one
    lap        a delay longer than all levels: publish the message again for the rest of its time
    rest       nobody receives, or far less than before: cancel the subscriptions, and send back what is parked, so that
               others may have it
    adjust     subscribe (again), see ``subscribing``
    verify     (strict order) make sure that nothing more urgent is at the server or on its way

What goes back without having been received is published as a copy, confirmed, and then acknowledged: the server would
count a hand-out otherwise. Never the other way round: then a crash in between would lose it. While the server takes no
copies, nothing goes back before the end; then it does by closing the channel, counted.

What can be published no more (a copy is larger than the server takes now) goes back as it is, and counted; where it is
to wait, it waits here, *set aside*, without taking the room of others.

Deliveries belong to the channel that they came on. When it is lost they are another's, and are never named to the
server again, which would close the next channel for it. So are those of a subscription that the server has ended (4.3
does when one was held for longer than its consumer_timeout); the others on the channel are not harmed by it.

The fields without an underscore are shared with the thread that receives, under the consumer's lock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence

from ekiden.errors import BrokerRefused
from ekiden.locks import Flag
from ekiden.loggers import safe_logger

from ekiden_rabbitmq import encoding, frames
from ekiden_rabbitmq.announcements import LOOK_AGAIN_SECONDS, Bands
from ekiden_rabbitmq.connection import BROKER_ERRORS, Channel, Connection
from ekiden_rabbitmq.declaring import Declarer
from ekiden_rabbitmq.io_thread import Bell, IOThread, Reply
from ekiden_rabbitmq.publishing import Batch, Parcel, Publisher, ToQueue
from ekiden_rabbitmq.sources import Arrival, Sources, State
from ekiden_rabbitmq.subscribing import SUBSCRIBED_AGAIN_AFTER_SECONDS, Subscriptions
from ekiden_rabbitmq.topology import is_temporary

logger = safe_logger("ekiden_rabbitmq")

REST_AFTER_SECONDS = 0.2
"""After so long without anybody receiving, what is parked goes back."""

SHRINK_AFTER_SECONDS = 1.0
PARKED_TOO_MUCH = 4
"""So does what is parked when it was so many times what was asked for, for so long."""

ADJUST_AGAIN_SECONDS = 0.02
"""Credits are not changed more often than this while messages come."""

PAUSE_SECONDS = 0.5
"""Between attempts, while the server refuses."""

TAKES_COPIES_WITHIN_SECONDS = 3.0

SET_ASIDE_AT_MOST, SET_ASIDE_SECONDS_AT_MOST = 100, 60.0
TEMPORARY_WINDOW = 64
"""The queues of one process alone: what is parked keeps nobody waiting."""


class Intake:
    """One consumer's half on the I/O thread."""

    def __init__(
        self,
        io: IOThread,
        connection: Connection,
        declarer: Declarer,
        bands: Bands,
        publisher: Publisher,
        *,
        sources: Sources,
        prefix: str,
        prefetch: int,
        lock: threading.RLock,
    ) -> None:
        self.sources = sources
        self.channel: Channel | None = None
        self.held = 0
        self.error: BaseException | None = None
        self.receiving = 0
        self.left_at = 0.0
        self.demand = 0
        self.peak_demand = 0
        self.stopped = False
        self.is_steady = False
        self.call = 0
        self.verified = 0
        self.rest_timer: object | None = None
        self.is_closing = False
        self._io = io
        self._connection = connection
        self._declarer = declarer
        self._bands = bands
        self._publisher = publisher
        self._lock = lock
        self.called = Flag()  # who receives is to look
        self._subscriptions = Subscriptions(
            io,
            declarer,
            bands,
            sources=sources,
            prefix=prefix,
            prefetch=prefetch,
            lock=lock,
            arrived=self._arrived,
            missing=self._look_for_missing,
        )
        self._temporary = any(map(is_temporary, sources.by_queue))
        self._counters: tuple[str, ...] = ()
        self._bell = Bell()
        self._subscribed = False
        self._adjust_asked = False
        self._verify_wanted = 0
        self._missing = False
        self._rests_asked: list[Reply[None]] = []
        self._drop_asked = False
        self._drops = False
        self._closed: Reply[None] = Reply()
        self._outstanding: dict[int, Arrival | None] = {}  # None: taken back by the server
        self._set_aside: set[Arrival] = set()
        self._uncounted: list[Arrival] = []
        self._laps: list[tuple[Arrival, ToQueue]] = []
        self._adjust_timer: object | None = None
        self._parks_too_much = False
        self._peak_since = 0.0

    # Called for the consumer, by posting to the I/O thread.

    async def open(self) -> None:
        """Make the queues, and begin to serve."""
        for queue in self.sources.by_queue:
            await self._declarer.queue(queue)
            await self._bands.of(queue)
        self._connection.add(self)
        self._io.spawn(self._serve())
        self._look_later()
        if self._temporary:
            self.adjust()

    def adjust(self) -> None:
        """Who receives finds too little: look whether the server can push more."""
        self._adjust_asked = True
        self._bell.ring()

    def adjust_soon(self) -> None:
        """The same, when it is convenient: who receives has something for now."""
        if self._adjust_timer is None:
            self._adjust_timer = self._io.call_later(ADJUST_AGAIN_SECONDS, self._adjust_now)

    def verify(self) -> None:
        """Who receives, in this ``call``, has nothing of the first queues: make sure that there is nothing."""
        self._verify_wanted = self.call
        self._bell.ring()

    def rest_later(self) -> None:
        """Nobody receives at this moment."""
        if self.rest_timer is None:
            self.rest_timer = self._io.call_later(REST_AFTER_SECONDS, self._maybe_rest)

    async def rest_unless_receiving(self) -> None:
        """Ask for no more, and send back what is parked, if nobody is waiting for it."""
        if self._subscribed and not self.receiving and not self._temporary:
            await self._rest_soon()

    def stop(self) -> None:
        """``stopped`` was set: ask for no more, and send back what is parked."""
        self._bell.ring()

    async def acknowledge(self, arrivals: Sequence[Arrival]) -> list[bool]:
        """Tell the server that these have ended; of each, whether it was still ours. Returns when the server knows."""
        await self._subscriptions.no_cancelling()
        channel = self.channel
        current = [arrival for arrival in arrivals if arrival.channel is channel and arrival.state is not State.LOST]
        if channel is None or not current:
            return [False] * len(arrivals)
        ending = [arrival for arrival in current if arrival.state is State.ENDING]
        try:
            await channel.barrier(self._acknowledgements(channel, ending))
        except BROKER_ERRORS:
            return [False] * len(arrivals)  # the channel is lost, and it may come again
        for arrival in current:
            arrival.state = State.ENDED
        ended = set(current)
        return [arrival in ended for arrival in arrivals]

    async def put_back(self, arrivals: Sequence[Arrival], delay: float) -> None:
        """Give back, after some seconds, what is ENDING and cannot be published again; the server counts it."""
        channel = self.channel
        if delay <= 0 or len(self._set_aside) + len(arrivals) > SET_ASIDE_AT_MOST:
            await self._put_back_now(arrivals, channel)
            return
        for arrival in arrivals:
            self._set_aside.add(arrival)
            arrival.source.unacked -= 1  # others have its room meanwhile
        self._io.call_later(
            min(delay, SET_ASIDE_SECONDS_AT_MOST), lambda: self._io.spawn(self._put_back_later(arrivals, channel))
        )

    async def _put_back_later(self, arrivals: Sequence[Arrival], channel: Channel | None) -> None:
        for arrival in arrivals:
            self._not_aside(arrival)
        await self._put_back_now(arrivals, channel)

    def _not_aside(self, arrival: Arrival) -> None:
        if arrival in self._set_aside:
            self._set_aside.remove(arrival)
            arrival.source.unacked += 1

    async def _put_back_now(self, arrivals: Sequence[Arrival], channel: Channel | None) -> None:
        await self._subscriptions.no_cancelling()
        if channel is None or channel is not self.channel:
            return  # it went back with its channel
        data = []
        for arrival in arrivals:
            if arrival.state is State.ENDING and self._outstanding.get(arrival.number) is arrival:
                del self._outstanding[arrival.number]
                arrival.state = State.ENDED
                arrival.source.ended(arrival)
                data.append(frames.put_back(channel.number, arrival.number))
        with contextlib.suppress(*BROKER_ERRORS):  # then it goes back with its channel
            channel.write(data)

    async def make_sure(self, *, unless_heard_within: float = 0.0) -> None:
        """Return when the server has answered on the channel; what is held is held then, or the channel is lost.

        A process that was stopped for long and wakes up may not have noticed yet that its connection is gone. If
        something came within so many seconds, it is not.
        """
        heard_at = self._connection.wire.heard_at if self._connection.is_open else 0.0
        if self.channel is not None and heard_at < time.monotonic() - unless_heard_within:
            with contextlib.suppress(*BROKER_ERRORS):  # lost: whatever was held is not any more
                await self.channel.barrier()

    def lap(self, arrival: Arrival, again: ToQueue) -> None:
        """It is not due: publish it for the rest of its time."""
        self._laps.append((arrival, again))
        self._bell.ring()

    def give_up_what_is_held(self) -> None:
        """Another consumer has this name now."""
        self._drop_asked = True
        self._bell.ring()

    def look_again(self) -> None:
        """There may be new sources."""
        if self._subscribed:
            self.adjust()

    def band_made(self, queue: str) -> None:
        """There is a new source, perhaps."""
        if queue in self.sources.by_queue and self._subscribed:
            self.adjust()

    async def close(self) -> None:
        """Give everything back, and end."""
        self.abandon()
        await self._closed

    def abandon(self) -> None:
        """The same, without waiting for it."""
        self.is_closing = True
        self._bell.ring()

    # Called by the connection.

    def connection_opened(self) -> None:
        """See ``connection.Member``."""
        self._bell.ring()

    def connection_lost(self, error: BaseException) -> None:
        """See ``connection.Member``."""
        self.error = error
        self._bell.ring()
        self._wake()

    # Called by the thread that receives.

    def decode(self, arrival: Arrival) -> encoding.Arrived:
        """The message of a delivery."""
        source = arrival.source
        arrived = encoding.decode(
            arrival.properties, arrival.body, source.queue, priority=source.priority, counters=self._counters
        )
        return arrived.once_more() if arrival.uncounted else arrived

    # Serving.

    async def _serve(self) -> None:
        while not self.is_closing:
            await self._bell.wait()
            rests, self._rests_asked = self._rests_asked, []
            try:
                if self._connection.is_open:
                    await self._do_what_is_due(rest=bool(rests))
                    self.error = None
            except BROKER_ERRORS as error:
                self.error = error
                if self._connection.is_open:
                    self._io.call_later(PAUSE_SECONDS, self._bell.ring)
            except Exception as error:  # noqa: BLE001 - a bug of ours: what is here goes back, and it begins anew
                if self.channel is not None:
                    self.channel.break_off(error, doing="consuming")
                else:
                    self._io.survived(error, doing="consuming")
                self._io.call_later(PAUSE_SECONDS, self._bell.ring)
            for rest in rests:
                rest.set(None)
            self._wake()
        await self._end()

    async def _do_what_is_due(self, *, rest: bool) -> None:
        if self._drop_asked:
            self._drop_asked = False
            await self._drop()
        if self.is_closing:
            return
        channel = await self._open_channel()
        await self._recount()
        await self._send_on_their_lap()
        if self.stopped or (rest and (self._parks_too_much or not self.receiving)):
            await self._rest(channel)
        elif self.receiving or self._temporary or self._subscribed:
            if self._adjust_asked or not self._subscribed:
                self._adjust_asked = False
                await self._adjust(channel)
            if self._verify_wanted != self.verified:
                wanted = self._verify_wanted
                await self._subscriptions.verify(channel)
                self.verified = wanted
            if self._missing:
                self._missing = False
                await self._subscriptions.look_for_missing()
        self._find_out_whether_steady()

    async def _adjust(self, channel: Channel) -> None:
        demand = max(self.demand, TEMPORARY_WINDOW) if self._temporary else self.demand
        try:
            await self._subscriptions.adjust(channel, demand)
        except BROKER_ERRORS:
            self._adjust_asked = True
            raise
        self._subscribed = True

    async def _open_channel(self) -> Channel:
        if self.channel is None or not self.channel.is_open:
            server = await self._connection.opened()
            self._counters = server.differences.hand_out_counters
            channel = await self._connection.channel()
            channel.on_closed = lambda error: self._channel_closed(channel, error)
            channel.on_cancelled = self._cancelled_by_server
            channel.on_burst = self._burst_ended
            self.channel = channel
        return self.channel

    def _channel_closed(self, channel: Channel, error: BaseException) -> None:
        """Nothing that came on this channel is ours any more."""
        if channel is not self.channel:
            return
        if not self.is_closing and self._connection.is_open and not self._drops:
            logger.warning("lost the channel of a consumer, and what it held: %s", error)
        self.error = error
        with self._lock:
            self.channel = None
            self.held = 0
            self._subscriptions.lost()
        self._outstanding.clear()
        self._set_aside.clear()
        self._uncounted.clear()
        self._laps.clear()
        self._subscribed = self.is_steady = False
        self._bell.ring()
        self._wake()

    def _cancelled_by_server(self, tag: bytes) -> None:
        """Nothing that came of this subscription is ours any more.

        None of it is named to the server again: 4.3 would push to the subscription that it has ended.
        """
        name, held = tag.decode(), 0
        with self._lock:
            for number, arrival in list(self._outstanding.items()):
                if arrival is not None and arrival.subscription.tag == name:
                    self._outstanding[number] = None
                    self._not_aside(arrival)
                    arrival.source.ended(arrival)
                    held += arrival.state is State.HELD
                    arrival.state = State.LOST
            self.held -= held
            for source in self.sources.all():
                parked = [arrival for arrival in source.parked if arrival.state is not State.LOST]
                source.parked.clear()
                source.parked.extend(parked)
        if held:
            logger.warning(
                "the server has taken back %d messages that were held: a queue was deleted or moved, or they were held "
                "for longer than the server's consumer_timeout",
                held,
            )
        self._uncounted = [arrival for arrival in self._uncounted if arrival.state is not State.LOST]
        self._laps = [(arrival, again) for arrival, again in self._laps if arrival.state is not State.LOST]
        self._subscriptions.cancelled_by_server(name)
        self._io.call_later(SUBSCRIBED_AGAIN_AFTER_SECONDS, self.look_again)

    # Arriving.

    def _arrived(self, arrival: Arrival) -> None:
        self._outstanding[arrival.number] = arrival
        arrival.source.arrived(arrival)
        if arrival.redelivered and self._needs_a_copy(self.decode(arrival)):
            self._uncounted.append(arrival)
            self._bell.ring()
        else:
            arrival.source.parked.append(arrival)

    def _needs_a_copy(self, again: encoding.Arrived) -> bool:
        """Whether a redelivery of it tells less than is to be known: how many there were, or that it is the same."""
        return not again.counted or again.nameless

    def _burst_ended(self) -> None:
        if not self.is_steady:
            self._find_out_whether_steady()
        self._wake()

    def _find_out_whether_steady(self) -> None:
        self.is_steady = self._subscribed and not self._adjust_asked and not self._subscriptions.is_settling_in

    def _wake(self) -> None:
        self.called.set()

    def _look_for_missing(self) -> None:
        self._missing = True
        self._bell.ring()

    # Going back.

    async def _rest(self, channel: Channel) -> None:
        """Ask for no more, and send back what is parked."""
        self._subscribed = self.is_steady = self._parks_too_much = False
        await self._subscriptions.cancel(channel)
        parked: list[Arrival] = []
        with self._lock:
            for source in self.sources.all():
                parked += source.parked
                source.parked.clear()
        copies = [(arrival, self._copy(arrival)) for arrival in parked]
        kept = await self._replace(copies)
        refused = [arrival for arrival, parcel in copies if isinstance(parcel.error, BrokerRefused)]
        with self._lock:
            for arrival in reversed(kept):
                if self._is_ours(arrival):
                    if arrival in refused:
                        arrival.state = State.ENDING
                    else:
                        arrival.source.parked.appendleft(arrival)
        await self._put_back_now(refused, channel)

    async def _recount(self) -> None:
        uncounted, self._uncounted = self._uncounted, []
        if not uncounted:
            return
        for arrival in uncounted:
            arrival.uncounted = not self.decode(arrival).counted
        kept = await self._replace([(arrival, self._copy(arrival)) for arrival in uncounted])
        for arrival in kept:  # it was handed out before once at least; who receives it must not wait for the server
            if self._is_ours(arrival):
                arrival.source.parked.append(arrival)
        for arrival in uncounted:
            subscription = arrival.source.subscription
            if subscription is not None and arrival not in kept:  # its copy may come to us
                subscription.expects = max(subscription.expects, subscription.arrived) + 1
        self._subscriptions.expect_soon()

    async def _send_on_their_lap(self) -> None:
        laps, self._laps = self._laps, []
        if not laps:
            return
        copies = [(arrival, Parcel(again)) for arrival, again in laps]
        kept = await self._replace(copies)
        refused = [arrival for arrival, parcel in copies if isinstance(parcel.error, BrokerRefused)]
        if refused:
            await self.put_back(refused, SET_ASIDE_SECONDS_AT_MOST)
        again = [(arrival, again) for arrival, again in laps if arrival in kept and arrival not in refused]
        self._laps += [(arrival, lap) for arrival, lap in again if self._is_ours(arrival)]
        if again:
            self._io.call_later(PAUSE_SECONDS, self._bell.ring)

    def _is_ours(self, arrival: Arrival) -> bool:
        return arrival.channel is self.channel and arrival.state is not State.LOST

    def _copy(self, arrival: Arrival) -> Parcel:
        arrived = self.decode(arrival)
        return Parcel(ToQueue(arrived.message, arrived.earlier, delay=None if arrived.lap else 0.0))

    async def _replace(self, copies: Sequence[tuple[Arrival, Parcel]]) -> list[Arrival]:
        """Publish copies and acknowledge the originals; returns those of which no copy could be stored.

        Of a copy that the server will never take, the parcel's error is BrokerRefused.
        """
        channel = self.channel
        if not copies or channel is None:
            return []
        batch = Batch([parcel for _, parcel in copies])
        if not batch.is_done:
            self._publisher.begin(batch)
            try:
                await self._io.within(TAKES_COPIES_WITHIN_SECONDS, batch.done)
            except TimeoutError:
                logger.warning("the server takes no messages, so what was not received cannot go back")
        for arrival, parcel in copies:
            if isinstance(parcel.error, BrokerRefused):
                logger.error("%s: a message goes back as it is: %s", arrival.source.name, parcel.error)
        stored = [arrival for arrival, parcel in copies if parcel.is_stored]
        await channel.barrier(self._acknowledgements(channel, stored))
        return [arrival for arrival, parcel in copies if not parcel.is_stored]

    async def _drop(self) -> None:
        """Give back what is parked, without counting it, and then what is held, by closing the channel."""
        channel = self.channel
        if channel is not None:
            self._drops = True
            await self._rest(channel)
            await channel.close()
            self._drops = False

    async def _end(self) -> None:
        try:
            if self._connection.is_open:
                await self._drop()
        except BROKER_ERRORS as error:
            logger.debug("a consumer ended without a word to the server: %s", error)
        except Exception as error:  # noqa: BLE001 - a bug of ours: it ends all the same
            if self.channel is not None:
                self.channel.break_off(error, doing="ending a consumer")
        finally:
            self._connection.discard(self)
            self._closed.set(None)

    def _acknowledgements(self, channel: Channel, arrivals: Sequence[Arrival]) -> list[bytes]:
        """The frames that end these, and no other: one for all before the first that stays, one for each behind it."""
        ending = {
            arrival.number: arrival
            for arrival in arrivals
            if arrival.channel is channel and arrival.state is not State.LOST
        }
        up_to = 0
        for number in self._outstanding:
            if number not in ending:
                break
            up_to = number
        for number, arrival in ending.items():
            del self._outstanding[number]
            arrival.state = State.SENT
            arrival.source.ended(arrival)
        data = [frames.ack(channel.number, up_to, multiple=True)] if up_to else []
        return data + [frames.ack(channel.number, number) for number in ending if number > up_to]

    # Timers.

    def _adjust_now(self) -> None:
        self._adjust_timer = None
        if self._subscribed and self._subscriptions.is_short:
            self.adjust()

    def _maybe_rest(self) -> None:
        self.rest_timer = None
        if self._temporary or not self._subscribed:
            return
        now = time.monotonic()
        if now - self._peak_since > SHRINK_AFTER_SECONDS:
            parked = sum(len(source.parked) for source in self.sources.all())
            self._parks_too_much = parked > PARKED_TOO_MUCH * max(self.peak_demand, 1)
            self.peak_demand, self._peak_since = 0, now
        idle = 0.0 if self.receiving else now - self.left_at
        if idle >= REST_AFTER_SECONDS or self._parks_too_much:
            self._io.spawn(self._rest_soon())
        elif not self.receiving:
            self.rest_timer = self._io.call_later(REST_AFTER_SECONDS - idle, self._maybe_rest)

    async def _rest_soon(self) -> None:
        asked: Reply[None] = Reply()
        self._rests_asked.append(asked)
        self._bell.ring()
        await asked

    def _look_later(self) -> None:
        if not self.is_closing:
            self._io.call_later(LOOK_AGAIN_SECONDS, self._look_again)

    def _look_again(self) -> None:
        self.look_again()
        self._look_later()
