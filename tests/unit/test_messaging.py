"""Queues and topics without tasks, as a user has them."""

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ekiden import memory
from ekiden.errors import (
    BrokerRefused,
    BrokerUnavailable,
    ConfigurationError,
    MessageError,
    MisuseError,
    TaskArgumentsError,
    TransportClosed,
    TransportCrashed,
)
from ekiden.message import Depth, Message, Settled, SettleOutcome, new_id
from ekiden.messaging import MOST_HELD, Broadcast, Connection, Received, connect
from ekiden.testing.conformance.pace import assert_quick

from tests.working import PATIENCE, eventually


@pytest.fixture
def url() -> Iterator[str]:
    name = new_id()
    yield f"memory://{name}"
    memory.discard(name)


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    with connect(url) as connection:
        yield connection


@dataclass
class Order:
    number: int
    at: datetime


def got(connection: Connection, queue: str = "queue") -> Received:
    item = connection.queue(queue).get(5)
    assert item is not None
    return item


VALUES = [None, True, 0, -1, 2**63 - 1, 0.5, "", "Grüße 世界", [], [1, [2, None]], {}, {"a": {"b": [1]}}]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_json_value_comes_back_as_it_was(connection: Connection, value: object) -> None:
    message_id = connection.queue("queue").put(value)

    item = got(connection)

    assert item.value == value
    assert type(item.value) is type(value)
    assert (item.id, item.attempt) == (message_id, 1)
    assert item.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "value",
    [b"", b"\x00\xff", bytes(range(256)), bytearray(b"abc"), memoryview(b"abc")],
    ids=["none", "two", "every value", "bytearray", "memoryview"],
)
def test_bytes_pass_unchanged(connection: Connection, value: bytes) -> None:
    connection.queue("queue").put(value)

    item = got(connection)

    assert item.value == item.body == bytes(value)
    assert item.headers["content-type"] == "application/octet-stream"


def test_what_has_a_json_form_is_put_in_it(connection: Connection) -> None:
    connection.queue("queue").put(Order(7, datetime(2026, 1, 2, tzinfo=UTC)))

    assert got(connection).value == {"number": 7, "at": "2026-01-02T00:00:00Z"}


@pytest.mark.parametrize(
    "value", [object(), {"f": print}, {1j: 2}, "\ud800"], ids=["object", "function", "key", "half"]
)
def test_a_value_that_json_cannot_carry_is_refused(connection: Connection, value: object) -> None:
    with pytest.raises(TaskArgumentsError, match="cannot be put") as caught:
        connection.queue("queue").put(value)

    assert isinstance(caught.value, TypeError)
    assert connection.queue("queue").depth() == Depth(0, 0, 0)


def test_headers_travel_along(connection: Connection) -> None:
    connection.queue("queue").put(b"png", headers={"content-type": "image/png", "size": 3})

    assert dict(got(connection).headers) == {"content-type": "image/png", "size": 3}


@pytest.mark.parametrize("name", ["ekiden-secret", "content-type"])
def test_a_header_of_ours_is_refused(connection: Connection, name: str) -> None:
    with pytest.raises(TaskArgumentsError, match=name):
        connection.queue("queue").put(1, headers={name: "x"})


def test_what_the_broker_refuses_is_raised(connection: Connection) -> None:
    with pytest.raises(BrokerRefused, match="priorities are 0 to 9, this one is 12"):
        connection.queue("queue").put(1, priority=12)


def test_a_full_broker_is_told(url: str) -> None:
    with connect(f"{url}?max_messages=3") as connection:
        with pytest.raises(BrokerUnavailable, match="full") as caught:
            connection.queue("queue").put_many(range(5))

        assert caught.value.__notes__ == ["2 of 5 messages were not stored; the first is number 3."]


@pytest.mark.parametrize("name", ["", "q" * 201, "a\nb"])
def test_a_name_that_cannot_be_a_queue_is_refused_at_once(connection: Connection, name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be a queue"):
        connection.queue(name)


def test_urgent_values_come_first_and_delayed_ones_later(connection: Connection) -> None:
    queue = connection.queue("queue")
    queue.put("later", delay=0.2, priority=9)
    queue.put("normal")
    queue.put("urgent", priority=9)

    assert [item.value for item in queue.iterate(timeout=0.05)] == ["urgent", "normal"]
    assert got(connection).value == "later"


def test_many_values_keep_their_order_and_have_ids(connection: Connection) -> None:
    queue = connection.queue("queue")

    ids = queue.put_many(iter(range(900)))

    assert len(set(ids)) == 900
    values = []
    for item in queue.iterate(timeout=0):
        with item:
            values.append(item.value)
    assert values == list(range(900))


def test_get_without_a_timeout_waits(connection: Connection) -> None:
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(connection.queue("queue").get)
        connection.queue("queue").put("here")
        item = waiting.result(5)

    assert item is not None
    assert item.value == "here"


def test_get_ends_with_its_timeout(connection: Connection) -> None:
    started = time.monotonic()

    assert connection.queue("queue").get(0.2) is None
    assert connection.queue("queue").get(0) is None

    took = time.monotonic() - started
    assert took > 0.15
    assert_quick(took, 2)


def test_an_acked_item_is_gone(connection: Connection) -> None:
    connection.queue("queue").put(1)
    item = got(connection)

    assert item.ack() is True
    assert item.ack() is False
    item.release()
    assert connection.queue("queue").depth() == Depth(0, 0, 0)


def test_a_released_item_comes_again_with_its_attempt(connection: Connection) -> None:
    connection.queue("queue").put(1)
    first = got(connection)

    first.release()

    again = got(connection)
    assert (again.id, again.attempt) == (first.id, 1)
    assert first.ack() is False
    assert again.ack() is True


def test_an_item_can_be_released_with_a_delay(connection: Connection) -> None:
    connection.queue("queue").put(1)

    got(connection).release(delay=3600)

    assert connection.queue("queue").depth() == Depth(0, 1, 0)


def test_a_block_acks_its_item(connection: Connection) -> None:
    connection.queue("queue").put(1)

    with got(connection) as item:
        assert item.value == 1

    assert connection.queue("queue").depth() == Depth(0, 0, 0)


def test_a_block_that_raises_releases_its_item(connection: Connection) -> None:
    connection.queue("queue").put(1)

    with pytest.raises(ZeroDivisionError), got(connection):
        raise ZeroDivisionError

    assert connection.queue("queue").depth() == Depth(1, 0, 0)


def test_a_block_may_end_its_item_itself(connection: Connection) -> None:
    connection.queue("queue").put(1)

    with got(connection) as item:
        item.release(delay=3600)

    assert connection.queue("queue").depth() == Depth(0, 1, 0)


def test_a_block_that_raises_after_the_connection_was_closed_raises_its_own_error(connection: Connection) -> None:
    connection.queue("queue").put(1)

    def close_and_fail() -> None:
        with got(connection):
            connection.close()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        close_and_fail()


def test_purge_leaves_what_is_held(connection: Connection) -> None:
    queue = connection.queue("queue")
    queue.put_many([1, 2, 3])
    held = got(connection)

    assert queue.purge() == 2
    assert held.ack()


def test_closing_gives_back_what_is_held(url: str, connection: Connection) -> None:
    connection.queue("queue").put(1)
    with connect(url) as other:
        got(other)

    assert got(connection).attempt == 2


def test_closing_ends_an_iteration_in_another_thread(connection: Connection) -> None:
    with ThreadPoolExecutor() as threads:
        iterating = threads.submit(list, connection.queue("queue"))
        assert connection.queue("other").get(0.1) is None
        connection.close()

        assert iterating.result(5) == []


def test_a_closed_connection_says_so(connection: Connection) -> None:
    queue, topic = connection.queue("queue"), connection.topic("topic")
    connection.close()
    connection.close()

    for use in (lambda: queue.put(1), queue.get, queue.depth, queue.purge, lambda: topic.publish(1), topic.subscribe):
        with pytest.raises(TransportClosed, match="closed"):
            use()
    with pytest.raises(TransportClosed):
        connection.queue("queue")


@pytest.mark.slow
def test_an_item_may_be_held_longer_than_its_lease(url: str) -> None:
    with connect(url, lease=1.0) as holder, connect(url) as rival:
        holder.queue("queue").put(1)
        item = got(holder)

        assert rival.queue("queue").get(2.5) is None

        assert item.ack() is True


def test_an_item_that_was_lost_is_told(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with connect(url) as connection:
        connection.queue("queue").put(1)
        item = got(connection)
        connection.queue("queue").consumer().release([item.delivery])  # behind the item's back

        with caplog.at_level(logging.WARNING, logger="ekiden.messaging"):
            assert item.ack() is False

    assert item.id in caplog.text
    assert "its lease ended" in caplog.text


def test_renewing_survives_what_one_queue_raises(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with connect(url, lease=0.6) as holder, connect(url) as rival:
        holder.queue("broken").put(1)
        holder.queue("sound").put(2)
        broken, sound = holder.queue("broken").get(PATIENCE), holder.queue("sound").get(PATIENCE)
        assert broken is not None
        assert sound is not None

        def fail(_deliveries: object) -> list[Settled]:
            raise ZeroDivisionError("a bug")

        holder.queue("broken").consumer().extend = fail  # type: ignore[method-assign]
        assert rival.queue("broken").get(PATIENCE) is not None
        assert rival.queue("sound").get(1.0) is None

        assert sound.ack() is True
    assert "queue broken: leases could not be renewed" in caplog.text


def test_renewals_that_fail_are_logged(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with connect(url, lease=0.6) as holder:
        holder.queue("queue").put(1)
        got(holder)
        away = Settled(SettleOutcome.FAILED, BrokerUnavailable("the broker is away"))
        holder.queue("queue").consumer().extend = lambda asked: [away for _ in asked]  # type: ignore[method-assign]

        eventually(lambda: "the leases of 1 items were not renewed" in caplog.text, what="it is logged")
    assert "the broker is away" in caplog.text


@pytest.mark.parametrize("step", ["receive", "settle", "release", "extend"])
def test_after_a_crash_the_next_get_opens_anew(url: str, caplog: pytest.LogCaptureFixture, step: str) -> None:
    with connect(url, lease=0.6) as connection:
        connection.queue("queue").put(1)
        item = got(connection)
        consumer = connection.queue("queue").consumer()

        def fail(*_: object) -> Any:
            raise TransportCrashed("a bug")

        def answer(asked: Sequence[object]) -> list[Settled]:
            return [Settled(SettleOutcome.FAILED, TransportCrashed("a bug")) for _ in asked]

        setattr(consumer, step, answer if step in {"settle", "extend"} else fail)
        acts = {"receive": lambda: got(connection), "settle": item.ack, "release": item.release}
        if step in acts:
            with pytest.raises(TransportCrashed):
                acts[step]()
        eventually(lambda: "its lease ended" in caplog.text, what="it is told that the item is lost")

        again = got(connection)
        assert (again.value, again.id) == (1, item.id)
        assert again.ack() is True


def test_too_many_held_items_are_refused(connection: Connection) -> None:
    queue = connection.queue("queue")
    queue.put_many(range(MOST_HELD + 1))
    held = [queue.get(0) for _ in range(MOST_HELD)]

    with pytest.raises(MisuseError, match="neither acked nor released"):
        queue.get(0)

    assert held[0] is not None
    held[0].ack()
    assert queue.get(0) is not None


def test_a_message_that_is_not_json_can_be_acked(connection: Connection) -> None:
    headers = {"content-type": "application/json"}
    connection.publish([Message(new_id(), "queue", b"{not json", headers), Message(new_id(), "queue", b"plain")])
    broken, plain = got(connection), got(connection)

    with pytest.raises(MessageError, match=broken.id):
        _ = broken.value

    assert broken.body == b"{not json"
    assert broken.ack()
    assert plain.value == b"plain"


def test_a_lease_that_is_too_short_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="too short"):
        connect(url, lease=0.001)


def test_everybody_who_subscribed_hears_what_is_published(connection: Connection, url: str) -> None:
    topic = connection.topic("topic")
    topic.publish("before")
    with connect(url) as other, topic.subscribe() as first, other.topic("topic").subscribe() as second:
        for value in ({"a": None}, None, b"\x00bytes", "text"):
            topic.publish(value)

        for subscription in (first, second):
            heard = [subscription.receive(5) for _ in range(4)]
            assert heard == [Broadcast({"a": None}), Broadcast(None), Broadcast(b"\x00bytes"), Broadcast("text")]
            assert subscription.receive(0.05) is None


def test_closing_a_subscription_ends_its_iteration(connection: Connection) -> None:
    subscription = connection.topic("topic").subscribe()
    heard: list[object] = []

    def listen() -> None:
        for broadcast in subscription:
            heard.append(broadcast.value)
            if broadcast.value == "last":
                subscription.close()

    with ThreadPoolExecutor() as threads:
        listening = threads.submit(listen)
        connection.topic("topic").publish("first")
        connection.topic("topic").publish("last")
        listening.result(5)

    assert heard == ["first", "last"]
    with pytest.raises(TransportClosed):
        subscription.receive(0)


def test_what_another_program_broadcast_is_told_apart(connection: Connection) -> None:
    with connection.topic("topic").subscribe() as subscription:
        connection.opened().broadcast("topic", [b"?"])

        with pytest.raises(MessageError, match="topic 'topic'"):
            subscription.receive(5)


def test_many_threads_share_a_connection(connection: Connection) -> None:
    queue = connection.queue("queue")

    def put_and_get(number: int) -> int:
        queue.put_many([number] * 50)
        acked = 0
        for item in queue.iterate(timeout=0.2):
            with item:
                acked += 1
        return acked

    with ThreadPoolExecutor(6) as threads:
        acked = sum(threads.map(put_and_get, range(6)))

    assert acked == 300
    assert queue.depth() == Depth(0, 0, 0)


def test_closing_leaves_no_thread(url: str) -> None:
    before = set(threading.enumerate())
    with connect(url) as connection:
        connection.queue("queue").get(0)
        assert len(set(threading.enumerate()) - before) == 1

    assert set(threading.enumerate()) == before


@pytest.mark.slow
def test_a_program_that_closes_nothing_ends() -> None:
    program = """
from ekiden.messaging import connect
connection = connect("memory://")
connection.queue("queue").put(1)
print(connection.queue("queue").get(1).value)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1\n", "")


@pytest.mark.slow
def test_parent_and_child_of_a_fork_have_connections_of_their_own(tmp_path: Path) -> None:
    program = """
import json, os, sys
from ekiden.messaging import connect
connection = connect(sys.argv[1])
queue = connection.queue("queue")
queue.put_many(["parent's", "child's"])
parents = queue.get(5)
child = os.fork()
if child == 0:
    lost = parents.ack()
    mine = queue.get(5)
    queue.put({"lost": lost, "mine": mine.value, "acked": mine.ack()})
    connection.close()
    os._exit(0)
status = os.waitpid(child, 0)[1]
told = queue.get(5)
print(json.dumps([status, told.value, told.ack(), parents.ack(), queue.depth().ready]))
connection.close()
"""
    command = [sys.executable, "-c", program, f"sqlite:///{tmp_path / 'fork.db'}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [0, {"lost": False, "mine": "child's", "acked": True}, True, True, 0]


def test_a_broadcast_that_cannot_be_read_does_not_end_the_loop(
    connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    with connection.topic("topic").subscribe() as subscription:
        connection.opened().broadcast("topic", [b"?", b"", b"j{", b"\xff\xff"])
        connection.topic("topic").publish("last")

        assert next(iter(subscription)).value == "last"
    assert "passed over" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": float("-inf")}, "caf\udce9"])
def test_what_json_has_not_is_not_put_as_something_else(connection: Connection, value: Any) -> None:
    with pytest.raises(TaskArgumentsError, match="cannot be put"):
        connection.queue("queue").put(value)
