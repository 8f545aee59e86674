"""Delays that RabbitMQ holds: exact, of any length, none behind another, and still there after a restart."""

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pika
import pytest
from ekiden.message import STORED, Message, new_id
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import PATIENCE, a_message, eventually, numbered, settle
from ekiden.transport import Consumer
from ekiden.urls import parse_url
from ekiden_rabbitmq import declaring
from ekiden_rabbitmq.delays import STRANDED, UNIT_SECONDS, Delays
from ekiden_rabbitmq.topology import queue_name
from ekiden_rabbitmq.versions import differences_of
from pika.adapters.blocking_connection import BlockingChannel

from tests.servers.rabbitmq import RabbitMQServer
from tests.servers.running import running

EARLY_SECONDS = 0.05
"""A message comes no more than this before it is due."""

QUORUM, CLASSIC = (Delays(quorum, differences_of((3, 10, 8))) for quorum in (True, False))
QUEUE_TYPES = {"quorum": QUORUM, "classic": CLASSIC}


@pytest.fixture
def queue() -> str:
    return f"queue-{new_id()}"


@pytest.fixture(params=["quorum", pytest.param("classic", marks=pytest.mark.slow)])
def queue_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(rabbitmq_place: str, queue_type: str) -> str:
    return f"{rabbitmq_place}&queue_type={queue_type}"


@contextmanager
def channel_at(url: str) -> Iterator[BlockingChannel]:
    """Somebody else's channel, who uses the server without ekiden."""
    connection = pika.BlockingConnection(pika.URLParameters(url.partition("?")[0]))
    try:
        yield connection.channel()
    finally:
        connection.close()


def ready_in(channel: BlockingChannel, name: str) -> int:
    """How many messages the queue of this name at the server holds ready."""
    count: int = channel.queue_declare(name, passive=True).method.message_count
    return count


def lateness(consumer: Consumer, messages: list[Message], *, within: float) -> list[float]:
    """How many seconds after its due each message came; fails when one is missing."""
    dues = {message.id: message.due or 0.0 for message in messages}
    late: dict[str, float] = {}
    give_up = time.monotonic() + within
    while len(late) < len(dues) and time.monotonic() < give_up:
        deliveries = consumer.receive(1000, 0.5)
        now = time.time()
        settle(consumer, deliveries)
        late.update((found, now - dues[found]) for found in (one.message.id for one in deliveries) if found in dues)
    assert late.keys() == dues.keys()
    return sorted(late.values())


@pytest.mark.slow
def test_delays_of_all_lengths_end_when_they_are_due(place: str, queue: str) -> None:
    with (
        open_transport(place) as transport,
        transport.consumer([queue], lease=60, prefetch=1000, name="one") as consumer,
    ):
        transport.publish([a_message(queue, b"makes the levels", due_in=6.0)])
        messages = [a_message(queue, due_in=random.uniform(0.1, 5.0)) for _ in range(300)]

        assert transport.publish(messages) == [STORED] * 300

        late = lateness(consumer, messages, within=20)
        assert late[0] > -EARLY_SECONDS
        # Rounding takes up to one unit; the rest is hops, which a busy machine makes slower.
        assert statistics.median(late) < UNIT_SECONDS + 0.4


def test_a_thousand_long_delays_keep_no_short_one_waiting(place: str, queue: str) -> None:
    with (
        open_transport(place) as transport,
        transport.consumer([queue], lease=60, prefetch=1000, name="one") as consumer,
    ):
        transport.publish(numbered(queue, 1000, due_in=3600, priority=9))
        soon = [a_message(queue, due_in=0.5) for _ in range(20)]

        transport.publish(soon)

        late = lateness(consumer, soon, within=PATIENCE)
        assert late[0] > -EARLY_SECONDS
        assert late[-1] < 3.0


def test_a_delayed_message_does_not_wait_behind_a_full_queue(place: str, queue: str) -> None:
    """It joins the queue when it is due, however many are there, and overtakes what is less urgent."""
    with open_transport(place) as transport:
        urgent = a_message(queue, b"urgent", due_in=0.3, priority=9)
        transport.publish([*numbered(queue, 2000), urgent])

        eventually(lambda: transport.depth(queue).ready == 2001, what="it is ready")

        with transport.consumer([queue], lease=60, prefetch=10, name="one") as consumer:
            assert consumer.receive(1, PATIENCE)[0].message == urgent


@pytest.mark.parametrize(
    "name", ["a.b.c", "*", "#", "a.*.#", "größe-世界", "q" * 200, "\N{ROCKET}" * 200, "x.priority.9"]
)
def test_queues_of_every_name_get_their_own_delayed_messages(place: str, name: str) -> None:
    neighbour = name[:-1] + "!"
    with (
        open_transport(place) as transport,
        transport.consumer([name], lease=60, prefetch=10, name="one") as consumer,
        transport.consumer([neighbour], lease=60, prefetch=10, name="other") as other,
    ):
        mine, theirs = a_message(name, due_in=0.2), a_message(neighbour, due_in=0.2)

        transport.publish([mine, theirs])

        assert [delivery.message.id for delivery in consumer.receive(2, PATIENCE)] == [mine.id]
        assert [delivery.message.id for delivery in other.receive(2, PATIENCE)] == [theirs.id]


def test_what_the_levels_write_into_a_message_does_not_reach_its_receiver(place: str, queue: str) -> None:
    with (
        open_transport(place) as transport,
        transport.consumer([queue], lease=60, prefetch=10, name="one") as consumer,
    ):
        message = a_message(queue, b"body", headers={"mine": 1}, due_in=0.3, priority=2)

        transport.publish([message])

        (delivery,) = consumer.receive(1, PATIENCE)
        assert delivery.message == message
        assert delivery.attempt == 1


def test_a_message_released_for_later_comes_later(place: str, queue: str) -> None:
    with (
        open_transport(place) as transport,
        transport.consumer([queue], lease=60, prefetch=10, name="one") as consumer,
    ):
        transport.publish([a_message(queue)])
        (delivery,) = consumer.receive(1, PATIENCE)
        released = time.monotonic()

        consumer.release([delivery], 0.5)

        (again,) = consumer.receive(1, PATIENCE)
        assert time.monotonic() - released > 0.5 - EARLY_SECONDS
        assert again.attempt == 1


def test_a_delay_longer_than_all_levels_is_held(place: str, queue: str, queue_type: str) -> None:
    delays = QUEUE_TYPES[queue_type]
    with open_transport(place) as transport, channel_at(place) as channel:
        century = a_message(queue, due_in=100 * 365 * 24 * 3600.0)
        route = delays.route(queue, 100 * 365 * 24 * 3600.0)
        assert route is not None

        assert transport.publish([century]) == [STORED]

        assert ready_in(channel, delays.level_name(route.level)) >= 1
        assert transport.depth(queue).ready == 0


def test_a_delayed_message_whose_queue_is_gone_is_kept_and_told(place: str, queue: str) -> None:
    with open_transport(place) as transport, channel_at(place) as channel:
        transport.publish([a_message(queue, due_in=0.1)])
        eventually(lambda: transport.depth(queue).ready == 1, what="the levels work")
        before = ready_in(channel, STRANDED)

        transport.publish([a_message(queue, due_in=1.0)])
        channel.queue_delete(queue_name(parse_url(place).options["prefix"], queue))

        eventually(lambda: ready_in(channel, STRANDED) == before + 1, what="it is stranded")
        assert any(STRANDED in warning for warning in transport.warnings([queue]))
        channel.queue_purge(STRANDED)


def test_a_publisher_of_delayed_messages_alone_notices_that_their_queue_was_deleted(
    place: str, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(declaring, "BOUND_AGAIN_AFTER_SECONDS", 0.0)
    with open_transport(place) as transport, channel_at(place) as channel:
        transport.publish([a_message(queue, due_in=3600)])
        channel.queue_delete(queue_name(parse_url(place).options["prefix"], queue))

        assert transport.publish([a_message(queue, due_in=0.2)]) == [STORED]

        eventually(lambda: transport.depth(queue).ready == 1, what="it arrives")


@pytest.mark.slow
def test_levels_that_somebody_deleted_are_made_again(server: RabbitMQServer, queue: str, queue_type: str) -> None:
    delays = QUEUE_TYPES[queue_type]
    with open_transport(f"{server.url}?queue_type={queue_type}") as transport, channel_at(server.url) as channel:
        transport.publish([a_message(queue, due_in=0.75)])
        eventually(lambda: transport.depth(queue).ready == 1, what="the levels work")
        for level in range(3):
            channel.queue_delete(delays.level_name(level))
            channel.exchange_delete(delays.level_name(level))

        assert transport.publish([a_message(queue, due_in=0.65)]) == [STORED]

        eventually(lambda: transport.depth(queue).ready == 2, what="it arrives")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    """A node of this file's own, which may be killed."""
    with running(lambda: RabbitMQServer(tmp_path_factory.mktemp("rabbitmq-delays"))) as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("by_kill", [False, True], ids=["stopped", "killed"])
def test_delays_outlast_a_restart(server: RabbitMQServer, queue: str, by_kill: bool) -> None:
    with open_transport(server.url) as transport:
        # What is in a quorum queue is lost when the server is killed within a second after the queue was made (3.10.8).
        transport.publish([a_message(queue, b"makes the levels", due_in=40.0), a_message(queue, b"waits", due_in=1.5)])
        eventually(lambda: transport.depth(queue).ready == 1, what="all queues are older than a second")
        # Some end while the server is away, some afterwards.
        messages = [a_message(queue, due_in=1.0 + number * 0.15) for number in range(80)]
        assert transport.publish(messages) == [STORED] * 80

    ended = time.time()
    server.restart(by_kill=by_kill)

    with (
        open_transport(server.url) as transport,
        transport.consumer([queue], lease=60, prefetch=1000, name="one") as consumer,
    ):
        away = time.time() - ended
        late = lateness(consumer, messages, within=60)
    assert late[0] > -EARLY_SECONDS
    # What was to leave one level for the next while the server was away does so when it is back.
    assert late[-1] < away + 5.0
