"""What other programs send, declare and announce at a RabbitMQ server harms no worker of ours."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from typing import Any

import pika
import pytest
from ekiden import Ekiden
from ekiden.errors import BrokerRefused
from ekiden.message import SETTLED, STORED, Delivery, Ending, PublishOutcome, new_id
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import a_message, bodies, numbered
from ekiden.transport import Consumer, Transport
from ekiden.urls import parse_url
from ekiden_rabbitmq import RabbitMQTransport, encoding, intake
from ekiden_rabbitmq.topology import queue_name

from tests.working import PATIENCE, dead_letters, eventually, the_dead_letter


@pytest.fixture
def transport(rabbitmq_place: str) -> Iterator[RabbitMQTransport]:
    with open_transport(rabbitmq_place) as transport:
        assert isinstance(transport, RabbitMQTransport)
        yield transport


@pytest.fixture
def queue() -> str:
    return f"queue-{new_id()}"


@pytest.fixture
def other_program(rabbitmq_place: str) -> Iterator[Any]:
    """A channel of pika's own."""
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq_place.partition("?")[0]))
    yield connection.channel()
    connection.close()


def at_server(place: str, queue: str, priority: int = 4) -> str:
    return queue_name(parse_url(place).options["prefix"], queue, priority)


def consume(transport: Transport, *queues: str, name: str | None = None, prefetch: int = 100) -> Consumer:
    return transport.consumer(queues, lease=60, prefetch=prefetch, name=name or new_id())


def collect(consumer: Consumer, count: int) -> list[Delivery]:
    give_up = time.monotonic() + PATIENCE
    collected: list[Delivery] = []
    while len(collected) < count and time.monotonic() < give_up:
        collected += consumer.receive(count - len(collected), 1.0)
    assert len(collected) == count
    return collected


# Messages.


STRANGE: dict[str, pika.BasicProperties] = {
    "nothing at all": pika.BasicProperties(),
    "headers of every kind": pika.BasicProperties(
        headers={"list": [1, [2]], "table": {"a": {"b": None}}, "none": None}
    ),
    "headers as large as a frame": pika.BasicProperties(headers={f"h{n}": "x" * 1000 for n in range(128)}),
    "one header as large as a frame": pika.BasicProperties(headers={"large": "\x01" * 130_000}),
    "endless hand-outs": pika.BasicProperties(headers={"ekiden-handouts": 2**63 - 1}),
    "fewer than no hand-outs": pika.BasicProperties(headers={"ekiden-handouts": -(2**63)}),
    "a count of the server's": pika.BasicProperties(headers={"x-delivery-count": 2**63 - 1, "x-acquired-count": -7}),
    "a lap that never ends": pika.BasicProperties(headers={"ekiden-lap": True, "ekiden": '{"due":1e308}'}),
    "our header, of other things": pika.BasicProperties(headers={"ekiden": '{"headers":{"a":[1]},"id":[],"due":"x"}'}),
    "a deep header": pika.BasicProperties(headers={"ekiden": "[" * 50_000}),
    "a reply to a queue that cannot be": pika.BasicProperties(headers={"ekiden-reply-to": "x" * 10_000}),
    "an id of zero bytes": pika.BasicProperties(message_id="\0\0"),
    "priority 255 and every property": pika.BasicProperties(
        content_type="x" * 255,
        content_encoding="y" * 255,
        priority=255,
        correlation_id="c" * 255,
        reply_to="r" * 255,
        message_id="m" * 255,
        timestamp=2**63,
        type="t" * 255,
        app_id="a" * 255,
    ),
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.slow
def test_a_workers_other_calls_go_on_and_what_is_no_call_is_buried(
    rabbitmq_place: str, other_program: Any, name: str
) -> None:
    with Ekiden("ours", broker=rabbitmq_place) as app:

        @app.task
        def double(number: int) -> int:
            return 2 * number

        with app.worker(threads=2) as running:
            other_program.basic_publish("", at_server(rabbitmq_place, "default"), b"no call", STRANGE[name])

            assert [double.delay(number).get(PATIENCE) for number in range(5)] == [0, 2, 4, 6, 8]
            if "lap" not in name:
                assert the_dead_letter(app).body == b"no call"
            else:
                eventually(lambda: app.transport.depth("default").ready == 0, what="it is sent on its lap")
        assert running.worker is not None


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
def test_a_call_without_an_id_runs_although_its_workers_died(
    rabbitmq_place: str, other_program: Any, queue_type: str
) -> None:
    """Each hand-out gave it another id, and the fence took the third one for another copy of the call."""
    place = f"{rabbitmq_place}&queue_type={queue_type}"
    with Ekiden("ours", broker=place, result_backend=f"memory://{new_id()}") as app:

        @app.task
        def double(number: int) -> int:
            return 2 * number

        with open_transport(place) as transport:
            double.apply_async((4,), task_id="theirs")
            (sent,) = collect(consume(transport, "default"), 1)
        body, headers = sent.message.body, dict(sent.message.headers)
        app.transport.purge("default")
        name = at_server(rabbitmq_place, "default")
        other_program.basic_publish("", name, body, pika.BasicProperties(headers=headers))
        ids = set()
        for _ in range(3):  # their workers die
            with open_transport(place) as doomed:
                (delivery,) = collect(consume(doomed, "default"), 1)
                ids.add(delivery.message.id)

        with app.worker(threads=1):
            assert app.AsyncResult("theirs").get(PATIENCE) == 8
        assert len(ids) == 2  # as it came, and as it was given one


# What is large.


def test_a_message_with_large_headers_is_refused_and_harms_nobody(transport: RabbitMQTransport, queue: str) -> None:
    transport.publish([a_message(queue)])
    generation = transport._publishing.generation

    answers = transport.publish(
        [
            a_message(queue),
            a_message(queue, headers={"large": "x" * 200_000}),
            a_message(queue, id="i" * 200_000),
            a_message(queue, headers={f"name {number}": number for number in range(20_000)}),
            a_message(queue),
        ]
    )

    assert [answer.outcome for answer in answers] == [STORED.outcome, *[PublishOutcome.FAILED] * 3, STORED.outcome]
    for answer in answers[1:4]:
        assert isinstance(answer.error, BrokerRefused)
        assert len(str(answer.error)) < 400
    assert transport._publishing.generation == generation


def test_the_largest_headers_come_through_and_back_and_to_the_dead_letters(
    rabbitmq_place: str, queue: str, other_program: Any
) -> None:
    headers: dict[str, Any] = {"a": "x" * (encoding.LARGEST_HEADERS_BYTES - 1000)}
    with Ekiden("ours", broker=rabbitmq_place) as app:

        @app.task(max_retries=0)
        def fail() -> None:
            raise ValueError("\x01" * 2000)

        fail.apply_async(headers=headers)
        consumer = consume(app.transport, "default")
        (delivery,) = collect(consumer, 1)
        assert delivery.message.headers["a"] == headers["a"]
        consumer.release([delivery], 0.2)
        consumer.close()
        with app.worker(threads=1):
            assert the_dead_letter(app).headers["a"] == headers["a"]


def test_what_cannot_be_published_again_is_set_aside_and_given_back_as_it_is(
    transport: RabbitMQTransport, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the server was told meanwhile to take no messages of that size."""
    transport.publish([a_message(queue, b"large"), *numbered(queue, 3)])
    consumer = consume(transport, queue, prefetch=1)
    (large,) = collect(consumer, 1)
    monkeypatch.setattr(intake, "SET_ASIDE_SECONDS_AT_MOST", 0.5)
    monkeypatch.setattr(encoding, "LARGEST_HEADERS_BYTES", -1)
    monkeypatch.setattr(encoding, "OVERHEAD_BYTES", encoding.FRAME_BYTES)  # nothing fits

    consumer.release([large], 3600.0)

    assert bodies(take(consumer, 3)) == [b"0", b"1", b"2"]
    (again,) = collect(consumer, 1)
    assert (again.message, again.attempt) == (large.message, 2)
    consumer.release([again])
    (again,) = collect(consumer, 1)
    assert (again.message, again.attempt) == (large.message, 3)


def take(consumer: Consumer, count: int) -> list[Delivery]:
    """Receive and settle one after the other."""
    taken = []
    for _ in range(count):
        taken += collect(consumer, 1)
        assert consumer.settle([Ending(taken[-1])]) == [SETTLED]
    return taken


# Announcements.


def test_a_forged_announcement_makes_no_consumer_drop_what_it_holds(
    rabbitmq_place: str, transport: RabbitMQTransport, queue: str, other_program: Any
) -> None:
    transport.publish(numbered(queue, 3))
    consumer = consume(transport, queue, name="mine")
    held = collect(consumer, 3)
    exchange = f"{parse_url(rabbitmq_place).options['prefix']}ekiden.announcements"

    for announcement in FORGED:
        text = json.dumps(announcement).replace("QUEUE", queue)
        other_program.basic_publish(exchange, "", text.encode())
    other_program.basic_publish(exchange, "", b"[" * 100_000)
    other_program.basic_publish(exchange, "", struct.pack(">Q", 7))
    with open_transport(rabbitmq_place) as later:
        later.publish([a_message(f"{queue}-other", priority=0)])  # is announced after them
        eventually(lambda: consumer.extend(held) == [SETTLED] * 3, what="it holds them still")

        assert consumer.settle([Ending(each) for each in held]) == [SETTLED] * 3
        later.publish([a_message(queue, b"after", priority=9)])
        (after,) = collect(consumer, 1)
        assert (after.message.body, after.attempt) == (b"after", 1)


FORGED = [
    {"type": "consumer", "name": "mine", "instance": "another"},
    {"type": "consumer", "name": "mine", "instance": ""},
    {"type": "consumer", "name": "mine", "instance": "x" * 10_000},
    {"type": "consumer", "name": "mine"},
    {"type": "band", "queue": "QUEUE", "priority": 99},
    {"type": "band", "queue": "QUEUE", "priority": -1},
    {"type": "band", "queue": "QUEUE", "priority": 2**70},
    {"type": "band", "queue": "\x00" * 1000, "priority": 9},
    {"type": "band", "queue": "QUEUE", "priority": 3},
    {"type": "what"},
    [],
]


def test_a_late_announcement_of_a_consumer_that_is_gone_is_none(
    rabbitmq_place: str, transport: RabbitMQTransport, queue: str, other_program: Any
) -> None:
    with open_transport(rabbitmq_place) as earlier:
        earlier.listen(queue)
        consume(earlier, queue, name="slot")
        (instance,) = [instance for _, instance in earlier._intakes]  # type: ignore[attr-defined]
    transport.publish([a_message(queue)])
    consumer = consume(transport, queue, name="slot")
    held = collect(consumer, 1)

    exchange = f"{parse_url(rabbitmq_place).options['prefix']}ekiden.announcements"
    text = json.dumps({"type": "consumer", "name": "slot", "instance": instance})
    other_program.basic_publish(exchange, "", text.encode())

    with open_transport(rabbitmq_place) as later:
        later.publish([a_message(queue, b"of a new band", priority=9)])  # is announced after it
        assert bodies(collect(consumer, 1)) == [b"of a new band"]
    assert consumer.extend(held) == [SETTLED]


def test_dead_letters_show_whatever_came(rabbitmq_place: str, other_program: Any) -> None:
    with Ekiden("ours", broker=rabbitmq_place) as app:
        app.transport.publish([a_message("default.dead")])
        for properties in STRANGE.values():
            other_program.basic_publish("", at_server(rabbitmq_place, "default.dead"), b"no call", properties)

        found = eventually(lambda: len(dead_letters(app)) == len(STRANGE) + 1, what="all are there")

        assert found
