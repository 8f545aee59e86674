"""The broker or the result store fails for a while: what has ended is kept, tried again, and reported once."""

import resource
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ekiden import Ekiden
from ekiden.errors import ResultTimeout

from tests.faults.ground import Ground, eventually

KINDS = ["gated", "gated_apart", "gated_async"]


@pytest.fixture
def broker_url(tmp_path: Path) -> str:
    """These faults are those of files. Who waits for a locked one gives up soon."""
    return f"sqlite:///{tmp_path}/broker.db?busy_timeout=0.2"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else can write to this SQLite file."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


@contextmanager
def no_room(pid: int) -> Iterator[None]:
    """Whatever a process writes to a file, there is no room for it."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def test_what_ends_while_the_file_is_locked_is_kept_and_stored_once_it_is_free(ground: Ground) -> None:
    worker = ground.start()
    results = [ground.app.send_task(task, (number,)) for number, task in enumerate(KINDS)]
    ground.ledger.wait("begun", 3)

    with locked(ground.directory / "broker.db"):
        ground.open()
        worker.wait_until_it_says("are kept and tried again")
        assert [result.state for result in results] == ["PENDING"] * 3

    assert [result.get(10) for result in results] == [0, 1, 2]
    ground.wait_until_empty()
    assert ground.ledger.done() == {0: 1, 1: 1, 2: 1}
    worker.wait_until_it_says("stored and messages settled again")
    assert len(worker.worker_pids()) == 1


def test_a_full_disk_loses_nothing_and_is_recovered_from_without_a_restart(ground: Ground) -> None:
    worker = ground.start()
    (pid,) = worker.worker_pids()
    after = ground.app.signature("follow", ("a task",))
    results = [ground.app.send_task("silent", (number,), link=after) for number in range(5)]
    ground.ledger.wait("begun", 5)

    with no_room(pid):
        later = ground.app.send_task("work", (9,))
        ground.open()
        worker.wait_until_it_says("are kept and tried again", 2)

    assert [result.get(20) for result in results] == list(range(5))
    assert later.get(20) == 9
    ground.wait_until_empty()
    assert len(ground.ledger.entries("follow")) == 5
    assert worker.worker_pids() == [pid]
    assert ground.dead() == []


@pytest.mark.slow
def test_a_result_store_that_fails_keeps_what_ended_and_its_leases(ground: Ground) -> None:
    results_file = ground.directory / "results.db"
    ground.app.conf.result_backend = url = f"sqlite:///{results_file}?busy_timeout=0.2"
    first = ground.start(lease=1.0, environment={"EKIDEN_RESULT_BACKEND": url})
    result = ground.app.send_task("gated", (1,), link=ground.app.signature("follow", ("gated",)))
    ground.ledger.wait("begun")

    with locked(results_file):
        other = ground.start(lease=1.0, environment={"EKIDEN_RESULT_BACKEND": url}, ready=False)
        ground.open()
        first.wait_until_it_says("are kept and tried again", 4)
        assert ground.ledger.entries("follow") == []
        assert ground.depth().leased == 1

    assert result.get(10) == 1
    ground.ledger.wait("follow")
    ground.wait_until_empty()
    assert len(ground.ledger.entries("begun")) == 1
    assert len(ground.ledger.entries("follow")) == 1
    assert not first.said("was lost")
    other.wait_until_ready()


@pytest.mark.slow
def test_a_worker_that_stops_while_the_broker_fails_ends_in_time(ground: Ground) -> None:
    worker = ground.start(lease=2.0, grace=1.0)
    ground.app.send_task("gated", (1,))
    ground.ledger.wait("begun")

    with locked(ground.directory / "broker.db"):
        ground.open()
        worker.wait_until_it_says("are kept and tried again")
        worker.stop(within=8.0)

    assert not worker.said("Traceback")
    ground.start(lease=2.0)
    ground.wait_until_empty()
    assert set(ground.ledger.done()) == {1}
    assert ground.dead() == []


@pytest.mark.slow
def test_a_worker_starts_when_the_broker_does(ground: Ground) -> None:
    result = ground.app.send_task("work", (1,))

    with locked(ground.directory / "broker.db"):
        worker = ground.start(ready=False)
        worker.wait_until_it_says("locked by another process")

    assert result.get(20) == 1
    assert not worker.said("Traceback")


@pytest.mark.slow
def test_when_no_body_process_can_be_started_its_task_is_given_back_and_runs_later(ground: Ground) -> None:
    worker = ground.start()
    assert ground.app.send_task("work", (0,)).get(10) == 0  # everything is open that such a task needs
    (pid,) = worker.worker_pids()
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    open_files = max(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_files, before[1]))

    ground.open()
    result = ground.app.send_task("gated_apart", (1,))
    worker.wait_until_it_says("Too many open files")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    assert result.get(20) == 1
    ground.wait_until_empty()
    assert ground.dead() == []
    assert ground.ledger.done() == {0: 1, 1: 1}


def test_what_follows_and_is_too_large_for_the_broker_goes_to_the_dead_letters_and_stops_nobody(
    ground: Ground,
) -> None:
    small = ground.broker_url + "&max_message_bytes=2000"
    worker = ground.start(environment={"EKIDEN_BROKER_URL": small})
    large = ground.app.send_task("large", (5000,), link=ground.app.signature("follow", ("large",)))

    assert ground.app.send_task("work", (1,)).get(20) == 1
    ground.wait_until_empty()

    assert len(large.get(5)) == 5000
    (dead,) = ground.dead()
    assert "max_message_bytes is 2000" in dead.message.headers["ekiden-dead-error"]
    assert worker.said("goes to the dead letters")


@pytest.mark.parametrize("harm", ["deleted", "deleted with all that belongs to it", "replaced"])
def test_when_the_file_goes_away_workers_and_senders_meet_in_the_new_one(ground: Ground, harm: str) -> None:
    worker = ground.start(processes=2)
    assert ground.app.send_task("work", (0,)).get(10) == 0
    file = ground.directory / "broker.db"

    if harm == "replaced":
        (ground.directory / "new").touch()
        (ground.directory / "new").rename(file)
    else:
        file.unlink()
    if harm.startswith("deleted with"):
        for each in ground.directory.glob("broker.db-*"):
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    eventually(lambda: worker.said("ERROR .*broker.db: the file was (deleted|replaced)"), what="the workers say so")

    eventually(lambda: is_run(ground.app), what="a call is stored where the workers look")
    results = [ground.app.send_task("work", (number,)) for number in range(1, 20)]
    assert [result.get(20) for result in results] == list(range(1, 20))
    with Ekiden("another sender", broker=ground.broker_url, task_default_queue=ground.queue) as another:
        assert another.send_task("work", (20,)).get(10) == 20
    assert len(worker.worker_pids()) == 2
    assert not worker.said("Traceback|died")
    assert worker.stop() == 0


def is_run(app: Ekiden) -> bool:
    try:
        return app.send_task("work", (0,)).get(1) == 0
    except ResultTimeout:
        return False
