"""A program that is interrupted (Ctrl-C, an alarm) while it publishes: an exception out of a signal's handler."""

from __future__ import annotations

import gc
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import ekiden.publisher
from ekiden.message import DUPLICATE, STORED
from ekiden.options import Publishing
from ekiden.publisher import Publisher
from ekiden.testing.conformance.fixtures import PATIENCE, TransportFixtures, a_message, ids, settle
from ekiden.testing.interruptions import Interrupted, Signals, signals_every
from ekiden.transport import Transport

OFTEN = 0.003
"""Seconds between two signals, on average."""

INSTRUCTIONS = 60
"""So many of a publish's are interrupted, at random."""

ENOUGH, LONGEST_SECONDS = 25, 1.5
"""Interruptions, and how long it may take."""


class Interruptions(TransportFixtures):
    """Wherever the exception comes: nothing stays locked, and nothing is stored twice."""

    # An exception between opening a file and noting it leaves the file to the garbage collector, which says so; and one
    # in a destructor is only printed.
    @pytest.mark.filterwarnings("ignore::ResourceWarning")
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_an_interrupted_publish_holds_up_and_doubles_nothing(self, transport: Transport, queue: str) -> None:
        publisher = Publisher(lambda: transport)
        once = Publishing(PATIENCE, None)
        transport.publish([a_message(f"{queue}-before")])
        over = threading.Event()

        def publish_all_the_time() -> list[str]:
            stored = []
            while not over.wait(0.01):
                message = a_message(queue)
                assert publisher.publish([message], once)[0] in (STORED, DUPLICATE)  # what is tried again
                stored.append(message.id)
            return stored

        with ThreadPoolExecutor(2) as threads:
            others = [threads.submit(publish_all_the_time) for _ in range(2)]
            try:
                ours, interruptions = self.publish_interrupted(publisher, queue, once, _path_of(transport))
            finally:
                over.set()
            theirs = {message_id for each in others for message_id in each.result(timeout=2 * PATIENCE)}

        assert interruptions
        assert publisher.publish([a_message(queue)], once) == [STORED]
        found = self.everything_in(transport, queue)
        assert {message_id for message_id, count in found.items() if count > 1} == set()
        assert found.keys() >= theirs | ours
        gc.collect()  # here, and not in the middle of another test

    @pytest.mark.filterwarnings("ignore::ResourceWarning")
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a_publish_can_be_interrupted_anywhere(self, transport: Transport, other: Transport, queue: str) -> None:
        path, signals = _path_of(transport), Signals()
        transport.publish([a_message(queue)])
        others: list[str] = []

        def publish_another(through: Transport) -> None:
            message = a_message(queue)
            assert through.publish([message]) == [STORED]
            others.append(message.id)

        with signals.handled(), ThreadPoolExecutor(1) as thread:
            places = signals.places(lambda: transport.publish([a_message(queue)]), within=path)
            for place in sorted(random.sample(range(1, places + 1), min(places, INSTRUCTIONS))):
                message = a_message(queue)
                signals.interrupt(partial(transport.publish, [message]), place, within=path)
                thread.submit(publish_another, transport).result(PATIENCE)
                thread.submit(publish_another, other).result(PATIENCE)
                assert transport.publish([message])[0] in (STORED, DUPLICATE)

        found = self.everything_in(transport, queue)
        assert {found[message_id] for message_id in others} == {1}
        gc.collect()

    def publish_interrupted(self, publisher: Publisher, queue: str, how: Publishing, path: str) -> tuple[set[str], int]:
        """Publish while signals arrive; the ids of what was answered as stored, and how many calls were interrupted."""
        stored, interruptions = set(), 0
        give_up = time.monotonic() + LONGEST_SECONDS
        with signals_every(OFTEN, within=(path, ekiden.publisher.__file__)):
            while interruptions < ENOUGH and (not interruptions or time.monotonic() < give_up):
                message = a_message(queue)
                try:
                    assert publisher.publish([message], how)[0] in (STORED, DUPLICATE)
                    stored.add(message.id)
                except Interrupted:
                    interruptions += 1
        return stored, interruptions

    def everything_in(self, transport: Transport, queue: str) -> Counter[str]:
        """The ids of all messages, as often as they are there."""
        found: Counter[str] = Counter()
        consumer = self.consume(transport, queue)
        while deliveries := consumer.receive(1000, 1.0):
            found.update(ids(deliveries))
            settle(consumer, deliveries)
        return found


def _path_of(transport: Transport) -> str:
    """Where the transport's own modules are."""
    return str(Path(str(sys.modules[type(transport).__module__].__file__)).parent)
