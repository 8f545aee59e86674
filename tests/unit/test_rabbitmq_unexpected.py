"""What no server should say, no queue should do and no code should raise: each costs one call or one channel."""

from __future__ import annotations

import signal
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pika
import pika.exceptions
import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportCrashed
from ekiden.message import LOST, SETTLED, STORED, Delivery, Ending, PublishOutcome, SettleOutcome, new_id
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import a_message, bodies, numbered
from ekiden.testing.proxy import Proxy
from ekiden.transport import Consumer, Transport
from ekiden.urls import parse_url
from ekiden_rabbitmq import RabbitMQTransport, encoding, frames, io_thread
from ekiden_rabbitmq.connection import BROKER_ERRORS
from ekiden_rabbitmq.io_thread import IOThread
from ekiden_rabbitmq.publishing import Publisher
from ekiden_rabbitmq.topology import queue_name
from pika import spec
from pika.frame import Body, Header, Method

from tests.working import PATIENCE, eventually


@pytest.fixture
def queue() -> str:
    return f"queue-{new_id()}"


@pytest.fixture
def proxy(rabbitmq_url: str) -> Iterator[Proxy]:
    host = parse_url(rabbitmq_url).hosts[0]
    with Proxy(host.name, host.port or 5672) as proxy:
        yield proxy


@pytest.fixture
def transport(rabbitmq_place: str, proxy: Proxy) -> Iterator[RabbitMQTransport]:
    with open_transport(proxy.through(f"{rabbitmq_place}&timeout=5")) as transport:
        assert isinstance(transport, RabbitMQTransport)
        yield transport


@pytest.fixture
def server_side(rabbitmq_place: str) -> Iterator[Any]:
    """A channel of somebody who deletes queues."""
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq_place.partition("?")[0]))
    yield connection.channel()
    connection.close()


def at_server(rabbitmq_place: str, queue: str) -> str:
    return queue_name(parse_url(rabbitmq_place).options["prefix"], queue)


def consume(transport: Transport, *queues: str, name: str | None = None) -> Consumer:
    return transport.consumer(queues, lease=60, prefetch=100, name=name or new_id())


def collect(consumer: Consumer, count: int) -> list[Delivery]:
    give_up = time.monotonic() + PATIENCE
    collected: list[Delivery] = []
    while len(collected) < count and time.monotonic() < give_up:
        try:
            collected += consumer.receive(count - len(collected), 1.0)
        except BrokerUnavailable:
            continue
    assert len(collected) == count
    return collected


def published(transport: Transport, queue: str, body: bytes) -> bool:
    (answer,) = transport.publish([a_message(queue, body)])
    assert answer.error is None or isinstance(answer.error, BrokerUnavailable)
    return answer.outcome is PublishOutcome.STORED


# What is asked while pika tells one channel after another that their connection is lost.


def test_a_channel_that_is_used_while_another_one_hears_of_the_loss_costs_nothing(
    transport: RabbitMQTransport, proxy: Proxy
) -> None:
    told: list[BaseException | None] = []

    async def lose_the_connection() -> None:
        connection = transport._connection("a test")
        one, two = await connection.channel(), await connection.channel()

        def use_the_other(error: BaseException) -> None:
            for use in (two.barrier, lambda: two.break_off(ValueError("a bug"), doing="a test")):
                try:
                    use()
                    told.append(None)
                except BROKER_ERRORS as raised:
                    told.append(raised)
            told.append(error)

        one.on_closed = use_the_other
        proxy.cut()
        lost = transport._io.sleep(PATIENCE)
        one._channel.add_on_close_callback(lambda *_: transport._io.post(lambda: lost.set(None)))
        await lost
        await connection.close(1.0)

    transport._io.ask(lose_the_connection, PATIENCE, what="losing a connection")

    assert [type(each) for each in told] == [
        pika.exceptions.StreamLostError,
        type(None),
        pika.exceptions.StreamLostError,
    ]
    transport._io.check()


# What a server says.


def content(method: Any, properties: bytes = b"\0\0") -> list[bytes]:
    """A message's frames, for each channel that there may be."""
    said = []
    for channel in range(1, 8):
        header = Header(channel, 1, pika.BasicProperties().decode(properties)).marshal()
        said.append(Method(channel, method).marshal() + header + Body(channel, b"x").marshal())
    return said


def methods(method: Any) -> list[bytes]:
    return [Method(channel, method).marshal() for channel in range(1, 8)]


def payloads(kind: int, payload: bytes) -> list[bytes]:
    return [struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce" for channel in range(1, 8)]


UNEXPECTED = {
    "a delivery for nobody": content(spec.Basic.Deliver("nobody", 1, redelivered=False, exchange="", routing_key="k")),
    "a message that nobody asked for": content(spec.Basic.GetOk(1, False, "", "k", 0)),
    "no message that nobody asked for": methods(spec.Basic.GetEmpty()),
    "a returned message that was not sent": content(spec.Basic.Return(312, "NO_ROUTE", "", "k")),
    "a confirmation of nothing": methods(spec.Basic.Ack(2**40, multiple=False)),
    "a confirmation of more than there is": methods(spec.Basic.Ack(2**40, multiple=True)),
    "a refusal of nothing": methods(spec.Basic.Nack(2**40, multiple=False)),
    "the answer to no barrier": methods(spec.Channel.FlowOk(True)),
    "the end of an unknown consumer": methods(spec.Basic.Cancel("nobody", nowait=True)),
    "the answer to no declaration": methods(spec.Queue.DeclareOk("q", 0, 0)),
    "the answer to no recovery": methods(spec.Basic.RecoverOk()),
    "a method that does not exist": payloads(frames.METHOD, struct.pack(">HH", 60, 99)),
    "a method of a class that does not exist": payloads(frames.METHOD, struct.pack(">HH", 999, 9)),
    "a delivery that ends in its middle": payloads(frames.METHOD, struct.pack(">IB", frames.BASIC_DELIVER, 200)),
    "a confirmation that ends in its middle": payloads(frames.METHOD, struct.pack(">I", frames.BASIC_ACK)),
    "a method of no bytes": payloads(frames.METHOD, b""),
    "properties of nothing": payloads(frames.HEADER, struct.pack(">HHQ", 60, 0, 5) + b"\0\0"),
    "a body of nothing": payloads(frames.BODY, b"body"),
    "a frame of an unknown kind": payloads(5, b"what"),
    "no frame at all": [b"HTTP/1.1 400 Bad Request\r\n\r\n"],
}


@pytest.mark.parametrize("said", UNEXPECTED.values(), ids=UNEXPECTED)
@pytest.mark.slow
def test_what_a_server_should_not_say_costs_a_channel_or_a_connection(
    transport: RabbitMQTransport, proxy: Proxy, queue: str, said: list[bytes]
) -> None:
    consumer, listener = consume(transport, queue), transport.listen(queue)
    transport.publish(numbered(queue, 3))
    (held, *_) = collect(consumer, 3)
    thread = transport._io

    for frame in said:
        proxy.say(frame)

    eventually(lambda: published(transport, queue, b"after"), what="publishing works")
    assert consumer.settle([Ending(held)]) in [[SETTLED], [LOST]]
    eventually(lambda: b"after" in bodies(received(consumer)), what="receiving works")
    eventually(lambda: heard(transport, listener.receive, queue), what="listening works")
    assert transport._io is thread
    assert not thread.has_crashed


def received(consumer: Consumer) -> list[Delivery]:
    try:
        return consumer.receive(10, 0.1)
    except BrokerUnavailable:
        return []


def heard(transport: Transport, receive: Any, topic: str) -> bool:
    try:
        transport.broadcast(topic, [b"still there?"])
        return bool(receive(0.2))
    except BrokerUnavailable:
        return False


# Subscriptions that the server ends.


def test_what_was_held_of_a_deleted_queue_is_lost_and_nothing_else(
    rabbitmq_place: str, transport: RabbitMQTransport, server_side: Any, queue: str
) -> None:
    deleted, kept = f"{queue}-deleted", f"{queue}-kept"
    transport.publish([*numbered(deleted, 3), *numbered(kept, 3)])
    consumer = consume(transport, deleted, kept)
    held = collect(consumer, 6)
    of = {name: [each for each in held if each.message.queue == name] for name in (deleted, kept)}

    server_side.queue_delete(at_server(rabbitmq_place, deleted))

    eventually(lambda: consumer.extend(of[deleted]) == [LOST] * 3, what="what was held is lost")
    assert consumer.extend(of[kept]) == [SETTLED] * 3
    follow_up = a_message(f"{queue}-next")
    assert consumer.settle([Ending(each, (follow_up,)) for each in of[deleted]]) == [LOST] * 3
    consumer.release(of[deleted])
    assert consumer.settle([Ending(each) for each in of[kept]]) == [SETTLED] * 3
    assert transport.depth(kept).ready == transport.depth(f"{queue}-next").ready == 0
    eventually(lambda: published(transport, deleted, b"again"), what="published")
    (again,) = collect(consumer, 1)
    assert (again.message.body, again.attempt) == (b"again", 1)
    assert consumer.settle([Ending(again)]) == [SETTLED]


def test_a_consumer_works_as_fast_after_the_server_took_something_back(
    rabbitmq_place: str, transport: RabbitMQTransport, server_side: Any, queue: str
) -> None:
    """Acknowledgements of several at once would name what is not ours any more."""
    deleted = f"{queue}-deleted"
    transport.publish([*numbered(deleted, 3), *numbered(queue, 300)])
    consumer = consume(transport, deleted, queue)
    held = collect(consumer, 100)
    server_side.queue_delete(at_server(rabbitmq_place, deleted))
    of_deleted = [each for each in held if each.message.queue == deleted]
    eventually(lambda: consumer.extend(of_deleted) == [LOST] * len(of_deleted), what="lost")

    settled = consumer.settle([Ending(each) for each in held])
    while settled.count(SETTLED) < 300:
        settled += consumer.settle([Ending(each) for each in collect(consumer, 1)])

    assert transport.depth(queue).ready == 0


@pytest.mark.parametrize("tag", ["listener", "announcements", "1"])
@pytest.mark.slow
def test_a_subscription_that_the_server_ends_is_made_again(
    rabbitmq_place: str, transport: RabbitMQTransport, proxy: Proxy, queue: str, tag: str
) -> None:
    consumer, listener = consume(transport, queue), transport.listen(queue)
    assert consumer.receive(1, 0) == []

    for frame in methods(spec.Basic.Cancel(tag, nowait=True)):
        proxy.say(frame)

    eventually(lambda: heard(transport, listener.receive, queue), what="it hears again")
    transport.publish([a_message(queue, b"ordinary")])
    assert bodies(collect(consumer, 1)) == [b"ordinary"]
    with open_transport(rabbitmq_place) as other:
        other.publish([a_message(queue, b"of a new band", priority=9)])
    assert bodies(collect(consumer, 1)) == [b"of a new band"]


# Errors of our own.


class Bug(Exception):
    """What no code expects."""


def crash(transport: RabbitMQTransport) -> None:
    """What a bug does that belongs to no call."""

    def fail() -> None:
        raise Bug("of ours")

    transport._io.post(fail)


def test_a_crash_is_told_to_a_consumer_and_what_it_held_is_anothers(
    rabbitmq_place: str, transport: RabbitMQTransport, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    transport.publish([a_message(queue, b"held")])
    consumer, listener = consume(transport, queue), transport.listen(queue)
    (held,) = collect(consumer, 1)
    with ThreadPoolExecutor() as threads:
        receiving, hearing = threads.submit(consumer.receive, 1, 60.0), threads.submit(listener.receive, 60.0)
        eventually(lambda: consumer._intake.receiving, what="it waits")  # type: ignore[attr-defined]

        crash(transport)

        for waiting in (receiving, hearing):
            with pytest.raises(TransportCrashed, match="Bug"):
                waiting.result(PATIENCE)
    for _ in range(2):
        for ask in (lambda: consumer.receive(1, 0), lambda: consumer.release([held]), lambda: listener.receive(0)):
            with pytest.raises(TransportCrashed):
                ask()
        for (answer,) in (consumer.settle([Ending(held)]), consumer.extend([held])):
            assert answer.outcome is SettleOutcome.FAILED
            assert isinstance(answer.error, TransportCrashed)
    consumer.close()
    listener.close()
    with open_transport(rabbitmq_place) as other:
        assert bodies(collect(consume(other, queue), 1)) == [b"held"]
    assert [record.levelname for record in caplog.records if "I/O thread has failed" in record.message] == ["CRITICAL"]


def test_after_a_crash_a_transport_works_on_with_another_thread(transport: RabbitMQTransport, queue: str) -> None:
    assert transport.publish([a_message(queue, b"before")]) == [STORED]
    crashed = transport._io
    crash(transport)
    eventually(lambda: crashed.has_crashed, what="it has crashed")

    assert transport.publish([a_message(queue, b"after")]) == [STORED]
    assert transport.depth(queue).ready == 2
    assert sorted(bodies(collect(consume(transport, queue), 2))) == [b"after", b"before"]
    assert heard(transport, transport.listen(queue).receive, queue)
    assert transport.stalled() is None


def test_a_publish_under_way_in_a_crash_is_told_at_once(transport: RabbitMQTransport, proxy: Proxy, queue: str) -> None:
    transport.publish([a_message(queue)])
    with ThreadPoolExecutor() as threads, proxy.frozen():
        publishing = threads.submit(transport.publish, [a_message(queue)])
        asking = threads.submit(transport.depth, queue)
        eventually(lambda: transport._io._at_crash and transport._io._questions, what="both wait")

        crash(transport)

        for waiting in (publishing, asking):
            with pytest.raises(TransportCrashed):
                waiting.result(PATIENCE)


def test_a_bug_with_one_message_of_a_batch_refuses_that_one(
    transport: RabbitMQTransport, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = Publisher._route

    async def route(self: Publisher, parcels: Any) -> Any:
        if any(parcel.body == b"poison" for parcel in parcels):
            raise Bug(parcels)
        return await ordinary(self, parcels)

    monkeypatch.setattr(Publisher, "_route", route)
    thread = transport._io

    answers = transport.publish([a_message(queue), a_message(queue, b"poison"), *numbered(queue, 3)])

    assert [answer.outcome.value for answer in answers] == ["stored", "failed", "stored", "stored", "stored"]
    assert isinstance(answers[1].error, BrokerRefused)
    assert transport._io is thread


def test_a_bug_with_a_delivery_costs_the_consumers_channel(
    transport: RabbitMQTransport, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = consume(transport, queue)
    transport.publish([a_message(queue, b"first")])
    (first,) = collect(consumer, 1)
    ordinary, failed = encoding.decode, threading.Event()

    def decode(*arguments: Any, **options: Any) -> encoding.Arrived:
        if threading.current_thread().name == "ekiden-rabbitmq" and not failed.is_set():
            failed.set()
            raise Bug(arguments)
        return ordinary(*arguments, **options)

    monkeypatch.setattr(encoding, "decode", decode)
    consumer.close()  # what comes again is read on the I/O thread
    consumer = consume(transport, queue)

    (again,) = collect(consumer, 1)

    assert again.message.id == first.message.id
    assert failed.is_set()
    assert consumer.settle([Ending(again)]) == [SETTLED]
    assert not transport._io.has_crashed


def test_bugs_without_end_are_a_crash(io: IOThread, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(io_thread.SURVIVES):
        io.post(lambda: io.survived(Bug("again"), doing="a test"))

    eventually(lambda: io.has_crashed, what="it gives up")
    with pytest.raises(TransportCrashed):
        io.check()


@pytest.fixture
def io() -> Iterator[IOThread]:
    io = IOThread()
    yield io
    io.stop()


def test_a_thread_that_is_stuck_is_told(
    transport: RabbitMQTransport, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io_thread, "STALLED_AFTER_SECONDS", 0.05)
    assert transport.stalled() is None
    transport.publish([a_message(queue)])
    stuck = threading.Event()
    transport._io.post(lambda: void(stuck.wait(PATIENCE)))

    told = eventually(transport.stalled, what="it is told")

    assert "the I/O thread has not moved for" in told
    stuck.set()
    eventually(lambda: transport.stalled() is None, what="it moves again")


def void(_value: object) -> None:
    """Of a call whose value nobody wants."""


# Exceptions out of signal handlers.


class Interrupted(Exception):
    """Raised by a signal handler."""


@pytest.fixture
def interrupting() -> Iterator[None]:
    """SIGUSR1 raises in the main thread."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield
    signal.signal(signal.SIGUSR1, before)


def interrupt_when_it_publishes(io: IOThread, before: int) -> None:
    """Interrupt the main thread once it is publishing: there are more to be told of a crash than ``before``."""
    ident = threading.main_thread().ident
    assert ident is not None
    eventually(lambda: len(io._at_crash) > before, what="it publishes")
    signal.pthread_kill(ident, signal.SIGUSR1)


def test_what_is_published_again_after_an_interruption_is_stored_once(
    transport: RabbitMQTransport, proxy: Proxy, queue: str, interrupting: None
) -> None:
    transport.publish([a_message(queue, b"first")])
    mine, theirs = numbered(queue, 2), a_message(queue, b"another's", due_in=0.2)

    with ThreadPoolExecutor() as threads, proxy.frozen():
        threads.submit(interrupt_when_it_publishes, transport._io, len(transport._io._at_crash))
        with pytest.raises(Interrupted):
            transport.publish([*mine, theirs])
    # As the next caller of a group commit does, for those who did not get an answer.
    assert transport.publish([a_message(queue, b"new"), theirs, mine[1]]) == [STORED] * 3

    eventually(lambda: transport.depth(queue).ready == 5, what="what was delayed is there")
    found = sorted(bodies(collect(consume(transport, queue), 5)))
    assert found == [b"0", b"1", b"another's", b"first", b"new"]


def test_another_message_of_the_same_id_is_stored_after_an_interruption(
    transport: RabbitMQTransport, proxy: Proxy, queue: str, interrupting: None
) -> None:
    transport.publish([a_message(queue, b"first")])
    one = a_message(queue, b"one")

    with ThreadPoolExecutor() as threads, proxy.frozen():
        threads.submit(interrupt_when_it_publishes, transport._io, len(transport._io._at_crash))
        with pytest.raises(Interrupted):
            transport.publish([one])
    assert transport.publish([a_message(queue, b"other", id=one.id)]) == [STORED]

    assert sorted(bodies(collect(consume(transport, queue), 3))) == [b"first", b"one", b"other"]


def test_what_was_being_settled_when_it_was_interrupted_can_be_settled_again(
    transport: RabbitMQTransport, proxy: Proxy, queue: str, interrupting: None
) -> None:
    transport.publish([a_message(queue)])
    consumer = consume(transport, queue)
    (held,) = collect(consumer, 1)
    follow_up = a_message(f"{queue}-next")

    with ThreadPoolExecutor() as threads, proxy.frozen():
        threads.submit(interrupt_when_it_publishes, transport._io, len(transport._io._at_crash))
        with pytest.raises(Interrupted):
            consumer.settle([Ending(held, (follow_up,))])

    assert consumer.settle([Ending(held, (follow_up,))]) == [SETTLED]
    assert transport.depth(queue).ready == 0
    assert transport.depth(f"{queue}-next").ready == 1


def test_a_thread_that_was_interrupted_while_it_started_the_loop_leaves_it_to_the_next(
    io: IOThread, interrupting: None
) -> None:
    async def answered() -> int:
        return 1

    ordinary = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        ordinary(thread)
        signal.raise_signal(signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(Interrupted):
            io.ask(answered, 5, what="asking")

    assert io.ask(answered, 5, what="asking") == 1
    assert sum(thread.name == "ekiden-rabbitmq" for thread in threading.enumerate()) == 1


def test_a_wake_up_that_was_interrupted_is_not_missed(io: IOThread, interrupting: None) -> None:
    async def answered() -> int:
        return 1

    assert io.ask(answered, 5, what="asking") == 1
    loop = io.loop
    ordinary, first = loop.add_callback_threadsafe, threading.Event()

    def interrupted(call: Any) -> None:
        if not first.is_set():
            first.set()
            signal.raise_signal(signal.SIGUSR1)
        ordinary(call)

    loop.add_callback_threadsafe = interrupted  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        io.ask(answered, 5, what="asking")

    assert io.ask(answered, 5, what="asking") == 1
