"""Brokers in trouble: full, silent, restarted, forgetting to wake anybody, or behind a wire that loses and delays.

Each class needs something that only the plugin can do to its broker, and asks for it by a fixture to override.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from functools import partial

import pytest

from ekiden.errors import BrokerUnavailable
from ekiden.message import (
    STORED,
    Delivery,
    Ending,
    Message,
    Published,
    PublishOutcome,
    Settled,
    SettleOutcome,
    derived_id,
)
from ekiden.options import Publishing, PublishRetryPolicy
from ekiden.publisher import Publisher
from ekiden.testing.conformance.fixtures import (
    PATIENCE,
    TransportFixtures,
    a_message,
    eventually,
    ids,
    let_it_wait,
    numbered,
    settle,
)
from ekiden.testing.proxy import Proxy
from ekiden.transport import Consumer, Transport
from ekiden.urls import parse_url


class FullBrokerConformance(TransportFixtures):
    """``url`` names a broker so small that some thousands of messages of a kilobyte fill it."""

    @pytest.mark.timeout(180)
    def test_a_full_broker_says_so_and_recovers_when_it_is_drained(self, transport: Transport, queue: str) -> None:
        stored = self.fill(transport, queue)
        assert stored > 0

        consumer = self.consume(transport, queue)
        drained = 0
        while drained < stored:
            drained += len(settle(consumer, self.collect(consumer, 1)))

        eventually(lambda: self.publish_one(transport, queue).outcome is PublishOutcome.STORED, what="there is room")
        assert self.collect_one(consumer).attempt == 1

    @pytest.mark.timeout(180)
    def test_an_ending_of_a_full_broker_is_answered_and_stays_held_when_it_failed(
        self, transport: Transport, queue: str
    ) -> None:
        transport.publish([a_message(queue)])
        consumer = self.consume(transport, queue, prefetch=1)
        held = self.collect_one(consumer)
        self.fill(transport, f"{queue}-other")
        follow_ups = tuple(a_message(f"{queue}-next", b"x" * 1024) for _ in range(100))

        (answer,) = consumer.settle([Ending(held, follow_ups)])

        assert answer.outcome is SettleOutcome.FAILED
        assert isinstance(answer.error, BrokerUnavailable)
        transport.purge(f"{queue}-other")
        assert eventually(lambda: consumer.settle([Ending(held)])[0].outcome, what="settled") is SettleOutcome.SETTLED

    def fill(self, transport: Transport, queue: str) -> int:
        """Publish until the broker says that it is full, and return how many it took."""
        stored = 0
        while True:
            answer = self.publish_one(transport, queue)
            if answer.outcome is not PublishOutcome.STORED:
                assert isinstance(answer.error, BrokerUnavailable)
                return stored
            stored += 1

    def publish_one(self, transport: Transport, queue: str) -> Published:
        """Publish a kilobyte; that nothing could be asked at all is a failure as well."""
        try:
            return transport.publish([a_message(queue, b"x" * 1024)])[0]
        except BrokerUnavailable as error:
            return Published(PublishOutcome.FAILED, error)


class DeadlineConformance(TransportFixtures):
    """A broker that stores nothing for a while: a publish ends at the caller's deadline, not at the transport's own.

    The time limit in the URL, or the transport's own, must be a second or more.
    """

    publish_deadline_seconds = 0.3

    @pytest.fixture
    def silent(self) -> Callable[[], AbstractContextManager[None]]:
        """Returns a context manager; the broker does not answer while it is entered: override this."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'silent'.")

    @pytest.mark.timeout(120)
    @pytest.mark.parametrize("connected", [True, False], ids=["connected", "not yet connected"])
    @pytest.mark.slow
    def test_a_publish_ends_at_its_deadline_and_before_the_others(
        self,
        transport: Transport,
        other: Transport,
        queue: str,
        silent: Callable[[], AbstractContextManager[None]],
        connected: bool,
    ) -> None:
        if connected:
            assert transport.publish([a_message(queue)]) == [STORED]
            assert other.publish([a_message(queue)]) == [STORED]

        with silent(), ThreadPoolExecutor(2) as threads:
            patient = threads.submit(self.error_of, other, queue, None)
            hurried = threads.submit(self.error_of, transport, queue, self.publish_deadline_seconds)
            error = hurried.result()
            was_first = not patient.done()

        assert isinstance(error, BrokerUnavailable)
        assert was_first
        assert isinstance(patient.result(), BrokerUnavailable)
        eventually(lambda: self.error_of(transport, queue, 10.0) is None, what="it publishes again", within=60)

    def error_of(self, transport: Transport, queue: str, within: float | None) -> Exception | None:
        """Why a message was not stored, whether that was answered or raised."""
        try:
            deadline = None if within is None else time.monotonic() + within
            (answer,) = transport.publish([a_message(queue)], deadline=deadline)
        except BrokerUnavailable as error:
            return error
        return answer.error


class SilentBrokerConformance(DeadlineConformance):
    """A broker that accepts what is sent and does not answer: every call ends, with a typed error, and all recovers."""

    deadline_seconds = 30.0
    """Every call has ended by then. Override it, with a short deadline in the URL, to keep the tests fast."""

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_every_call_ends_while_the_broker_is_silent_and_works_afterwards(
        self, transport: Transport, queue: str, silent: Callable[[], AbstractContextManager[None]]
    ) -> None:
        transport.publish(numbered(queue, 2))
        consumer, listener = self.consume(transport, queue, prefetch=1), transport.listen(queue)
        held = self.collect_one(consumer)
        calls: dict[str, Callable[[], object]] = {
            "publish": lambda: self.assert_failed(transport.publish([a_message(queue)])),
            "depth": lambda: transport.depth(queue),
            "browse": lambda: transport.browse(queue),
            "purge": lambda: transport.purge(f"{queue}-other"),
            "broadcast": lambda: transport.broadcast(queue, [b"x"]),
            "listen": lambda: transport.listen(f"{queue}-other").close(),
            "hear": lambda: listener.receive(0.1),
            "open": lambda: self.consume(transport, f"{queue}-other").close(),
            "receive": lambda: consumer.receive(1, 0.1),
            "extend": lambda: self.assert_answered(consumer.extend([held])),
            "release": lambda: consumer.release([held]),
        }

        with silent():
            for name, call in calls.items():
                started = time.monotonic()
                with suppress(BrokerUnavailable):
                    call()
                assert time.monotonic() - started < self.deadline_seconds, name
            (answer,) = consumer.settle([Ending(held)])

        assert answer.outcome in {SettleOutcome.FAILED, SettleOutcome.LOST}
        eventually(lambda: self.works(transport, f"{queue}-after"), what="all works again", within=60)

    def assert_failed(self, answers: list[Published]) -> None:
        """What was answered was not "stored"."""
        assert [answer.outcome for answer in answers] == [PublishOutcome.FAILED]

    def assert_answered(self, answers: list[Settled]) -> None:
        """Extending says "could not be asked", or where the connection is the lease, whether that is still there."""
        assert len(answers) == 1

    def works(self, transport: Transport, queue: str) -> bool:
        """A message goes through."""
        try:
            transport.publish([a_message(queue)])
            with self.consume(transport, queue) as consumer:
                return settle(consumer, consumer.receive(1, 1.0)) == [SettleOutcome.SETTLED]
        except BrokerUnavailable:
            return False


class WireFixtures(TransportFixtures):
    """The broker of ``url`` behind a proxy; ``transport`` goes through it, ``other`` does not."""

    @pytest.fixture
    def proxy(self, url: str) -> Iterator[Proxy]:
        """In front of the first host of ``url``, which has to say its port."""
        host = parse_url(url).hosts[0]
        assert host.port is not None, f"the URL of {type(self).__name__} must name the port"
        with Proxy(host.name, host.port) as proxy:
            yield proxy

    @pytest.fixture
    def transport(self, url: str, proxy: Proxy) -> Iterator[Transport]:
        """The broker, through the proxy."""
        with self.open_transport(proxy.through(url)) as transport:
            yield transport


class LostReplyConformance(WireFixtures):
    """The broker did what it was asked, and the answer was lost: what is tried again is not done twice.

    Which requests these are is left to chance, with a seed. Nothing is ever lost; where the transport names duplicates,
    nothing is stored twice either.
    """

    turns = 100
    """How many calls there are of each kind, about half of which lose a reply."""

    connection_is_lease = False
    """Whether what a consumer holds is lost with its connection. Then nobody can tell whether it had been settled."""

    @pytest.mark.parametrize("follows", [False, True])
    def test_what_was_settled_although_the_answer_was_lost_is_settled_the_next_time(
        self, transport: Transport, other: Transport, proxy: Proxy, queue: str, follows: bool
    ) -> None:
        consumer = self.consume(transport, queue)
        outcomes = []
        for number in range(5):  # the first ones may lose the answer to what only prepares the settling
            other.publish([a_message(queue)])
            ending = Ending(self.collect_one(consumer), (a_message(f"{queue}-next"),) if follows else ())
            if number:
                proxy.lose_next_reply()
            answered = partial(self.answered, consumer, ending)
            outcomes.append(eventually(answered, what="it is answered", within=60))
            proxy.lose_no_reply()

        allowed = {SettleOutcome.SETTLED, SettleOutcome.LOST} if self.connection_is_lease else {SettleOutcome.SETTLED}
        assert set(outcomes) <= allowed
        if not self.connection_is_lease:
            self.assert_depth(other, queue, ready=0)
            self.assert_depth(other, f"{queue}-next", ready=5 if follows else 0)

    def answered(self, consumer: Consumer, ending: Ending) -> SettleOutcome | None:
        """How an ending is answered; None while that FAILED."""
        (answer,) = consumer.settle([ending])
        return None if answer.outcome is SettleOutcome.FAILED else answer.outcome

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_what_is_published_again_after_a_lost_reply_is_there_once(
        self, transport: Transport, other: Transport, proxy: Proxy, queue: str
    ) -> None:
        chance = random.Random(1)
        published: list[str] = []

        for _ in range(self.turns):
            messages = numbered(queue, chance.randint(1, 5))
            published += [message.id for message in messages]
            self.lose_a_reply_by_chance(proxy, chance)
            self.publish_all(transport, messages)
        proxy.lose_no_reply()

        found = self.drain(other, queue, expected=set(published))
        assert set(found) == set(published)
        if transport.description.names_duplicates:
            assert set(found.values()) == {1}
        assert proxy.replies_lost >= self.turns / 5

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_nothing_is_lost_when_replies_to_a_worker_are(
        self, transport: Transport, other: Transport, proxy: Proxy, queue: str
    ) -> None:
        chance = random.Random(2)
        messages = numbered(queue, 3 * self.turns)
        self.publish_all(other, messages)
        lease = max(transport.description.shortest_lease, 1.0)
        consumer = self.consume(transport, queue, lease=lease, prefetch=10)
        calls = 0

        while not self.is_empty(other, consumer, queue):
            deliveries = self.received(consumer, chance.randint(1, 5))
            if not deliveries:
                continue
            if calls < 3 * self.turns:
                self.lose_a_reply_by_chance(proxy, chance)
            else:
                proxy.lose_no_reply()
            calls += 1
            self.use_up(consumer, deliveries, chance, f"{queue}-next")

        follow_ups = self.drain(other, f"{queue}-next", expected={derived_id(each.id, "next") for each in messages})
        assert set(follow_ups) == {derived_id(message.id, "next") for message in messages}
        if transport.description.names_duplicates:
            assert set(follow_ups.values()) == {1}
        assert proxy.replies_lost >= self.turns / 5

    def lose_a_reply_by_chance(self, proxy: Proxy, chance: random.Random) -> None:
        """Lose the next reply, in half of the cases."""
        if chance.random() < 0.5:
            proxy.lose_next_reply()

    def publish_all(self, transport: Transport, messages: list[Message]) -> None:
        """Publish, and publish again what was not answered as stored, until all is stored."""
        left = list(messages)

        def all_are_stored() -> bool:
            try:
                answers = transport.publish(left)
            except BrokerUnavailable:
                return False
            failed = [answer.outcome is PublishOutcome.FAILED for answer in answers]
            left[:] = [message for message, again in zip(left, failed, strict=True) if again]
            return not left

        eventually(all_are_stored, what="published", within=60)

    def received(self, consumer: Consumer, limit: int) -> list[Delivery]:
        """What comes within a moment; nothing while there is trouble."""
        try:
            return consumer.receive(limit, 0.2)
        except BrokerUnavailable:
            return []

    def use_up(self, consumer: Consumer, deliveries: list[Delivery], chance: random.Random, next_queue: str) -> None:
        """Mostly end what was received, with something that follows; else release it, extended before or not."""
        action = chance.choice(["settle", "settle", "settle", "extend", "release"])
        if action == "extend":
            assert len(consumer.extend(deliveries)) == len(deliveries)
        if action in {"extend", "release"}:
            with suppress(BrokerUnavailable):  # then they come back by themselves
                consumer.release(deliveries)
            return
        endings = [
            Ending(each, (Message(derived_id(each.message.id, "next"), next_queue, each.message.body),))
            for each in deliveries
        ]

        def all_are_answered() -> bool:
            answers = consumer.settle(endings)
            again = [answer.outcome is SettleOutcome.FAILED for answer in answers]
            endings[:] = [ending for ending, failed in zip(endings, again, strict=True) if failed]
            return not endings

        eventually(all_are_answered, what="every ending is answered", within=60)

    def is_empty(self, other: Transport, consumer: Consumer, queue: str) -> bool:
        """Whether nothing is left, as far as this broker counts; where it cannot, nothing comes for some time."""
        depth = other.depth(queue)
        if depth.ready or depth.delayed or depth.leased:
            return False
        description = other.description
        if description.counts_delayed and description.counts_leased:
            return True
        quiet_until = time.monotonic() + 2.0 + description.dead_consumer_noticed_within
        while time.monotonic() < quiet_until:
            if deliveries := self.received(consumer, 1):
                with suppress(BrokerUnavailable):
                    consumer.release(deliveries)
                return False
        return True

    def drain(self, transport: Transport, queue: str, *, expected: set[str]) -> Counter[str]:
        """How often each id is in the queue: all of it, and at least what is expected."""
        found: Counter[str] = Counter()
        give_up = time.monotonic() + 60
        with self.consume(transport, queue) as consumer:
            while time.monotonic() < give_up:
                deliveries = consumer.receive(1000, 0.5)
                if not deliveries and expected <= set(found):
                    break
                found.update(ids(deliveries))
                settle(consumer, deliveries)
        return found


class SlowWireConformance(WireFixtures):
    """Bytes that come a few at a time are put together, and nobody takes slowness for silence."""

    @pytest.mark.slow
    def test_everything_works_over_a_slow_wire(
        self, transport: Transport, other: Transport, proxy: Proxy, queue: str
    ) -> None:
        messages = [a_message(queue, bytes(range(256)) * 4, headers={"number": number}) for number in range(20)]
        consumer, listener = self.consume(transport, queue), transport.listen(queue)

        with proxy.slow(piece_bytes=97, piece_seconds=0.002):
            assert transport.publish(messages) == [STORED] * 20
            received = self.collect(consumer, 20, within=30)
            transport.broadcast(queue, [b"x" * 1000])
            heard = eventually(lambda: listener.receive(1.0), what="a broadcast is heard")
            ended = settle(consumer, received)

        assert [delivery.message for delivery in received] == messages
        assert heard == [b"x" * 1000]
        assert set(ended) == {SettleOutcome.SETTLED}
        self.assert_depth(other, queue, ready=0)

    @pytest.mark.slow
    @pytest.mark.timeout(180)
    def test_a_wire_that_is_cut_again_and_again_loses_nothing(
        self, transport: Transport, other: Transport, proxy: Proxy, queue: str
    ) -> None:
        lease = max(transport.description.shortest_lease, 1.0)
        consumer = self.consume(transport, queue, lease=lease, prefetch=20)
        messages = numbered(queue, 300)
        seen: set[str] = set()
        for start in range(0, 300, 50):
            assert other.publish(messages[start : start + 50]) == [STORED] * 50

        give_up = time.monotonic() + 120
        cuts = 0
        while len(seen) < len(messages) and time.monotonic() < give_up:
            try:
                deliveries = consumer.receive(20, 0.5)
            except BrokerUnavailable:
                continue
            seen.update(ids(deliveries))
            if cuts < 10:
                proxy.cut()
                cuts += 1
            settle(consumer, deliveries)

        assert seen == {message.id for message in messages}
        assert cuts == 10


class BrokerRestartConformance(TransportFixtures):
    """A broker that is stopped, or killed, and started again: everybody reconnects, and what was confirmed is there."""

    @pytest.fixture
    def restart_broker(self) -> Callable[[], None]:
        """Returns a function that stops the broker and has started it again when it returns: override this."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'restart_broker'.")

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_what_was_confirmed_survives_a_restart(
        self, transport: Transport, queue: str, restart_broker: Callable[[], None]
    ) -> None:
        published = [*numbered(queue, 50), *numbered(queue, 50, due_in=1.0)]
        assert transport.publish(published) == [STORED] * 100

        restart_broker()

        consumer = self.consume(transport, queue)
        received = self.collect_through_trouble(consumer, 100 if transport.description.survives_restart else 0)
        assert set(received) <= {message.id for message in published}

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_what_is_published_over_a_restart_is_tried_until_it_is_stored(
        self, transport: Transport, queue: str, restart_broker: Callable[[], None]
    ) -> None:
        publisher = Publisher(lambda: transport)
        how = Publishing(120.0, PublishRetryPolicy())
        sent: list[str] = []
        over = threading.Event()

        def publish_all_the_time() -> set[PublishOutcome]:
            outcomes: set[PublishOutcome] = set()
            while not over.is_set():
                messages = numbered(queue, 2)
                outcomes.update(answer.outcome for answer in publisher.publish(messages, how))
                sent.extend(message.id for message in messages)
                over.wait(0.01)  # a restart may take half a minute, and all that is sent meanwhile is received below
            return outcomes

        with ThreadPoolExecutor() as threads:
            publishing = threads.submit(publish_all_the_time)
            try:
                eventually(lambda: len(sent) > 10, what="some are stored before")
                restart_broker()
                before = len(sent)
                eventually(lambda: len(sent) > before + 10, what="some are stored after", within=120)
            finally:
                over.set()
            outcomes = publishing.result()

        assert outcomes <= {PublishOutcome.STORED, PublishOutcome.DUPLICATE}
        if transport.description.survives_restart:
            received = self.collect_through_trouble(self.consume(transport, queue), len(sent))
            assert set(received) >= set(sent)

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_a_waiting_consumer_and_listener_survive_a_restart(
        self, transport: Transport, queue: str, restart_broker: Callable[[], None]
    ) -> None:
        consumer, listener = self.consume(transport, queue), transport.listen(queue)
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(self.collect_through_trouble, consumer, 1)
            let_it_wait()
            restart_broker()
            message = a_message(queue)
            eventually(lambda: self.published(transport, message), what="published", within=60)
            assert waiting.result() == [message.id]

        eventually(lambda: self.heard(transport, listener.receive, queue), what="a broadcast is heard", within=60)

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_what_was_held_over_a_restart_ends_or_comes_again(
        self, transport: Transport, queue: str, restart_broker: Callable[[], None]
    ) -> None:
        transport.publish(numbered(queue, 10))
        consumer = self.consume(transport, queue, lease=transport.description.shortest_lease)
        held = self.collect(consumer, 10)

        restart_broker()

        outcomes = eventually(lambda: self.settled(consumer, held), what="every ending is answered", within=60)
        lost = [delivery for delivery, outcome in zip(held, outcomes, strict=True) if outcome is SettleOutcome.LOST]
        if transport.description.survives_restart:
            assert len(self.collect_through_trouble(consumer, len(lost))) == len(lost)

    def collect_through_trouble(self, consumer: Consumer, count: int) -> list[str]:
        """The ids of ``count`` messages, each counted once, received and settled through errors."""
        seen: dict[str, None] = {}
        give_up = time.monotonic() + 60
        while len(seen) < count and time.monotonic() < give_up:
            try:
                deliveries = consumer.receive(100, 1.0)
            except BrokerUnavailable:
                let_it_wait()
                continue
            settle(consumer, deliveries)
            seen.update((delivery.message.id, None) for delivery in deliveries)
        assert len(seen) >= count
        return list(seen)

    def published(self, transport: Transport, message: Message) -> bool:
        """Whether it is stored now, by this or an earlier call."""
        try:
            return transport.publish([message])[0].outcome is not PublishOutcome.FAILED
        except BrokerUnavailable:
            return False

    def heard(self, transport: Transport, receive: Callable[[float], list[bytes]], topic: str) -> bool:
        """Whether a broadcast reaches the listener."""
        try:
            transport.broadcast(topic, [b"still there?"])
            return bool(receive(1.0))
        except BrokerUnavailable:
            return False

    def settled(self, consumer: Consumer, held: list[Delivery]) -> list[SettleOutcome] | None:
        """What became of each, once none FAILED any more; an ending that succeeded before is LOST then."""
        outcomes = settle(consumer, held)
        return None if SettleOutcome.FAILED in outcomes else outcomes


class LostWakeUpConformance(TransportFixtures):
    """A wake-up is a hint: a message whose signal was lost is noticed all the same, a little later."""

    @pytest.fixture
    def silent_publisher(self) -> Iterator[Transport]:
        """The same broker, opened so that publishing stores messages and wakes nobody: override this."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'silent_publisher'.")

    @pytest.mark.slow
    def test_a_message_is_noticed_although_its_signal_was_lost(
        self, transport: Transport, silent_publisher: Transport, queue: str
    ) -> None:
        consumer = self.consume(transport, queue)
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(consumer.receive, 1, transport.description.wakes_within + PATIENCE)
            let_it_wait(0.3)
            published = time.monotonic()
            silent_publisher.publish([a_message(queue, b"psst")])
            received = waiting.result()
            noticed_after = time.monotonic() - published

        assert [delivery.message.body for delivery in received] == [b"psst"]
        assert noticed_after < transport.description.wakes_within + 1.0
