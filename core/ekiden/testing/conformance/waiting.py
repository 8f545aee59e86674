"""Waiting for results: who waits is woken, whoever else waits, comes or goes."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from ekiden.message import new_id
from ekiden.results import Backend, StoredResult
from ekiden.states import STARTED, is_final
from ekiden.testing.conformance.fixtures import PATIENCE, STATES, BackendFixtures, a_result, eventually, let_it_wait
from ekiden.testing.conformance.pace import assert_quick


class Waiting(BackendFixtures):
    """Any number of threads wait for any number of tasks."""

    def test_waiting_for_what_is_final_returns_at_once(self, backend: Backend) -> None:
        done = [a_result(), a_result("FAILURE")]
        backend.put([*done, a_result(STARTED)])
        started = time.monotonic()

        found = backend.wait([done[0].task_id, new_id(), done[1].task_id], 5)

        assert {result.task_id for result in found} == {result.task_id for result in done}
        assert_quick(time.monotonic() - started, 1)

    def test_waiting_ends_with_its_timeout(self, backend: Backend) -> None:
        unfinished = a_result(STARTED)
        backend.put([unfinished])
        started = time.monotonic()

        found = backend.wait([unfinished.task_id, new_id()], 0.3)

        assert found == []
        took = time.monotonic() - started
        assert took > 0.25
        assert_quick(took, 1.5)

    @pytest.mark.parametrize("state", [state for state in STATES if is_final(state)])
    def test_a_final_result_wakes_who_waits_for_it(self, backend: Backend, other: Backend, state: str) -> None:
        result = a_result(state)
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(self.wait_for_one, other, [new_id(), result.task_id])
            let_it_wait()
            stored = time.monotonic()
            backend.put([a_result(STARTED, task_id=result.task_id), a_result()])
            backend.put([result])
            found = waiting.result()
            woken_after = time.monotonic() - stored

        assert [one.task_id for one in found] == [result.task_id]
        assert_quick(woken_after, 0.5)

    def test_waking_takes_milliseconds(self, backend: Backend, other: Backend) -> None:
        delays = []
        with ThreadPoolExecutor() as threads:
            for _ in range(20):
                result = a_result()
                waiting = threads.submit(self.wait_for_one, other, [result.task_id])
                let_it_wait(0.02)
                stored = time.monotonic()
                backend.put([result])
                assert len(waiting.result()) == 1
                delays.append(time.monotonic() - stored)

        assert_quick(sorted(delays)[10], 0.1, delays)

    def test_many_threads_wait_each_for_its_own(self, backend: Backend, other: Backend) -> None:
        results = [a_result() for _ in range(30)]
        with ThreadPoolExecutor(30) as threads:
            waiting = [threads.submit(self.wait_for_one, other, [result.task_id]) for result in results]
            let_it_wait()
            for result in results:
                backend.put([result])
            found = [future.result() for future in waiting]

        assert [one[0].task_id for one in found] == [result.task_id for result in results]

    def test_waiting_scales_to_ten_thousand_tasks(self, backend: Backend) -> None:
        results = [a_result() for _ in range(10_000)]
        waited_for = {result.task_id for result in results}
        started = time.monotonic()

        with ThreadPoolExecutor() as threads:
            storing = threads.submit(self.put_in_batches, backend, results, 500)
            while waited_for and time.monotonic() < started + 30:
                waited_for -= {result.task_id for result in backend.wait(list(waited_for), 5)}
            storing.result()

        assert waited_for == set()
        assert_quick(time.monotonic() - started, 20)

    def test_everybody_who_waits_for_a_task_is_told(self, backend: Backend, other: Backend) -> None:
        result = a_result()
        with ThreadPoolExecutor(6) as threads:
            waiting = [
                threads.submit(self.wait_for_one, asked, [new_id(), result.task_id]) for asked in (backend, other) * 3
            ]
            let_it_wait()
            backend.put([result])

            assert [[one.task_id for one in future.result()] for future in waiting] == [[result.task_id]] * 6

    def test_a_large_result_wakes_who_waits_for_it(self, backend: Backend, other: Backend) -> None:
        result = a_result(body=bytes(range(256)) * 4096)
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(self.wait_for_one, other, [result.task_id])
            let_it_wait()
            stored = time.monotonic()
            backend.put([result])
            (found,) = waiting.result()
            woken_after = time.monotonic() - stored

        self.assert_same(found, result)
        assert_quick(woken_after, 1.0)

    def test_who_waits_longer_than_others_is_still_woken(self, backend: Backend, other: Backend) -> None:
        """Whoever looks for all must leave that to somebody who stays."""
        results = [a_result() for _ in range(5)]
        with ThreadPoolExecutor(10) as threads:
            leaving = [threads.submit(other.wait, [new_id()], 0.1 + number * 0.02) for number in range(5)]
            let_it_wait(0.05)
            staying = [threads.submit(self.wait_for_one, other, [result.task_id]) for result in results]
            assert [future.result() for future in leaving] == [[]] * 5
            stored = time.monotonic()
            backend.put(results)
            found = [future.result() for future in staying]
            woken_after = time.monotonic() - stored

        assert [one[0].task_id for one in found] == [result.task_id for result in results]
        assert_quick(woken_after, 0.5)

    def test_what_comes_between_two_waits_is_found_by_the_second(self, backend: Backend, other: Backend) -> None:
        result = a_result()
        assert other.wait([result.task_id, new_id()], 0.05) == []
        backend.put([result])
        started = time.monotonic()

        found = other.wait([result.task_id, new_id()], PATIENCE)

        assert [one.task_id for one in found] == [result.task_id]
        assert_quick(time.monotonic() - started, 1)

    def test_who_waits_again_is_told_again_until_it_is_forgotten(self, backend: Backend, other: Backend) -> None:
        task_id = new_id()
        backend.put([a_result(task_id=task_id, body=b"first")])
        assert [self.wait_for_one(other, [task_id])[0].body for _ in range(2)] == [b"first"] * 2
        backend.forget([task_id])
        assert other.wait([task_id], 0.05) == []

        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(self.wait_for_one, other, [task_id])
            let_it_wait()
            backend.put([a_result(task_id=task_id, body=b"second")])

            assert [one.body for one in waiting.result()] == [b"second"]

    def test_wake_ends_every_wait_of_this_process(self, backend: Backend) -> None:
        with ThreadPoolExecutor() as threads:
            waiting = [threads.submit(backend.wait, [new_id()], 30) for _ in range(5)]
            let_it_wait()
            # A thread that has not begun to wait yet needs another one.
            eventually(lambda: self.wake_and_look(backend, waiting), what="every wait ended")

        assert [wait.result() for wait in waiting] == [[]] * 5

    def test_closing_wakes_who_waits(self, url: str) -> None:
        backend = self.open_backend(url)
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(backend.wait, [new_id()], 30)
            let_it_wait(0.3)
            backend.close()
            assert waiting.result(timeout=5) == []

        backend.close()

    def wake_and_look(self, backend: Backend, waiting: list[Future[list[StoredResult]]]) -> bool:
        """Wake, and say whether every wait has ended."""
        backend.wake()
        return all(wait.done() for wait in waiting)

    def wait_for_one(self, backend: Backend, task_ids: list[str]) -> list[StoredResult]:
        """Wait until one is final; a wait may end early with none."""
        give_up = time.monotonic() + PATIENCE
        found: list[StoredResult] = []
        while not found and time.monotonic() < give_up:
            found = backend.wait(task_ids, max(0.0, give_up - time.monotonic()))
        return found

    def put_in_batches(self, backend: Backend, results: list[StoredResult], size: int) -> None:
        """Store ``results``, ``size`` at a time."""
        for start in range(0, len(results), size):
            backend.put(results[start : start + size])
