"""A worker's name: unique where nobody chose it, and one living worker's where somebody did."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from ekiden import Ekiden
from ekiden.control import NameClaim
from ekiden.errors import ConfigurationError
from ekiden.message import new_id
from ekiden.plan import unique_name

from tests.working import PATIENCE, Gate, Notes


@pytest.fixture
def app() -> Iterator[Ekiden]:
    with Ekiden("named", broker=f"memory://{new_id()}") as app:
        yield app


def test_names_are_unique_even_in_one_process() -> None:
    assert len({unique_name() for _ in range(1000)}) == 1000


def test_workers_of_one_process_have_names_of_their_own(app: Ekiden) -> None:
    with app.worker(threads=1) as one, app.worker(threads=1) as other:
        assert one.worker.name != other.worker.name


def test_a_name_in_use_is_refused_before_anything_is_taken_over(app: Ekiden) -> None:
    gate, notes = Gate(), Notes()

    @app.task
    def hold() -> int:
        notes.take(hold.request.attempt)
        gate.pass_through()
        return 1

    with app.worker(threads=1, name="slot"):
        result = hold.delay()
        assert gate.arrived.wait(PATIENCE)
        with pytest.raises(ConfigurationError, match="A worker named 'slot' is running already"):
            app.worker(threads=1, name="slot").start()
        gate.open.set()

        assert result.get(PATIENCE) == 1
    assert notes.taken == [1]
    assert not [thread for thread in threading.enumerate() if thread.name == "ekiden-control"]


@pytest.mark.slow
def test_a_worker_keeps_its_name_until_its_last_task_has_ended(app: Ekiden) -> None:
    gate, notes = Gate(), Notes()

    @app.task
    def hold() -> None:
        notes.take(hold.request.attempt)
        gate.pass_through()

    worker = app.worker(threads=1, name="slot").start()
    hold.delay()
    assert gate.arrived.wait(PATIENCE)
    with ThreadPoolExecutor(1) as threads:
        stopping = threads.submit(worker.stop)
        with pytest.raises(ConfigurationError, match="is running already"):
            app.worker(threads=1, name="slot").start()
        gate.open.set()
        stopping.result(PATIENCE)

    app.worker(threads=1, name="slot").start().stop()
    assert notes.taken == [1]


def test_of_two_that_start_together_under_one_name_one_is_refused(app: Ekiden) -> None:
    workers = [app.worker(threads=1, name="slot") for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        started = [threads.submit(worker.start) for worker in workers]
        errors = [each.exception(PATIENCE) for each in started]

    refused = [error for error in errors if error is not None]
    for worker, error in zip(workers, errors, strict=True):
        if error is None:
            worker.stop()
    assert len(refused) == 1
    assert isinstance(refused[0], ConfigurationError)


def test_of_two_claims_everybody_prefers_the_same_one() -> None:
    claims = [NameClaim("slot", instance, at) for instance in ("a", "b") for at in (1.0, 2.0)]

    for one in claims:
        for other in claims:
            assert one == other or one.precedes(other) != other.precedes(one)


def test_a_worker_that_is_stopped_while_it_claims_a_name_takes_nothing_over(app: Ekiden) -> None:
    gate, notes = Gate(), Notes()

    @app.task
    def hold() -> None:
        notes.take(hold.request.attempt)
        gate.pass_through()

    with app.worker(threads=1, name="slot"):
        hold.delay()
        assert gate.arrived.wait(PATIENCE)
        stopped = app.worker(threads=1, name="slot")
        stopped.worker.stop()
        stopped.start().stop()
        gate.open.set()
    assert notes.taken == [1]
