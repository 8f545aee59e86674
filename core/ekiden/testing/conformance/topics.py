"""Broadcasts: everyone who listens now hears them, in order, and nobody else does."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ekiden.errors import TransportClosed
from ekiden.testing.conformance.fixtures import PATIENCE, TransportFixtures, let_it_wait
from ekiden.testing.conformance.pace import assert_quick
from ekiden.transport import Listener, Transport


class Topics(TransportFixtures):
    """Broadcast and listen."""

    def test_everyone_who_listens_hears_everything_in_order(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        listeners = [transport.listen(queue), other.listen(queue), other.listen(queue)]
        payloads = [b"%d" % number for number in range(100)]

        transport.broadcast(queue, payloads[:60])
        other.broadcast(queue, payloads[60:])

        for listener in listeners:
            heard = self.hear(listener, 100)
            assert sorted(heard) == sorted(payloads)
            assert heard[:60] == payloads[:60] or set(heard) == set(payloads)

    def test_one_senders_payloads_keep_their_order(self, transport: Transport, other: Transport, queue: str) -> None:
        listener = other.listen(queue)
        payloads = [b"%d" % number for number in range(300)]

        for start in range(0, 300, 50):
            transport.broadcast(queue, payloads[start : start + 50])

        assert self.hear(listener, 300) == payloads

    def test_nobody_listening_is_no_error(self, transport: Transport, queue: str) -> None:
        transport.broadcast(queue, [b"into the void"])
        transport.broadcast(queue, [])

        assert transport.listen(queue).receive(0.1) == []

    def test_payloads_arrive_byte_for_byte(self, transport: Transport, other: Transport, queue: str) -> None:
        payloads = [b"", bytes(range(256)), "Grüße".encode(), b"x" * 100_000]
        listener = other.listen(queue)

        transport.broadcast(queue, payloads)

        assert self.hear(listener, 4) == payloads

    @pytest.mark.parametrize("topic", ["t" * 200, "a*b?[c]", "größe-世界", "a b/c%d'e\"", "_t"])
    def test_topics_do_not_mix(self, transport: Transport, other: Transport, topic: str) -> None:
        listener, neighbour = other.listen(topic), other.listen(topic[:-1] + "!")

        transport.broadcast(topic, [b"mine"])

        assert self.hear(listener, 1) == [b"mine"]
        assert neighbour.receive(0.1) == []

    def test_a_topic_and_a_queue_of_one_name_do_not_mix(self, transport: Transport, queue: str) -> None:
        listener, consumer = transport.listen(queue), self.consume(transport, queue)

        transport.broadcast(queue, [b"broadcast"])

        assert self.hear(listener, 1) == [b"broadcast"]
        self.assert_nothing_comes(consumer)

    def test_a_broadcast_wakes_a_waiting_listener(self, transport: Transport, other: Transport, queue: str) -> None:
        listener = other.listen(queue)
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(listener.receive, PATIENCE)
            let_it_wait()
            sent = time.monotonic()
            transport.broadcast(queue, [b"wake up"])
            assert waiting.result() == [b"wake up"]
            assert_quick(time.monotonic() - sent, 0.5)

    def test_a_listener_waits_no_longer_than_its_timeout(self, transport: Transport, queue: str) -> None:
        listener = transport.listen(queue)
        started = time.monotonic()

        heard = listener.receive(0.3)

        assert heard == []
        took = time.monotonic() - started
        assert took > 0.25
        assert_quick(took, 1.3)

    def test_closing_a_listener_wakes_it_and_ends_it(self, transport: Transport, queue: str) -> None:
        listener = transport.listen(queue)
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(listener.receive, 30)
            let_it_wait()
            listener.close()
            assert waiting.result(timeout=5) == []

        listener.close()
        with pytest.raises(TransportClosed):
            listener.receive(0)

    def test_a_closed_listener_hears_nothing_more_and_a_new_one_nothing_old(
        self, transport: Transport, queue: str
    ) -> None:
        for number in range(10):
            with transport.listen(queue) as listener:
                transport.broadcast(queue, [b"%d" % number])
                assert self.hear(listener, 1) == [b"%d" % number]
            transport.broadcast(queue, [b"nobody hears this"])

    def hear(self, listener: Listener, count: int) -> list[bytes]:
        """The next ``count`` payloads."""
        give_up = time.monotonic() + PATIENCE
        heard: list[bytes] = []
        while len(heard) < count and time.monotonic() < give_up:
            heard += listener.receive(max(0.0, give_up - time.monotonic()))
        assert len(heard) == count
        return heard
