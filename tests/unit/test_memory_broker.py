"""What is special about the broker in memory: names, limits, forks, and that it is never slowed down by what waits."""

import subprocess
import sys
import time

import pytest
from ekiden import memory
from ekiden.errors import BackendError, BrokerRefused, ConfigurationError
from ekiden.memory import MemoryTransport
from ekiden.message import STORED, Depth, Ending, Message, PublishOutcome, SettleOutcome, new_id
from ekiden.plugins import open_backend, open_transport
from ekiden.urls import parse_url


def test_a_name_is_one_broker_and_one_store_for_the_whole_process() -> None:
    name = new_id()
    with open_transport(f"memory://{name}") as first, open_transport(f"memory://{name}?max_messages=5") as second:
        first.publish([Message("id", "queue", b"")])
        assert second.depth("queue") == Depth(1, 0, 0)
    with open_backend(f"memory://{name}") as backend:
        backend.write("key", b"value")

    with open_transport(f"memory://{name}") as transport, open_backend(f"memory://{name}") as backend:
        assert transport.depth("queue") == Depth(1, 0, 0)
        assert backend.read(["key"])[0] is not None
    with open_transport(f"memory://{new_id()}") as transport:
        assert transport.depth("queue") == Depth(0, 0, 0)

    memory.discard(name)
    with open_transport(f"memory://{name}") as transport, open_backend(f"memory://{name}") as backend:
        assert transport.depth("queue") == Depth(0, 0, 0)
        assert backend.read(["key"]) == [None]


@pytest.mark.parametrize("url", ["memory://a,b", "memory://a:1", "memory://user@a", "memory:///path", "memory+x://a"])
def test_a_url_that_says_too_much_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="memory://NAME"):
        MemoryTransport(parse_url(url))


def test_a_body_that_is_too_large_is_refused_alone() -> None:
    with open_transport(f"memory://{new_id()}?max_message_bytes=10") as transport:
        answers = transport.publish([Message("a", "queue", b"x" * 10), Message("b", "queue", b"x" * 11)])

        assert answers[0] == STORED
        assert answers[1].outcome is PublishOutcome.FAILED
        assert isinstance(answers[1].error, BrokerRefused)
        assert "11 bytes and max_message_bytes is 10" in str(answers[1].error)


def test_the_follow_ups_of_one_ending_are_stored_together_or_not_at_all() -> None:
    with open_transport(f"memory://{new_id()}") as transport:
        transport.publish([Message("a", "queue", b"")])
        consumer = transport.consumer(["queue"], lease=60, prefetch=2, name="worker")
        (delivery,) = consumer.receive(1, 0)
        good, bad = Message("b", "next", b""), Message("c", "next", b"", {}, 10)

        (answer,) = consumer.settle([Ending(delivery, (good, bad))])

        assert answer.outcome is SettleOutcome.FAILED
        assert transport.depth("next") == Depth(0, 0, 0)


def test_a_full_broker_takes_a_follow_up_in_the_place_of_what_it_follows() -> None:
    with open_transport(f"memory://{new_id()}?max_messages=2") as transport:
        transport.publish([Message("a", "queue", b""), Message("b", "queue", b"")])
        consumer = transport.consumer(["queue"], lease=60, prefetch=2, name="worker")
        first, second = consumer.receive(2, 0)
        follow_ups = tuple(Message(f"c{number}", "next", b"") for number in range(2))

        assert consumer.settle([Ending(first, follow_ups)])[0].outcome is SettleOutcome.FAILED
        assert consumer.settle([Ending(first, follow_ups[:1])])[0].outcome is SettleOutcome.SETTLED
        assert consumer.settle([Ending(second, follow_ups)])[0].outcome is SettleOutcome.FAILED
        assert transport.depth("next") == Depth(1, 0, 0)


def test_a_reply_queue_vanishes_with_its_consumer() -> None:
    with open_transport(f"memory://{new_id()}?max_messages=1") as transport:
        consumer = transport.consumer(["reply.me"], lease=60, prefetch=1, name="me")
        transport.publish([Message("a", "reply.me", b"")])
        assert transport.depth("reply.me") == Depth(1, 0, 0)

        consumer.close()

        assert transport.depth("reply.me") == Depth(0, 0, 0)
        assert transport.publish([Message("b", "queue", b"")]) == [STORED]


def test_a_closed_store_says_so() -> None:
    backend = open_backend("memory://")
    backend.close()

    with pytest.raises(BackendError, match="closed"):
        backend.get(["id"])


def test_a_forked_child_begins_with_nothing() -> None:
    program = """
import os
from ekiden.message import Message
from ekiden.plugins import open_backend, open_transport
transport, again, backend = open_transport("memory://x"), open_transport("memory://x"), open_backend("memory://x")
transport.publish([Message("id", "queue", b"parent")])
backend.write("key", b"parent")
child = os.fork()
if child == 0:
    transport.forget()
    again.forget()
    backend.forget_connections()
    assert transport.depth("queue").ready == 0
    transport.publish([Message("id", "queue", b"child")])
    assert again.browse("queue")[0].message.body == b"child"
    assert open_transport("memory://x").depth("queue").ready == 1
    assert backend.write("key", b"child", expected_version=0) == 1
    os._exit(0)
print(os.waitpid(child, 0)[1], transport.browse("queue")[0].message.body, backend.read(["key"])[0].value)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)

    assert ended.stdout == "0 b'parent' b'parent'\n", ended.stderr


@pytest.mark.slow
def test_a_hundred_thousand_delayed_messages_cost_a_claim_nothing() -> None:
    def seconds_to_work_off(delayed: int) -> float:
        with open_transport(f"memory://{new_id()}") as transport:
            due = time.time() + 3600
            transport.publish([Message(f"later-{number}", "queue", b"", {}, 9, due) for number in range(delayed)])
            transport.publish([Message(f"now-{number}", "queue", b"") for number in range(5000)])
            consumer = transport.consumer(["queue"], lease=60, prefetch=100, name="worker")
            started = time.perf_counter()
            for _ in range(50):
                consumer.settle([Ending(delivery) for delivery in consumer.receive(100, 0)])
            return time.perf_counter() - started

    alone, crowded = (min(seconds_to_work_off(delayed) for _ in range(3)) for delayed in (0, 100_000))

    assert crowded < 3 * alone + 0.05
