"""A server that is killed in the middle of writing: whatever it confirmed before is there afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from ekiden.errors import BackendError, BrokerUnavailable
from ekiden.message import PublishOutcome, Seen
from ekiden.plugins import open_backend
from ekiden.results import StoredResult
from ekiden.testing.conformance.fixtures import TransportFixtures, a_message, a_result, eventually
from ekiden.transport import Transport

from tests.servers.processes import ServerProcess

KILLS = 3
BETWEEN_KILLS = 100
"""So many writes are confirmed, one by one, before each kill."""


class KilledWhileWriting(TransportFixtures):
    """``url`` names the broker and store that the fixture ``server`` is."""

    @pytest.mark.slow
    @pytest.mark.timeout(180)
    def test_every_confirmed_message_is_there_after_kills_in_the_middle_of_publishing(
        self, transport: Transport, server: ServerProcess, queue: str
    ) -> None:
        confirmed: list[str] = []

        def publish() -> bool:
            message = a_message(queue)
            try:
                stored = transport.publish([message])[0].outcome is PublishOutcome.STORED
            except BrokerUnavailable:
                return False
            if stored:
                confirmed.append(message.id)
            return stored

        for _ in range(KILLS):
            kill_while_writing(server, publish, confirmed)

        found = {seen.message.id for seen in everything_in(transport, queue)}
        assert found >= set(confirmed)
        assert len(found) <= len(confirmed) + KILLS  # and what was written when the server was killed

    @pytest.mark.slow
    @pytest.mark.timeout(180)
    def test_every_confirmed_result_is_there_after_kills_in_the_middle_of_storing(
        self, url: str, server: ServerProcess
    ) -> None:
        confirmed: list[StoredResult] = []
        with open_backend(url) as backend:

            def put() -> bool:
                result = a_result(body=b"%d" % len(confirmed))
                try:
                    backend.put([result])
                except BackendError:
                    return False
                confirmed.append(result)
                return True

            for _ in range(KILLS):
                kill_while_writing(server, put, confirmed)

            found = backend.get([result.task_id for result in confirmed])
        assert [None if result is None else result.body for result in found] == [result.body for result in confirmed]


def kill_while_writing(server: ServerProcess, write: Callable[[], bool], confirmed: list[object]) -> None:
    """Write until it fails, because the server has been killed meanwhile; and start the server again."""
    enough = len(confirmed) + BETWEEN_KILLS

    def write_on() -> None:
        while write():
            pass

    with ThreadPoolExecutor() as threads:
        writing = threads.submit(write_on)
        eventually(lambda: len(confirmed) >= enough or writing.done(), what="much is confirmed", within=60)
        server.kill()
        writing.result()
    assert len(confirmed) >= enough
    server.start()


def everything_in(transport: Transport, queue: str) -> Iterator[Seen]:
    """All messages of a queue, without claiming any."""
    after: str | None = None
    while batch := transport.browse(queue, after=after, limit=1000):
        yield from batch
        after = batch[-1].cursor
