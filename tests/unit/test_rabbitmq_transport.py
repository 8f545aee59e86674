"""The RabbitMQ transport beyond the contract: its I/O thread, what is parked, bands, other programs, lost channels."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pika
import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportClosed, TransportCrashed
from ekiden.message import LOST, SETTLED, STORED, Delivery, Ending, Message, PublishOutcome, new_id
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import a_message, bodies, numbered
from ekiden.testing.proxy import Proxy
from ekiden.transport import Consumer, Transport
from ekiden.urls import parse_url
from ekiden_rabbitmq import RabbitMQTransport
from ekiden_rabbitmq.io_thread import IOThread, Reply, start
from ekiden_rabbitmq.topology import queue_name

from tests.working import PATIENCE, eventually


@pytest.fixture
def transport(rabbitmq_place: str) -> Iterator[Transport]:
    with open_transport(rabbitmq_place) as transport:
        yield transport


@pytest.fixture
def queue() -> str:
    return f"queue-{new_id()}"


def consume(transport: Transport, *queues: str, prefetch: int = 100, strict: bool = False) -> Consumer:
    return transport.consumer(queues, lease=60, prefetch=prefetch, name=new_id(), strict=strict)


def collect(consumer: Consumer, count: int, *, limit: int = 100) -> list[Delivery]:
    give_up = time.monotonic() + PATIENCE
    collected: list[Delivery] = []
    while len(collected) < count and time.monotonic() < give_up:
        collected += consumer.receive(min(limit, count - len(collected)), 1.0)
    assert len(collected) == count
    return collected


# The I/O thread.


@pytest.fixture
def io() -> Iterator[IOThread]:
    io = IOThread()
    yield io
    io.stop()


async def answered(value: object) -> object:
    return value


async def never() -> None:
    await Reply[None]()


def test_what_is_asked_is_answered_by_the_io_thread(io: IOThread) -> None:
    async def where() -> str:
        await io.sleep(0.001)
        return threading.current_thread().name

    assert io.ask(where, 5, what="asking") == "ekiden-rabbitmq"


def test_many_threads_ask_at_once(io: IOThread) -> None:
    with ThreadPoolExecutor(16) as threads:
        answers = threads.map(lambda number: io.ask(lambda: answered(number), 5, what="asking"), range(1000))

    assert list(answers) == list(range(1000))


def test_what_a_coroutine_raises_reaches_who_asked(io: IOThread) -> None:
    async def refuse() -> None:
        raise BrokerRefused("no")

    with pytest.raises(BrokerRefused, match="no"):
        io.ask(refuse, 5, what="asking")


def test_who_gets_no_answer_is_told_in_time(io: IOThread) -> None:
    with pytest.raises(BrokerUnavailable, match=r"asking: no answer within 0\.05 s"):
        io.ask(never, 0.05, what="asking")


def test_who_still_asks_when_it_stops_is_told(io: IOThread) -> None:
    with ThreadPoolExecutor() as threads:
        asking = threads.submit(io.ask, never, 30, what="asking")
        eventually(lambda: io._questions, what="it asks")
        io.stop()
        with pytest.raises(TransportClosed):
            asking.result(PATIENCE)

    with pytest.raises(TransportClosed):
        io.ask(lambda: answered(1), 5, what="asking")


def test_a_bug_on_the_io_thread_is_told_to_everybody_who_asks(io: IOThread, caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor() as threads:
        asking = threads.submit(io.ask, never, 30, what="asking")
        eventually(lambda: io._questions, what="it asks")
        io.post(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        with pytest.raises(TransportCrashed, match="ZeroDivisionError"):
            asking.result(PATIENCE)

    with pytest.raises(TransportCrashed, match="ZeroDivisionError"):
        io.ask(lambda: answered(1), 5, what="asking")
    assert "the I/O thread has failed" in caplog.text


def test_a_coroutine_goes_on_when_what_it_waits_for_is_there() -> None:
    first: Reply[int] = Reply()
    second: Reply[int] = Reply()
    second.set(2)

    async def add() -> int:
        return await first + await second

    total = start(add())
    assert not total.is_set
    first.set(40)

    assert total.result() == 42


# What is parked.


def test_what_nobody_comes_to_receive_is_anothers_and_was_not_handed_out(transport: Transport, queue: str) -> None:
    transport.publish(numbered(queue, 20))
    absent = consume(transport, queue)
    held = collect(absent, 8, limit=8)
    absent.settle([Ending(delivery) for delivery in held])  # makes room, and the server pushes more

    received = collect(consume(transport, queue), 12)

    assert sorted(bodies(held) + bodies(received)) == sorted(b"%d" % number for number in range(20))
    assert {delivery.attempt for delivery in received} == {1}


def test_a_consumer_that_became_slow_keeps_little_for_itself(transport: Transport, queue: str) -> None:
    transport.publish(numbered(queue, 200))
    slow = consume(transport, queue, prefetch=200)
    slow.settle([Ending(delivery) for delivery in collect(slow, 100)])  # fast until now: much is pushed
    others: list[Delivery] = []
    other = consume(transport, queue, prefetch=200)

    def both_receive() -> bool:
        held = slow.receive(1, 0.1)
        slow.settle([Ending(delivery) for delivery in held])
        others.extend(other.receive(100, 0.05))
        return len(others) > 50

    eventually(both_receive, what="the other one gets most of what is left")
    assert {delivery.attempt for delivery in others} == {1}


@pytest.mark.parametrize("prefetch", [1, 7])
def test_the_server_pushes_no_more_than_prefetch(transport: Transport, queue: str, prefetch: int) -> None:
    transport.publish(numbered(queue, 50))
    consumer = consume(transport, queue, prefetch=prefetch)

    collect(consumer, prefetch)

    assert consumer.receive(100, 0.1) == []
    assert transport.depth(queue).ready == 50 - prefetch


def test_what_is_parked_for_a_stopped_consumer_keeps_its_earlier_hand_outs(transport: Transport, queue: str) -> None:
    transport.publish(numbered(queue, 5))
    for _ in range(2):
        with consume(transport, queue, prefetch=5) as consumer:
            collect(consumer, 5)
    stopping = consume(transport, queue, prefetch=5)
    (one,) = stopping.receive(1, PATIENCE)
    stopping.settle([Ending(one)])

    stopping.stop()

    again = collect(consume(transport, queue), 4)
    assert {delivery.attempt for delivery in [one, *again]} == {3}


# Bands.


@pytest.mark.parametrize("priority", [0, 9])
def test_a_waiting_consumer_hears_of_a_band_that_is_made_later(
    rabbitmq_place: str, transport: Transport, queue: str, priority: int
) -> None:
    consumer = consume(transport, queue)
    assert consumer.receive(1, 0) == []

    with open_transport(rabbitmq_place) as publisher, ThreadPoolExecutor() as threads:
        waiting = threads.submit(consumer.receive, 1, PATIENCE)
        publisher.publish([a_message(queue, b"in a band", priority=priority)])

        assert bodies(waiting.result()) == [b"in a band"]


def test_urgent_messages_come_while_others_are_held_for_long(transport: Transport, queue: str) -> None:
    transport.publish([a_message(queue, b"urgent", priority=9), *numbered(queue, 50)])
    consumer = consume(transport, queue, prefetch=50)
    (first,) = consumer.receive(1, PATIENCE)
    assert first.message.body == b"urgent"

    for number in range(3):  # each of them is held, so the one message that may be parked beside others is used up
        transport.publish([a_message(queue, b"urgent %d" % number, priority=9)])
        within = [collect(consumer, 1)[0].message.body for _ in range(12)]

        assert b"urgent %d" % number in within


# Other programs.


@pytest.fixture
def other_program(rabbitmq_place: str) -> Iterator[Any]:
    """A channel of pika's own, and how a queue of the place is called at the server."""
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq_place.partition("?")[0]))
    yield connection.channel()
    connection.close()


def name_at_server(rabbitmq_place: str, queue: str, priority: int = 4) -> str:
    return queue_name(parse_url(rabbitmq_place).options["prefix"], queue, priority)


def test_what_another_program_publishes_is_received_and_ended(
    rabbitmq_place: str, transport: Transport, queue: str, other_program: Any
) -> None:
    consumer = consume(transport, queue)
    properties = pika.BasicProperties(message_id="theirs", headers={"kind": "foreign", "list": [1]}, priority=7)
    other_program.basic_publish("", name_at_server(rabbitmq_place, queue), b"theirs", properties)

    (delivery,) = collect(consumer, 1)

    assert delivery.message == Message("theirs", queue, b"theirs", {"kind": "foreign"}, 7)
    assert consumer.settle([Ending(delivery)]) == [SETTLED]
    assert transport.depth(queue).ready == 0


def test_another_program_reads_what_is_published(
    rabbitmq_place: str, transport: Transport, queue: str, other_program: Any
) -> None:
    message = a_message(queue, b"ours", headers={"kind": "x"}, priority=4)
    transport.publish([message])

    _, properties, body = other_program.basic_get(name_at_server(rabbitmq_place, queue), auto_ack=True)

    assert (body, properties.message_id, properties.delivery_mode) == (b"ours", message.id, 2)
    assert properties.headers["ekiden"] == '{"headers":{"kind":"x"}}'


# Trouble.


@pytest.fixture
def proxy(rabbitmq_url: str) -> Iterator[Proxy]:
    host = parse_url(rabbitmq_url).hosts[0]
    with Proxy(host.name, host.port or 5672) as proxy:
        yield proxy


@pytest.fixture
def through(rabbitmq_place: str, proxy: Proxy) -> Iterator[Transport]:
    with open_transport(proxy.through(f"{rabbitmq_place}&timeout=5")) as transport:
        yield transport


def test_deliveries_of_a_lost_connection_are_lost_and_name_nothing_to_the_server(
    through: Transport, transport: Transport, proxy: Proxy, queue: str
) -> None:
    through.publish(numbered(queue, 3))
    consumer = consume(through, queue)
    old = collect(consumer, 3)

    proxy.cut()
    new = collect(consumer, 3)
    answers = consumer.settle([Ending(delivery, (a_message(f"{queue}-next"),)) for delivery in old])
    consumer.release(old)

    assert answers == [LOST] * 3
    assert consumer.extend(old) == [LOST] * 3
    assert {delivery.attempt for delivery in new} == {2}
    assert consumer.extend(new) == [SETTLED] * 3
    assert consumer.settle([Ending(delivery) for delivery in new]) == [SETTLED] * 3
    assert transport.depth(f"{queue}-next").ready == 0


def test_what_follows_is_stored_once_although_its_ending_is_tried_again(transport: Transport, queue: str) -> None:
    transport.publish([a_message(queue)])
    consumer = consume(transport, queue)
    (delivery,) = collect(consumer, 1)
    good, bad = a_message(f"{queue}-next"), a_message("q" * 201)

    (failed,) = consumer.settle([Ending(delivery, (good, bad))])
    (settled,) = consumer.settle([Ending(delivery, (good,))])

    assert isinstance(failed.error, BrokerRefused)
    assert settled == SETTLED
    assert transport.depth(f"{queue}-next").ready == 1


def test_a_listener_hears_again_after_its_connection_was_lost(
    through: Transport, transport: Transport, proxy: Proxy, queue: str
) -> None:
    listener = through.listen(queue)

    proxy.cut()

    def heard() -> list[bytes]:
        transport.broadcast(queue, [b"still there?"])
        return listener.receive(0.1)

    eventually(lambda: _unless_unavailable(heard), what="it hears again")


def _unless_unavailable(call: Callable[[], list[bytes]]) -> list[bytes]:
    try:
        return call()
    except BrokerUnavailable:
        return []


@pytest.mark.slow
def test_closing_is_bounded_although_the_server_is_silent(rabbitmq_place: str, proxy: Proxy, queue: str) -> None:
    transport = open_transport(proxy.through(f"{rabbitmq_place}&timeout=1"))
    transport.publish(numbered(queue, 3))
    consumer, listener = consume(transport, queue), transport.listen(queue)
    collect(consumer, 3)

    with proxy.frozen():
        began = time.monotonic()
        transport.close()
        took = time.monotonic() - began

    assert took < 10
    for use in (lambda: consumer.receive(1, 0), lambda: listener.receive(0)):
        with pytest.raises(TransportClosed):
            use()


def test_where_no_server_is_every_call_says_so_soon(queue: str) -> None:
    with open_transport("amqp://user:s3cret@127.0.0.1:1/") as transport:
        began = time.monotonic()
        (answer,) = transport.publish([a_message(queue)])
        for ask in (
            lambda: transport.depth(queue),
            lambda: consume(transport, queue),
            lambda: transport.listen(queue),
            lambda: transport.broadcast(queue, [b""]),
        ):
            with pytest.raises(BrokerUnavailable, match="no server listens there") as caught:
                ask()
            assert "s3cret" not in f"{caught.value!r} {caught.value.__cause__!r}"
        took = time.monotonic() - began

    assert answer.outcome is PublishOutcome.FAILED
    assert "no server listens there" in str(answer.error)
    assert took < 10


def test_a_consumer_that_waits_while_the_server_is_away_is_told_at_its_timeout(
    through: Transport, proxy: Proxy, queue: str
) -> None:
    consumer = consume(through, queue)
    assert consumer.receive(1, 0) == []
    proxy.close()
    began = time.monotonic()

    with pytest.raises(BrokerUnavailable):
        consumer.receive(1, 0.5)

    assert 0.4 < time.monotonic() - began < 5


def test_a_lost_confirm_may_double_a_message_and_never_loses_one(
    through: Transport, transport: Transport, proxy: Proxy, queue: str
) -> None:
    through.publish(numbered(queue, 1))
    proxy.cut()
    message = a_message(queue, b"again")

    eventually(lambda: through.publish([message]) == [STORED], what="it is published")

    ready = transport.depth(queue).ready
    assert ready is not None
    assert ready >= 2


def test_the_transport_tells_how_long_the_server_lets_a_delivery_be_held(rabbitmq_place: str) -> None:
    with open_transport(rabbitmq_place) as transport:
        assert transport.longest_hold == 1800
    with open_transport(f"{rabbitmq_place}&consumer_timeout=60") as transport:
        assert transport.longest_hold == 60


def test_it_needs_no_connection_before_its_first_use(queue: str) -> None:
    transport = RabbitMQTransport(parse_url("amqp://127.0.0.1:1/"))

    names = {thread.name for thread in threading.enumerate()}
    transport.close()

    assert "ekiden-rabbitmq" not in names
