"""A consumer, as the threads that use it see it. ``intake`` is its other half, on the I/O thread.

What is shared is guarded by ``_lock``: ``receive`` takes what is parked and makes it held, ``settle`` and
``release`` make what is held ended, the I/O thread adds what arrives, drops all of it when the channel is lost, and
wakes whoever receives, once for everything that arrived together.

A delivery's tag is its Arrival. It holds as long as it is HELD and its channel is the intake's; what the server is
told is decided on the I/O thread, where the channel changes.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportClosed, TransportCrashed, TransportError
from ekiden.loggers import safe_logger
from ekiden.message import LOST, SETTLED, Delivery, Ending, Settled, SettleOutcome
from ekiden.transport import Consumer

from ekiden_rabbitmq import refusals
from ekiden_rabbitmq.intake import Intake
from ekiden_rabbitmq.io_thread import IOThread
from ekiden_rabbitmq.publishing import Parcel, Publisher, ToQueue
from ekiden_rabbitmq.sources import Arrival, State

logger = safe_logger("ekiden_rabbitmq")

STARVED_AFTER_SECONDS = 0.005
"""What is settled makes room within this, as a rule; after it, more is asked for."""

SETTLES_IN_WITHIN_SECONDS = 2.0
"""What is at the server when ``receive`` is called has arrived within this; with no timeout it is waited for, too."""

SURE_FOR_SECONDS = 1.0
"""A connection on which something came within this is not one that the server has given up meanwhile."""

CLOSES_WITHIN_SECONDS = 5.0


class _Call:
    """One call of ``receive``: until when it waits for what, and what was asked of the I/O thread."""

    __slots__ = ("asked", "give_up", "limit", "nap", "number", "settled_in", "starving_since", "until")

    def __init__(self, number: int, limit: int, give_up: float) -> None:
        self.number = number
        self.limit = limit
        self.give_up = self.until = give_up
        self.nap = math.inf
        self.settled_in = time.monotonic() + SETTLES_IN_WITHIN_SECONDS
        self.starving_since: float | None = None
        self.asked: list[Callable[[], None]] = []


class RabbitMQConsumer(Consumer):
    """Receives, settles, releases. See the module's docstring for the threads."""

    def __init__(
        self,
        io: IOThread,
        intake: Intake,
        publisher: Publisher,
        *,
        lock: threading.RLock,
        server: str,
        name: str,
        prefetch: int,
        timeout: float,
        left: Callable[[RabbitMQConsumer], None],
    ) -> None:
        self._io = io
        self._intake = intake
        self._publisher = publisher
        self._lock = lock
        self._server = server
        self._prefetch = prefetch
        self._timeout = timeout
        self._left = left
        self._call = 0
        self._closed = False
        self.name = name
        io.at_crash(self._crashed)

    def receive(self, limit: int, timeout: float) -> list[Delivery]:
        give_up = time.monotonic() + timeout
        intake = self._intake
        while True:
            self._check_open()
            before = intake.receiving
            try:
                intake.receiving = before + 1
                arrivals = self._take(limit, give_up)
            finally:
                intake.receiving = before
                intake.left_at = time.monotonic()
            if intake.rest_timer is None:
                self._io.post(intake.rest_later)
            deliveries = self._deliveries(arrivals)
            if deliveries or not arrivals:
                return deliveries

    def settle(self, endings: Sequence[Ending]) -> list[Settled]:
        self._check_open()
        try:
            self._io.check()
            if any(ending.publish for ending in endings):
                self._make_sure(doing="settling", unless_heard_within=SURE_FOR_SECONDS)
        except TransportError as error:
            return [Settled(SettleOutcome.FAILED, error)] * len(endings)
        claimed = self._claim([ending.delivery for ending in endings])
        try:
            return self._settle(endings, claimed)
        except TransportError as error:
            self._hold_again(claimed.values())
            failed = Settled(SettleOutcome.FAILED, error)
            return [failed if index in claimed else LOST for index in range(len(endings))]
        except BaseException:  # out of a signal handler: they can be settled again
            self._hold_again(claimed.values())
            raise

    def _settle(self, endings: Sequence[Ending], claimed: dict[int, Arrival]) -> list[Settled]:
        answers: list[Settled] = [LOST] * len(endings)
        going = self._publish_what_follows(endings, claimed, answers)
        if not going:
            return answers
        try:
            acknowledged = self._acknowledge([claimed[index] for index in going])
        except TransportError as error:
            for index in going:
                answers[index] = Settled(SettleOutcome.FAILED, error)
        else:
            for index, is_ours in zip(going, acknowledged, strict=True):
                answers[index] = SETTLED if is_ours else LOST
        return answers

    def release(self, deliveries: Sequence[Delivery], delay: float = 0.0, *, keep_attempt: bool = False) -> None:
        self._check_open()
        self._io.check()
        if not deliveries:
            return
        if delay <= 0:
            # Who gives back and does not ask for more does not want it pushed to itself again.
            doing = f"{self._server}: giving messages back"
            self._io.ask(self._intake.rest_unless_receiving, self._timeout, what=doing)
        self._make_sure(doing="giving messages back", unless_heard_within=SURE_FOR_SECONDS)
        claimed = self._claim(deliveries)
        try:
            self._release(deliveries, claimed, max(delay, 0.0), keep_attempt=keep_attempt)
        except BaseException:
            self._hold_again(claimed.values())
            raise

    def _release(
        self, deliveries: Sequence[Delivery], claimed: dict[int, Arrival], delay: float, *, keep_attempt: bool
    ) -> None:
        parcels = {
            index: Parcel(ToQueue(delivery.message, delivery.attempt - (not keep_attempt), delay))
            for index, delivery in enumerate(deliveries)
            if index in claimed and claimed[index].state is State.ENDING
        }
        errors = dict(zip(parcels, self._publisher.publish(list(parcels.values())), strict=True))
        failed = {index: error for index, error in errors.items() if error is not None}
        refused = {index: error for index, error in failed.items() if isinstance(error, BrokerRefused)}
        if refused:
            for error in refused.values():
                logger.error("a message is given back as it is, which the server counts as a hand-out: %s", error)
            put_back = functools.partial(self._intake.put_back, [claimed[index] for index in refused], delay)
            self._io.ask(put_back, self._timeout, what=f"{self._server}: giving messages back")
        self._acknowledge([arrival for index, arrival in claimed.items() if index not in failed])
        unavailable = [error for index, error in failed.items() if index not in refused]
        if unavailable:
            self._hold_again([claimed[index] for index in failed if index not in refused])
            raise BrokerUnavailable(str(unavailable[0])) from unavailable[0]

    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        self._check_open()
        if not deliveries:
            return []
        try:
            self._make_sure(doing="extending")
        except TransportError as error:
            return [Settled(SettleOutcome.FAILED, error)] * len(deliveries)
        with self._lock:
            return [SETTLED if self._is_ours(delivery) else LOST for delivery in deliveries]

    def stop(self) -> None:
        self._intake.stopped = True
        self._intake.called.set()
        self._io.post(self._intake.stop)

    def close(self) -> None:
        if self.end():
            with contextlib.suppress(TransportError):  # the server is silent, and takes it back with the connection
                self._io.ask(self.ended, CLOSES_WITHIN_SECONDS, what=f"{self._server}: closing a consumer")
            self._left(self)

    def end(self) -> bool:
        """Receive no more, and end nothing any more; False if it was closed before. ``ended`` follows."""
        with self._lock:
            if self._closed:
                return False
            self._closed = self._intake.stopped = True
        self._intake.called.set()
        self._io.not_at_crash(self._crashed)
        return True

    async def ended(self) -> None:
        """On the I/O thread: give back everything."""
        await self._intake.close()

    def abandon(self) -> None:
        """In a forked child: what this holds is the parent's."""
        self._closed = True

    def _crashed(self, _error: TransportCrashed) -> None:
        self._intake.called.set()

    # Receiving.

    def _take(self, limit: int, give_up: float) -> list[Arrival]:
        """What can be handed out, within the time."""
        self._call += 1
        call = _Call(self._call, limit, give_up)
        while not self._intake.stopped:
            self._io.check()
            self._intake.called.clear()
            with self._lock:
                taken = self._take_now(call)
            if taken or not self._wait(call):
                return taken
        return []

    def _take_now(self, call: _Call) -> list[Arrival]:
        """What is here and may be handed out; or else say in ``call`` how long to wait for what, and have it done.

        The caller holds the lock.
        """
        intake = self._intake
        call.until, call.nap = call.give_up, math.inf
        room = min(call.limit, self._prefetch - intake.held)
        if room <= 0:
            return []
        intake.demand = intake.held + room
        intake.peak_demand = max(intake.peak_demand, intake.demand)
        verified = intake.verified == call.number
        taken = intake.sources.take(room, verified=verified)
        if taken:
            self._hold(taken, room)
        elif not intake.is_steady:
            call.until = max(call.give_up, call.settled_in)
            self._ask_once(call, intake.adjust)
        elif intake.sources.strict and not verified:
            call.until = max(call.give_up, call.settled_in)
            intake.call = call.number
            self._ask_once(call, intake.verify)
        elif intake.sources.could_have_more:
            call.nap = STARVED_AFTER_SECONDS
            self._adjust_if_starving(call)
        return taken

    def _ask_once(self, call: _Call, what: Callable[[], None]) -> None:
        if what not in call.asked:
            call.asked.append(what)
            self._io.post(what)

    def _adjust_if_starving(self, call: _Call) -> None:
        now = time.monotonic()
        if call.starving_since is None:
            call.starving_since = now
        elif now - call.starving_since >= STARVED_AFTER_SECONDS:
            call.starving_since = None
            self._intake.is_steady = False
            self._io.post(self._intake.adjust)

    def _wait(self, call: _Call) -> bool:
        """Wait to be woken; False when it is time to give up. Raises what keeps messages from coming."""
        now = time.monotonic()
        error = self._intake.error
        if error is not None:
            told = refusals.refusal(error, self._server, doing="receiving", right="read")
            if now >= call.give_up or isinstance(told, BrokerRefused):
                raise told from error
        until = call.until if error is None else call.give_up
        if now >= until:
            return False
        self._intake.called.wait(min(until - now, call.nap))
        return True

    def _hold(self, taken: list[Arrival], room: int) -> None:
        intake = self._intake
        for arrival in taken:
            arrival.state = State.HELD
        intake.held += len(taken)
        if len(taken) < room and intake.sources.could_have_more:
            self._io.post(intake.adjust_soon)

    def _deliveries(self, arrivals: Sequence[Arrival]) -> list[Delivery]:
        deliveries = []
        for arrival in arrivals:
            arrived = self._intake.decode(arrival)
            if arrived.lap and (again := self._rest_of_its_time(arrived.message.due)) is not None:
                with self._lock:
                    if self._is_current(arrival) and arrival.state is State.HELD:
                        arrival.state = State.ENDING
                        self._intake.held -= 1
                self._io.post(self._lap(arrival, ToQueue(arrived.message, arrived.earlier, again)))
            else:
                deliveries.append(Delivery(arrived.message, arrival, arrived.earlier + 1))
        return deliveries

    def _rest_of_its_time(self, due: float | None) -> float | None:
        left = 0.0 if due is None else due - time.time()
        return left if left > 0 else None

    def _lap(self, arrival: Arrival, again: ToQueue) -> Callable[[], None]:
        return lambda: self._intake.lap(arrival, again)

    # Ending.

    def _is_current(self, arrival: object) -> bool:
        return isinstance(arrival, Arrival) and arrival.channel is self._intake.channel

    def _is_ours(self, delivery: Delivery) -> bool:
        return self._is_current(delivery.tag) and delivery.tag.state in {State.HELD, State.SENT}

    def _claim(self, deliveries: Sequence[Delivery]) -> dict[int, Arrival]:
        """Make those that are held ENDING, so that nobody else ends them; what is ours, by its place."""
        claimed = {}
        with self._lock:
            for index, delivery in enumerate(deliveries):
                if self._is_ours(delivery):
                    claimed[index] = arrival = delivery.tag
                    if arrival.state is State.HELD:
                        arrival.state = State.ENDING
                        self._intake.held -= 1
        return claimed

    def _hold_again(self, arrivals: Iterable[Arrival]) -> None:
        with self._lock:
            for arrival in arrivals:
                if self._is_current(arrival) and arrival.state is State.ENDING:
                    arrival.state = State.HELD
                    self._intake.held += 1

    def _publish_what_follows(
        self, endings: Sequence[Ending], claimed: dict[int, Arrival], answers: list[Settled]
    ) -> list[int]:
        """Publish all at once; the places of the endings of which everything is stored, and answers for the others."""
        following = {
            index: [one for one in endings[index].publish if (one.queue, one.id) not in arrival.followed_by]
            for index, arrival in claimed.items()
        }
        errors = iter(self._publisher.publish([Parcel(ToQueue(one)) for some in following.values() for one in some]))
        going = []
        for index, some in following.items():
            arrival = claimed[index]
            answered = [(one, next(errors)) for one in some]
            if some:
                arrival.followed_by |= {(one.queue, one.id) for one, error in answered if error is None}
            error = next((error for _, error in answered if error is not None), None)
            if error is None:
                going.append(index)
            else:
                self._hold_again([arrival])
                answers[index] = Settled(SettleOutcome.FAILED, error)
        return going

    def _make_sure(self, *, doing: str, unless_heard_within: float = 0.0) -> None:
        """Learn what is lost before something is published for it."""
        make_sure = functools.partial(self._intake.make_sure, unless_heard_within=unless_heard_within)
        self._io.ask(make_sure, self._timeout, what=f"{self._server}: {doing}")

    def _acknowledge(self, arrivals: list[Arrival]) -> list[bool]:
        """Tell the server that these have ended; of each, whether it was still ours."""
        acknowledge = functools.partial(self._intake.acknowledge, arrivals)
        try:
            return self._io.ask(acknowledge, self._timeout, what=f"{self._server}: settling")
        except TransportError:
            self._hold_again(arrivals)
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"The consumer {self.name!r} was closed.")
