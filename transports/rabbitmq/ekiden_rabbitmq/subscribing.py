"""What one consumer is subscribed to at the server, and with which credits. On the I/O thread.

The *window* is how many deliveries are to be in this process at all: as many as whoever receives asks for, in powers of
two, at most ``prefetch``. ``credit.shares`` divides it among the sources. A credit cannot be changed, so a source gets
another one by cancelling its subscription and making a new one. That is done rarely:

    a source without a subscription gets one
    a full one may have more at the server: it is looked how many, and it gets the room that there is
    one with much more room than its share gives it to others
    one beyond the first may always park one message, or an urgent one would wait behind the room that others take

Where the server ends a subscription it is made again, but not at once: a queue that is just being deleted can still be
seen (4.3, for some 50 ms), and to consume it ends the channel, or even the connection, and with it what others hold.

A subscription *settles in* while what was waiting when it was made has not arrived: until then, what is less urgent
must wait. What does not arrive, others have got: that is looked for, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from ekiden.message import DEFAULT_PRIORITY

from ekiden_rabbitmq.announcements import Bands
from ekiden_rabbitmq.connection import Channel
from ekiden_rabbitmq.credit import shares
from ekiden_rabbitmq.declaring import Declarer
from ekiden_rabbitmq.io_thread import IOThread, Reply
from ekiden_rabbitmq.sources import Arrival, Source, Sources, Subscription
from ekiden_rabbitmq.topology import queue_name

LOOK_FOR_MISSING_SECONDS = 0.05
LOOKS_FOR_MISSING = 20
"""What was waiting and has not arrived after the first is looked for so many times."""

FILLS_UP_SECONDS = 0.005
LOOKS_WHETHER_FULL = 20
"""A subscription that is not full while messages are waiting is, after about this; and is given up on after so many."""

SUBSCRIBED_AGAIN_AFTER_SECONDS = 1.0
"""What the server has ended is left alone for so long."""

LARGEST_CREDIT = 65535
"""AMQP's field has 16 bits."""


class Subscriptions:
    """One consumer's. ``arrived`` is called with each delivery; ``missing`` when it is time to ``look_for_missing``."""

    def __init__(
        self,
        io: IOThread,
        declarer: Declarer,
        bands: Bands,
        *,
        sources: Sources,
        prefix: str,
        prefetch: int,
        lock: threading.RLock,
        arrived: Callable[[Arrival], None],
        missing: Callable[[], None],
    ) -> None:
        self._io = io
        self._declarer = declarer
        self._bands = bands
        self._sources = sources
        self._prefix = prefix
        self._prefetch = min(prefetch, LARGEST_CREDIT)
        self._lock = lock
        self._arrived = arrived
        self._missing = missing
        self._window = 0
        self._tags = 0
        self._cancelling: Reply[None] | None = None
        self._missing_timer: object | None = None
        self._looks = 0

    @property
    def is_settling_in(self) -> bool:
        """Whether something that is at the server, and for which there is room, has not arrived yet."""
        return any(
            one.subscription.is_settling_in if one.subscription is not None else not one.is_left_alone
            for one in self._sources.all()
        )

    @property
    def is_short(self) -> bool:
        """Whether a source has no subscription, or had room for nothing more since this was last adjusted."""
        return any(one.was_full or (one.subscription is None and not one.is_left_alone) for one in self._sources.all())

    async def adjust(self, channel: Channel, demand: int) -> None:
        """Give each source a credit, for ``demand`` deliveries in this process."""
        await self._find_sources()
        self._window = min(self._prefetch, max(self._window, 1 << max(0, demand - 1).bit_length()))
        sources = self._sources.all()
        wanting = [one for one in sources if one.subscription is None or one.subscription.is_full or one.was_full]
        wanting = [one for one in wanting if not one.is_left_alone]
        waiting = await self._waiting(wanting)
        # What nobody needs goes to those where messages have come, or else to the ordinary ones.
        lively = {one for one in sources if one.was_full or (one.subscription and one.subscription.arrived)}
        lively = lively or {one for one in sources if one.priority == DEFAULT_PRIORITY}
        by_queue = [list(bands) for bands in self._sources.by_queue.values()]
        needs = [[waiting.get(one, 0) + (one in lively) for one in bands] for bands in by_queue]
        room = self._window - sum(one.unacked for one in sources)
        for bands, credits_of in zip(by_queue, shares(room, needs, strict=self._sources.strict), strict=True):
            for one, credit in zip(bands, credits_of, strict=True):
                if self._gets_another(one, credit, room=room, looked=one in waiting):
                    await self._subscribe(channel, one, credit, waiting.get(one, 0))
                one.was_full = False
        self.expect_soon()

    async def cancel(self, channel: Channel) -> None:
        """Have nothing pushed any more."""
        self._window = 0
        for source in self._sources.all():
            if source.subscription is not None:
                await self._cancel(channel, source.subscription)
                source.subscription = None

    async def verify(self, channel: Channel) -> None:
        """Make sure that what is at the server before the last queue, or was on its way, is here, taken or expected."""
        ahead = [source for bands in list(self._sources.by_queue.values())[:-1] for source in bands]
        counts = await self._declarer.look([source.name for source in ahead])
        await channel.barrier()
        for source, count in zip(ahead, counts, strict=True):
            subscription = source.subscription
            if count and subscription is not None and not subscription.is_full:
                subscription.expects = subscription.arrived + 1
        self.expect_soon()

    async def look_for_missing(self) -> None:
        """What was counted, did not come and is not there any more, others have got meanwhile."""
        expecting = [one.subscription for one in self._sources.all() if one.subscription is not None]
        expecting = [subscription for subscription in expecting if subscription.is_settling_in]
        counts = await self._declarer.look([subscription.source.name for subscription in expecting])
        self._looks += 1
        for subscription, count in zip(expecting, counts, strict=True):
            still = count if count is not None and self._looks < LOOKS_FOR_MISSING else 0
            subscription.expects = min(subscription.credit, subscription.arrived + still)
        self._look_later()

    def expect_soon(self) -> None:
        """Look for what is missing, if it does not arrive."""
        self._looks = 0
        self._look_later()

    async def no_cancelling(self) -> None:
        """Return when acknowledgements may be sent: see ``_cancel``."""
        while self._cancelling is not None:
            await self._cancelling

    def cancelled_by_server(self, tag: str) -> None:
        """The server has ended a subscription: its queue was deleted, or moved, or it held something for too long."""
        for source in self._sources.all():
            if source.subscription is not None and source.subscription.tag == tag:
                source.subscription = None
                source.left_alone_until = time.monotonic() + SUBSCRIBED_AGAIN_AFTER_SECONDS
                self._declarer.forget(source.name)

    def lost(self) -> None:
        """The channel is gone, and all that came on it; with the consumer's lock."""
        self._window = 0
        for source in self._sources.all():
            source.parked.clear()
            source.subscription = None
            source.unacked = 0

    async def _find_sources(self) -> None:
        for queue, bands in self._sources.by_queue.items():
            for priority in await self._bands.of(queue):
                if all(source.priority != priority for source in bands):
                    with self._lock:
                        self._sources.add(Source(queue, priority, queue_name(self._prefix, queue, priority)))

    async def _waiting(self, sources: Iterable[Source]) -> dict[Source, int]:
        """How many messages the server has of each; one that was deleted is made again."""
        looked = list(sources)
        waiting = {}
        for source, count in zip(looked, await self._declarer.look([one.name for one in looked]), strict=True):
            if count is None:
                self._declarer.forget(source.name)
                await self._declarer.queue(source.queue, source.priority)
            waiting[source] = count or 0
        return waiting

    def _gets_another(self, source: Source, credit: int, *, room: int, looked: bool) -> bool:
        """Whether a source is to have another subscription, with this credit."""
        subscription = source.subscription
        if subscription is None:
            return not source.is_left_alone
        free = subscription.credit - subscription.unacked
        if not looked:
            return 2 * credit <= free  # others need what it has
        may_park_one = len(self._sources.all()) > 1 and not source.parked
        return credit > free and (room > 0 or may_park_one)

    async def _subscribe(self, channel: Channel, source: Source, credit: int, waiting: int) -> None:
        if source.subscription is not None:
            await self._cancel(channel, source.subscription)
        self._tags += 1
        subscription = Subscription(source, str(self._tags), credit, expects=min(credit, waiting))
        await channel.set_prefetch(credit)
        source.subscription = subscription
        arrived = self._arrived

        def deliver(number: int, redelivered: bool, properties: bytes, body: bytes) -> None:
            arrived(Arrival(subscription, channel, number, redelivered, properties, body))

        await channel.consume(source.name, subscription.tag, deliver)

    async def _cancel(self, channel: Channel, subscription: Subscription) -> None:
        """Have no more pushed for ``subscription``.

        What is on its way when the server hears of the cancelling, it takes back from quorum queues, and counts that
        as a hand-out. So nothing is to be on its way: no acknowledgement is sent, and makes room, until the
        subscription is full, or its queue empty.
        """
        self._cancelling = Reply()
        try:
            for _ in range(LOOKS_WHETHER_FULL):
                await channel.barrier()
                if subscription.is_full:
                    break
                (count,) = await self._declarer.look([subscription.source.name])
                if not count:
                    await channel.barrier()
                    break
                await self._io.sleep(FILLS_UP_SECONDS)
            await channel.cancel(subscription.tag)
        finally:
            cancelling, self._cancelling = self._cancelling, None
            cancelling.set(None)

    def _look_later(self) -> None:
        if self._missing_timer is not None:
            self._io.cancel(self._missing_timer)
            self._missing_timer = None
        if self.is_settling_in:
            self._missing_timer = self._io.call_later(LOOK_FOR_MISSING_SECONDS, self._look_now)

    def _look_now(self) -> None:
        self._missing_timer = None
        self._missing()
