"""Result stores in trouble: full, silent, behind a bad wire, or restarted.

Each class needs something that only the plugin can do to its store, and asks for it by a fixture to override.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import TypeVar

import pytest

from ekiden.errors import BackendError
from ekiden.message import new_id
from ekiden.results import Backend, BeginOutcome, Joined, Record, Start, StoredResult
from ekiden.states import STARTED
from ekiden.testing.conformance.fixtures import DAY, PATIENCE, BackendFixtures, a_result, eventually, let_it_wait
from ekiden.testing.proxy import Proxy
from ekiden.urls import parse_url

Answer = TypeVar("Answer")


class FullBackendConformance(BackendFixtures):
    """``url`` names a store so small that some thousands of results of a kilobyte fill it."""

    @pytest.mark.timeout(180)
    @pytest.mark.slow
    def test_a_full_store_says_so_and_can_be_read_and_emptied(self, backend: Backend, other: Backend) -> None:
        key = new_id()
        backend.write(key, b"kept")
        stored = self.fill(backend)
        assert stored

        with pytest.raises(BackendError, match="full"):
            backend.put([a_result(body=b"x" * 1024)])
        assert [found.task_id for found in other.get(stored[:10]) if found] == stored[:10]
        assert {found.task_id for found in other.wait([*stored[:10], new_id()], PATIENCE)} == set(stored[:10])
        assert other.wait([new_id()], 0.1) == []
        assert other.begin([Start(stored[0], 0, "message", DAY)])[0].outcome is BeginOutcome.ENDED
        assert other.read([key]) == [Record(key, b"kept", 1)]
        assert other.scan(key) == [Record(key, b"kept", 1)]
        assert other.write(key, None) == 0
        other.forget(stored)

        eventually(lambda: self.puts(backend), what="there is room")

    def fill(self, backend: Backend) -> list[str]:
        """Store kilobytes until the store says that it is full; returns the ids of what it took."""
        stored: list[str] = []
        while True:
            result = a_result(body=b"x" * 1024)
            try:
                backend.put([result])
            except BackendError:
                return stored
            stored.append(result.task_id)

    def puts(self, backend: Backend) -> bool:
        """Whether something can be stored."""
        with suppress(BackendError):
            return backend.put([a_result(body=b"x" * 1024)]) == [True]
        return False


class SilentBackendConformance(BackendFixtures):
    """A store that accepts what is sent and does not answer: every call ends with an error, and all recovers."""

    deadline_seconds = 30.0
    """Every call has ended by then. Override it, with a short deadline in the URL, to keep the tests fast."""

    @pytest.fixture
    def silent(self) -> Callable[[], AbstractContextManager[None]]:
        """Returns a context manager; the store does not answer while it is entered: override this."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'silent'.")

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_every_call_ends_while_the_store_is_silent_and_works_afterwards(
        self, backend: Backend, silent: Callable[[], AbstractContextManager[None]]
    ) -> None:
        backend.put([a_result()])
        calls: dict[str, Callable[[], object]] = {
            "put": lambda: backend.put([a_result()]),
            "get": lambda: backend.get([new_id()]),
            "wait": lambda: backend.wait([new_id()], self.deadline_seconds * 2),
            "forget": lambda: backend.forget([new_id()]),
            "begin": lambda: backend.begin([Start(new_id(), 0, "message", DAY)]),
            "join": lambda: backend.join(new_id(), "a", b"", size=2, expires=DAY),
            "read": lambda: backend.read([new_id()]),
            "write": lambda: backend.write(new_id(), b""),
            "scan": lambda: backend.scan(new_id()),
        }

        with silent():
            for name, call in calls.items():
                started = time.monotonic()
                with pytest.raises(BackendError):
                    call()
                assert time.monotonic() - started < self.deadline_seconds, name

        eventually(lambda: self.works(backend), what="all works again", within=60)

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_who_waits_while_the_store_is_silent_is_told_afterwards(
        self, backend: Backend, other: Backend, silent: Callable[[], AbstractContextManager[None]]
    ) -> None:
        result = a_result()
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(wait_through_trouble, other, result.task_id)
            let_it_wait()
            with silent():
                let_it_wait(self.deadline_seconds / 2)
            eventually(lambda: stores(backend, result), what="stored", within=60)

            assert waiting.result().task_id == result.task_id

    def works(self, backend: Backend) -> bool:
        """Whether a result is stored and found."""
        result = a_result()
        with suppress(BackendError):
            backend.put([result])
            return [found.task_id for found in backend.wait([result.task_id], 1.0)] == [result.task_id]
        return False


class BackendWireConformance(BackendFixtures):
    """The store of ``url`` behind a proxy that loses replies, cuts connections and is slow."""

    turns = 60
    """How many calls there are of each kind, about half of which lose a reply."""

    @pytest.fixture
    def proxy(self, url: str) -> Iterator[Proxy]:
        """In front of the first host of ``url``, which has to say its port."""
        host = parse_url(url).hosts[0]
        assert host.port is not None, f"the URL of {type(self).__name__} must name the port"
        with Proxy(host.name, host.port) as proxy:
            yield proxy

    @pytest.fixture
    def backend(self, url: str, proxy: Proxy) -> Iterator[Backend]:
        """The store, through the proxy."""
        with self.open_backend(proxy.through(url)) as backend:
            yield backend

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_what_is_asked_again_after_a_lost_reply_is_answered_the_same(
        self, backend: Backend, other: Backend, proxy: Proxy
    ) -> None:
        chance = random.Random(1)
        join_id = new_id()
        for number in range(self.turns):
            result, start = a_result(body=b"outcome"), Start(new_id(), 0, "message", DAY)
            member = f"member-{number}"

            self.lose_a_reply_by_chance(proxy, chance)
            self.until_answered(functools.partial(backend.put, [result]))
            self.lose_a_reply_by_chance(proxy, chance)
            (begun,) = self.until_answered(functools.partial(backend.begin, [start]))
            self.lose_a_reply_by_chance(proxy, chance)
            joined = self.until_answered(functools.partial(self.joined, backend, join_id, member))
            proxy.lose_no_reply()

            self.assert_same(other.get([result.task_id])[0], result)
            assert begun.outcome is BeginOutcome.GO
            assert (joined.arrived, joined.complete) == (number + 1, number + 1 == self.turns)

        assert proxy.replies_lost >= self.turns / 2

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_who_waits_over_a_wire_that_is_cut_again_and_again_is_told(
        self, backend: Backend, other: Backend, proxy: Proxy
    ) -> None:
        results = [a_result() for _ in range(30)]
        with ThreadPoolExecutor(30) as threads:
            waiting = [threads.submit(wait_through_trouble, backend, result.task_id) for result in results]
            for number, result in enumerate(results):
                let_it_wait(0.05)
                if number % 3:
                    proxy.cut()
                if number % 3 == 1:
                    proxy.lose_next_reply()
                other.put([result])

            assert [future.result().task_id for future in waiting] == [result.task_id for result in results]

    @pytest.mark.slow
    def test_everything_works_over_a_slow_wire(self, backend: Backend, other: Backend, proxy: Proxy) -> None:
        results = [a_result(body=bytes(range(256)) * 4) for _ in range(20)]
        with ThreadPoolExecutor() as threads, proxy.slow(piece_bytes=97, piece_seconds=0.002):
            waiting = threads.submit(wait_through_trouble, backend, results[7].task_id)
            assert backend.put(results[:7]) == [True] * 7
            other.put(results[7:])
            found = backend.get([result.task_id for result in results])
            told = waiting.result()

        for one, result in zip(found, results, strict=True):
            self.assert_same(one, result)
        self.assert_same(told, results[7])

    def joined(self, backend: Backend, join_id: str, member: str) -> Joined:
        """A member of ``turns`` arrives."""
        return backend.join(join_id, member, b"", size=self.turns, expires=DAY)

    def lose_a_reply_by_chance(self, proxy: Proxy, chance: random.Random) -> None:
        """Lose the next reply, in half of the cases."""
        if chance.random() < 0.5:
            proxy.lose_next_reply()

    def until_answered(self, ask: Callable[[], Answer]) -> Answer:
        """Ask until there is an answer."""
        give_up = time.monotonic() + PATIENCE
        while True:
            try:
                return ask()
            except BackendError:
                assert time.monotonic() < give_up, "no answer"


class BackendRestartConformance(BackendFixtures):
    """A store that is stopped, or killed, and started again."""

    survives_restart = True
    """Whether what was stored is there afterwards. Override it for a store in memory."""

    @pytest.fixture
    def restart_store(self) -> Callable[[], None]:
        """Returns a function that stops the store and has started it again when it returns: override this."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'restart_store'.")

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_after_a_restart_everything_works_and_what_was_stored_is_there(
        self, backend: Backend, restart_store: Callable[[], None]
    ) -> None:
        result, begun, key, join_id = a_result(body=b"kept"), new_id(), new_id(), new_id()
        backend.put([result])
        backend.begin([Start(begun, 0, "message", DAY)])
        backend.write(key, b"kept")
        backend.join(join_id, "a", b"kept", size=2, expires=DAY)

        restart_store()

        found = eventually(lambda: self.answered(lambda: backend.get([result.task_id, begun])), what="it answers")
        records = eventually(lambda: self.answered(lambda: (backend.read([key]), backend.scan(key))), what="it answers")
        joined = eventually(
            lambda: self.answered(lambda: backend.join(join_id, "b", b"", size=2, expires=DAY)), what="it answers"
        )
        if self.survives_restart:
            assert [one and (one.state, one.body) for one in found] == [(result.state, b"kept"), (STARTED, b"")]
            assert records == ([Record(key, b"kept", 1)], [Record(key, b"kept", 1)])
            assert joined.outcomes == {"a": b"kept", "b": b""}

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_who_waits_over_a_restart_is_told(
        self, backend: Backend, other: Backend, restart_store: Callable[[], None]
    ) -> None:
        results = [a_result() for _ in range(20)]
        with ThreadPoolExecutor(20) as threads:
            waiting = [threads.submit(wait_through_trouble, other, result.task_id) for result in results]
            let_it_wait(0.3)
            restart_store()
            eventually(lambda: self.all_are_told(backend, results, waiting), what="all are told", within=60)

            assert [future.result().task_id for future in waiting] == [result.task_id for result in results]

    def all_are_told(self, backend: Backend, results: list[StoredResult], waiting: list[Future[StoredResult]]) -> bool:
        """Whether they are. Stores what is not, also again: a failover may lose what was stored a moment before."""
        left = [result for result, future in zip(results, waiting, strict=True) if not future.done()]
        for result in left:
            stores(backend, result)
        return not left

    def answered(self, ask: Callable[[], Answer]) -> Answer | None:
        """What is answered; None while nothing is."""
        with suppress(BackendError):
            return ask()
        return None


def stores(backend: Backend, result: StoredResult) -> bool:
    """Whether it is stored now, by this or an earlier call."""
    with suppress(BackendError):
        backend.put([result])
        return True
    return False


def wait_through_trouble(backend: Backend, task_id: str) -> StoredResult:
    """The final result of a task, awaited through errors."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        try:
            for result in backend.wait([task_id], 10.0):
                return result
        except BackendError:
            let_it_wait()
    (found,) = backend.get([task_id])
    raise AssertionError(f"the result of {task_id} was not told; what is stored is {found}")
