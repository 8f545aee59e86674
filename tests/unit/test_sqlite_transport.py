"""What the SQLite transport promises beyond the conformance kit: costs, clocks, locks, forks and trouble."""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable
from ekiden.message import (
    LOST,
    SETTLED,
    STORED,
    Delivery,
    Depth,
    Ending,
    Message,
    PublishOutcome,
    SettleOutcome,
    new_id,
)
from ekiden.sqlite import SQLiteTransport, consumer, statements, transport
from ekiden.transport import Consumer
from ekiden.urls import parse_url


@pytest.fixture
def path() -> Iterator[Path]:
    with TemporaryDirectory() as short:  # the addresses of the sockets beside it have a hundred bytes
        yield Path(short) / "x.db"


@pytest.fixture
def broker(path: Path) -> Iterator[SQLiteTransport]:
    with opened(path) as broker:
        yield broker


def opened(path: Path, **options: object) -> SQLiteTransport:
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return SQLiteTransport(parse_url(f"sqlite:///{path}?{query}"))


def numbered(count: int, queue: str = "q", due: float | None = None) -> list[Message]:
    return [Message(new_id(), queue, b"%d" % number, due=due) for number in range(count)]


def consume(broker: SQLiteTransport, *queues: str, lease: float = 60, prefetch: int = 1000, name: str = "") -> Consumer:
    return broker.consumer(queues or ("q",), lease=lease, prefetch=prefetch, name=name or new_id())


def settle(consumer: Consumer, deliveries: list[Delivery]) -> list[SettleOutcome]:
    return [settled.outcome for settled in consumer.settle([Ending(delivery) for delivery in deliveries])]


# What things cost.

RECEIVING_AND_ENDING = [
    statements.LOOK,
    statements.MAKE_DUE_READY,
    statements.TAKE_BACK_ENDED_LEASES,
    statements.FIRST_READY,
    statements.CLAIM,
    statements.STILL_HELD,
    statements.SETTLE,
    statements.EXTEND,
    statements.RELEASE,
    statements.GIVE_BACK,
    statements.HEAR,
    statements.STORED_RESULTS,
    statements.STORED_STATES,
    statements.CHANGED_RESULTS,
    statements.READ_RECORDS,
    *statements.PURGE,
    *statements.DELETE_ENDED,
]


@pytest.fixture
def tables() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for statement in statements.TABLES:
        connection.execute(statement)
    yield connection
    connection.close()


@pytest.mark.parametrize("statement", RECEIVING_AND_ENDING, ids=lambda statement: " ".join(statement.split())[:60])
def test_every_statement_finds_its_rows_by_an_index(tables: sqlite3.Connection, statement: str) -> None:
    parameters = [None] * (3 if "?3" in statement else statement.count("?"))

    plan = [row[3] for row in tables.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]

    walked = [step for step in plan if step.startswith("SCAN") and "json_each" not in step]
    assert walked == []
    assert [step for step in plan if "TEMP B-TREE" in step] == []


def steps_of_a_claim(tables: sqlite3.Connection) -> int:
    """How many steps of SQLite's machine it takes to look, claim 10 and settle them."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    tables.executemany(statements.INSERT_MESSAGES[1], [("q", new_id(), 4, 0, None, None, None, b"") for _ in range(10)])
    tables.set_progress_handler(count, 1)
    tables.execute(statements.LOOK, ('["q"]',)).fetchall()
    rows = [row[5] for row in tables.execute(statements.FIRST_READY, ("q", 10)).fetchall()]
    tables.execute(statements.CLAIM, (60.0, 1, "me", str(rows)))
    tables.execute(statements.SETTLE, (str(rows), 1))
    tables.set_progress_handler(None, 1)
    assert len(rows) == 10
    return steps


@pytest.mark.slow
@pytest.mark.parametrize(("state", "until"), [(statements.DELAYED, 3600.0), (statements.LEASED, 3600.0)])
def test_a_claim_costs_the_same_beside_100_000_delayed_or_leased_messages(
    tables: sqlite3.Connection, state: int, until: float
) -> None:
    alone = steps_of_a_claim(tables)
    rows = [("q", new_id(), 9, state, until, None, None, b"") for _ in range(100_000)]
    tables.execute("BEGIN")
    tables.executemany(statements.INSERT_MESSAGES[1], rows)
    tables.execute("COMMIT")

    beside = steps_of_a_claim(tables)

    assert beside < alone * 1.1


# Priorities, turns, room.


def test_a_claim_takes_from_every_queue_and_fills_up_from_the_busy_one(broker: SQLiteTransport) -> None:
    broker.publish([*numbered(100, "busy"), *numbered(2, "quiet")])

    received = consume(broker, "quiet", "busy").receive(10, 1)

    assert sorted(delivery.message.queue for delivery in received) == ["busy"] * 8 + ["quiet"] * 2


def test_room_comes_back_when_a_lease_ends_that_nobody_ended(broker: SQLiteTransport) -> None:
    broker.publish(numbered(1))
    slow = consume(broker, lease=1.0, prefetch=1)

    first, second = slow.receive(1, 5), slow.receive(1, 5)

    assert [delivery.attempt for delivery in first + second] == [1, 2]
    assert settle(slow, first) == [SettleOutcome.LOST]
    assert settle(slow, second) == [SettleOutcome.SETTLED]


# Clocks.


@pytest.mark.parametrize("seconds", [3600.0, 30.0])
def test_a_clock_set_forward_ends_no_lease_of_who_lives(
    broker: SQLiteTransport, path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    broker.publish(numbered(1))
    holder, other = consume(broker, lease=10), consume(broker, lease=0.5)
    held = holder.receive(1, 1)
    assert other.receive(1, 0) == []
    wall_clock = time.time

    monkeypatch.setattr(time, "time", lambda: wall_clock() + seconds)

    assert other.receive(1, 0.1) == []
    assert holder.extend(held) == [SETTLED]
    assert other.receive(1, 0.8) == []
    assert settle(holder, held) == [SettleOutcome.SETTLED]


def test_a_dead_consumers_message_comes_back_although_the_clock_was_set(
    broker: SQLiteTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.publish(numbered(1))
    consume(broker, lease=10).receive(1, 1)
    other = consume(broker, lease=0.3)
    other.receive(1, 0)
    wall_clock = time.time
    monkeypatch.setattr(time, "time", lambda: wall_clock() + 60)

    received = other.receive(1, 5)

    assert [delivery.attempt for delivery in received] == [2]


# Headers.


def test_what_cannot_be_written_is_refused_alone(broker: SQLiteTransport) -> None:
    odd = [Message("\ud800", "q", b""), Message(new_id(), "q", b"", {"odd": "\ud800"})]

    answers = broker.publish([*numbered(1), *odd, *numbered(1)])

    assert [answer.outcome for answer in answers] == [
        PublishOutcome.STORED,
        PublishOutcome.FAILED,
        PublishOutcome.FAILED,
        PublishOutcome.STORED,
    ]
    assert all(isinstance(answer.error, BrokerRefused) for answer in answers[1:3])


def test_a_body_larger_than_allowed_is_refused_alone(path: Path) -> None:
    with opened(path, max_message_bytes=10) as broker:
        answers = broker.publish([Message(new_id(), "q", b"x" * size) for size in (10, 11)])

    assert [answer.outcome for answer in answers] == [PublishOutcome.STORED, PublishOutcome.FAILED]
    assert "max_message_bytes is 10" in str(answers[1].error)


# Temporary queues.


def test_a_reply_queue_vanishes_some_time_after_its_consumer(
    broker: SQLiteTransport, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "REPLY_QUEUE_KEPT_SECONDS", 0.3)
    monkeypatch.setattr(consumer, "TIDY_SECONDS", 0.05)
    consume(broker, "reply.a").close()
    broker.publish(numbered(3, "reply.a"))
    assert broker.depth("reply.a").ready == 3
    idle = consume(broker, "other")
    give_up = time.monotonic() + 10

    while broker.depth("reply.a").ready and time.monotonic() < give_up:
        idle.receive(1, 0.1)

    assert broker.depth("reply.a") == Depth(0, 0, 0)
    assert broker.publish(numbered(1, "reply.a")) == [STORED]
    assert broker.depth("reply.a") == Depth(0, 0, 0)


def test_a_reply_queue_lives_as_long_as_its_consumer_waits(
    broker: SQLiteTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "REPLY_QUEUE_KEPT_SECONDS", 0.8)
    monkeypatch.setattr(consumer, "TIDY_SECONDS", 0.05)
    monkeypatch.setattr(consumer, "LOOK_AGAIN_SECONDS", 0.05)
    waiting = consume(broker, "reply.a")
    assert waiting.receive(1, 1.5) == []

    broker.publish(numbered(1, "reply.a"))

    assert len(waiting.receive(1, 1)) == 1


# Topics.


def test_old_broadcasts_are_trimmed_and_listeners_go_on(
    broker: SQLiteTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "EVENTS_TRIMMED_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(transport, "EVENTS_KEPT", 50)
    listener = broker.listen("t")
    for number in range(30):
        broker.broadcast("t", [b"%d" % number] * 10)
    assert len(listener.receive(1)) == 50

    monkeypatch.setattr(transport, "EVENTS_KEPT_SECONDS", -1.0)
    broker.broadcast("t", [b"gone at once"])
    monkeypatch.setattr(transport, "EVENTS_KEPT_SECONDS", 600.0)
    broker.broadcast("t", [b"new"])

    assert listener.receive(1) == [b"new"]


# Trouble.


def test_a_locked_file_fails_everything_for_now_and_nothing_is_lost(path: Path) -> None:
    with opened(path, busy_timeout=0.1) as broker:
        broker.publish(numbered(3))
        receiver = consume(broker)
        held = receiver.receive(2, 1)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(BrokerUnavailable):
            broker.publish(numbered(1))
        with pytest.raises(BrokerUnavailable):
            receiver.receive(1, 1)
        with pytest.raises(BrokerUnavailable):
            receiver.release(held)
        assert settle(receiver, held) == [SettleOutcome.FAILED] * 2
        assert {type(extended.error) for extended in receiver.extend(held)} == {BrokerUnavailable}
        assert broker.depth("q") == Depth(1, 0, 2)

        other.execute("COMMIT")
        other.close()
        assert settle(receiver, held) == [SettleOutcome.SETTLED] * 2
        assert len(receiver.receive(1, 1)) == 1


def test_closing_beside_a_locked_file_ends(path: Path) -> None:
    broker = opened(path, busy_timeout=0.1)
    broker.publish(numbered(1))
    consume(broker).receive(1, 1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    broker.close()

    other.close()
    with opened(path) as later:
        assert later.depth("q") == Depth(0, 0, 1)


def test_a_message_is_found_although_every_bell_was_taken_away(broker: SQLiteTransport, path: Path) -> None:
    waiting = consume(broker)
    for bell in path.with_name("x.db-bells").iterdir():
        bell.unlink()
    publishing = threading.Timer(0.05, broker.publish, [numbered(1)])
    publishing.start()

    received = waiting.receive(1, 5)

    publishing.join()
    assert len(received) == 1


def test_an_old_message_is_not_ended_through_a_row_that_was_used_again(broker: SQLiteTransport) -> None:
    broker.publish(numbered(1))
    late = consume(broker, lease=0.1)
    old = late.receive(1, 1)
    quick = consume(broker)
    settle(quick, quick.receive(1, 5))
    broker.publish(numbered(1))
    new = quick.receive(1, 1)
    assert new[0].tag[0] == old[0].tag[0]

    assert settle(late, old) == [SettleOutcome.LOST]
    assert late.extend(old) == [LOST]
    late.release(old)

    assert broker.depth("q") == Depth(0, 0, 1)
    assert settle(quick, new) == [SettleOutcome.SETTLED]


# Forks and processes.


def test_a_forked_child_forgets_and_goes_on_alone(broker: SQLiteTransport) -> None:
    broker.publish(numbered(2))
    parents = consume(broker)
    held = parents.receive(1, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            broker.forget()
            own = consume(broker)
            (delivery,) = own.receive(10, 5)
            done = settle(own, [delivery]) == [SettleOutcome.SETTLED] and broker.publish(numbered(3)) == [STORED] * 3
            broker.close()
            code = 0 if done else 2
        finally:
            os._exit(code)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    assert settle(parents, held) == [SettleOutcome.SETTLED]
    assert len(parents.receive(10, 5)) == 3


WORKER = """
import sys, time
from ekiden.message import Ending, Message, derived_id
from ekiden.plugins import open_transport
with open_transport(sys.argv[1]) as broker, broker.consumer(["q"], lease=1, prefetch=20, name=sys.argv[2]) as consumer:
    while True:
        deliveries = consumer.receive(20, 0.5)
        time.sleep(0.03)
        consumer.settle([
            Ending(one, (Message(derived_id(one.message.id, "done"), "done", one.message.body),)) for one in deliveries
        ])
"""


@pytest.mark.slow
def test_killing_workers_loses_and_doubles_nothing(broker: SQLiteTransport, path: Path) -> None:
    broker.publish(numbered(4000))
    command = [sys.executable, "-c", WORKER, f"sqlite:///{path}"]
    workers = [subprocess.Popen([*command, f"slot-{number}"]) for number in range(3)]
    give_up = time.monotonic() + 50
    turn = 0

    while broker.depth("done").ready != 4000 and time.monotonic() < give_up:
        time.sleep(0.2)
        if turn < 12:
            slot = turn % 3
            workers[slot].kill()
            workers[slot].wait()
            workers[slot] = subprocess.Popen([*command, f"slot-{slot}"])
            turn += 1
    for worker in workers:
        worker.kill()
        worker.wait()

    assert broker.depth("done") == Depth(4000, 0, 0)
    assert broker.depth("q") == Depth(0, 0, 0)
    done = [delivery.message.body for delivery in consume(broker, "done", prefetch=4000).receive(4000, 5)]
    assert sorted(done) == sorted(b"%d" % number for number in range(4000))


def test_a_new_process_takes_over_at_once_what_a_killed_one_held_under_its_name(
    broker: SQLiteTransport, path: Path
) -> None:
    broker.publish(numbered(5))
    script = """
import os, sys
from ekiden.plugins import open_transport
consumer = open_transport(sys.argv[1]).consumer(["q"], lease=600, prefetch=5, name="slot")
assert len(consumer.receive(5, 5)) == 5
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script, f"sqlite:///{path}"], check=False).returncode == -9

    taken_over = consume(broker, name="slot").receive(5, 1)

    assert [delivery.attempt for delivery in taken_over] == [2] * 5


def test_a_stopped_process_that_wakes_late_settles_nothing(broker: SQLiteTransport, path: Path) -> None:
    broker.publish(numbered(1))
    script = """
import os, signal, sys
from ekiden.message import Ending
from ekiden.plugins import open_transport
consumer = open_transport(sys.argv[1]).consumer(["q"], lease=0.3, prefetch=5, name="late")
(held,) = consumer.receive(5, 5)
os.kill(os.getpid(), signal.SIGSTOP)
answers = [*consumer.extend([held]), *consumer.settle([Ending(held)])]
consumer.release([held])
print([answer.outcome.value for answer in answers])
"""
    late = subprocess.Popen([sys.executable, "-c", script, f"sqlite:///{path}"], stdout=subprocess.PIPE, text=True)
    os.waitid(os.P_PID, late.pid, os.WSTOPPED | os.WNOWAIT)
    holder = consume(broker)
    held = holder.receive(1, 5)

    late.send_signal(18)  # SIGCONT
    said, _ = late.communicate(timeout=20)

    assert said.strip() == "['lost', 'lost']"
    assert broker.depth("q") == Depth(0, 0, 1)
    assert settle(holder, held) == [SettleOutcome.SETTLED]
