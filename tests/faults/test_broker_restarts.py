"""The broker is killed, frozen or away while workers work: nothing is lost, nobody dies, and all goes on by itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ekiden.message import Depth, new_id

from tests.faults.ground import UNLUCKY, Ground, eventually
from tests.servers.couchdb import CouchDBServer
from tests.servers.mongodb import MongoDBServer
from tests.servers.processes import ServerProcess
from tests.servers.rabbitmq import RabbitMQServer, VirtualHost, ctl_command
from tests.servers.redis import RedisServer
from tests.servers.running import running

pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True, slots=True)
class OwnBroker:
    """A server that a test may harm. ``is_on_disk``: all that was made there would be found again after a kill."""

    server: ServerProcess
    url: str
    depth: Callable[[str], Depth] | None = None
    is_on_disk: Callable[[], bool] = lambda: True

    def kill_and_restart(self) -> None:
        """``kill -9``, and start it again with what it wrote."""
        eventually(self.is_on_disk, what="the broker has written what it needs")
        self.server.restart(by_kill=True)


@pytest.fixture(scope="module")
def rabbitmq_to_harm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    """One for all tests here, as it takes long to start; each test leaves it running."""
    with running(lambda: RabbitMQServer(tmp_path_factory.mktemp("rabbitmq"))) as server:
        yield server


@pytest.fixture(params=["redis", "amqp", "mongodb", "couchdb"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OwnBroker]:
    directory = tmp_path / "server"
    match request.param:
        case "redis":
            with running(lambda: RedisServer(directory, append_only=True)) as server:
                yield OwnBroker(server, f"{server.url}?timeout=2")
        case "amqp":
            yield from a_part_of(request.getfixturevalue("rabbitmq_to_harm"))
        case "mongodb":
            with running(lambda: MongoDBServer(directory)) as server:
                yield OwnBroker(server, f"{server.url}?timeout=2")
        case "couchdb":
            with running(lambda: CouchDBServer(directory)) as server:
                yield OwnBroker(server, f"{server.url}?timeout=2")


def a_part_of(server: RabbitMQServer) -> Iterator[OwnBroker]:
    """A place of the test's own at a server that other tests harm, too."""
    host = VirtualHost("/", ctl_command(), environment=server.environment)
    prefix = f"test-{new_id()}-"
    yield OwnBroker(
        server,
        f"{server.url}?timeout=2&prefix={prefix}",
        depth=lambda queue: host.depth(prefix + queue),
        is_on_disk=server.remembers_all_quorum_queues,
    )
    if not server.is_up:
        server.start()


@pytest.fixture
def ground(broker: OwnBroker, tmp_path: Path) -> Iterator[Ground]:
    queue = f"faults-{new_id()}"
    depth = None if broker.depth is None else (lambda: broker.depth(queue))
    ground = Ground(broker.url, queue, tmp_path, depth=depth)
    yield ground
    ground.close()


def test_a_broker_that_is_killed_while_workers_work_loses_nothing(ground: Ground, broker: OwnBroker) -> None:
    count, prefetch = ground.backlog(1500), 50
    ground.send_many("quick", count)
    # Not every broker writes an ending before it confirms it: what was undone by the kill comes again after its lease.
    worker = ground.start(processes=2, prefetch=prefetch, threads=2, lease=ground.lease(10.0))
    pids = worker.worker_pids()

    for part in (4, 2):
        eventually(lambda part=part: ground.ledger.done().total() >= count / part, what=f"1/{part} is done", within=60)
        broker.kill_and_restart()
    ground.wait_until_empty(within=90)

    done = ground.ledger.done()
    assert set(done) == set(range(count))
    assert done.total() - count <= 2 * 2 * prefetch
    assert worker.worker_pids() == pids
    assert worker.stop() == 0
    assert ground.dead() == []


def test_kills_of_workers_and_of_the_broker_together_lose_nothing(ground: Ground, broker: OwnBroker) -> None:
    count = ground.backlog(1500)
    ground.send_many("quick", count)
    worker = ground.start(processes=3, prefetch=50, threads=2, lease=ground.lease(5.0), environment=UNLUCKY)
    chance = random.Random(3)

    for part in range(1, 9):
        eventually(lambda part=part: ground.ledger.length() >= count * part / 10, what=f"{part}/10 are done", within=60)
        worker.kill_one(chance)
        if part in {3, 6}:
            broker.kill_and_restart()
    ground.wait_until_empty(within=90)

    assert ground.dead() == []
    assert set(ground.ledger.done()) == set(range(count))


def test_results_arrive_although_the_broker_was_killed_meanwhile(ground: Ground, broker: OwnBroker) -> None:
    ground.start(threads=4)
    running_ones = [ground.app.send_task("gated", (number,)) for number in range(4)]
    ground.ledger.wait("begun", 4)
    waiting_ones = [ground.app.send_task("work", (number, 0.01)) for number in range(4, 30)]

    broker.kill_and_restart()
    ground.open()

    assert [result.get(60) for result in running_ones + waiting_ones] == list(range(30))
    ground.wait_until_empty(within=60)
    assert set(ground.ledger.done()) == set(range(30))
    assert ground.dead() == []


def test_what_ends_while_the_broker_is_silent_is_kept_and_stored_once_it_answers(
    ground: Ground, broker: OwnBroker
) -> None:
    worker = ground.start()
    kinds = ["gated", "gated_apart", "gated_async"]
    results = [ground.app.send_task(task, (number,)) for number, task in enumerate(kinds)]
    ground.ledger.wait("begun", 3)

    with broker.server.frozen():
        ground.open()
        worker.wait_until_it_says("are kept and tried again")

    assert [result.get(30) for result in results] == [0, 1, 2]
    ground.wait_until_empty()
    assert ground.ledger.done() == {0: 1, 1: 1, 2: 1}
    assert len(worker.worker_pids()) == 1


def test_a_worker_that_stops_while_the_broker_is_away_ends_in_time(ground: Ground, broker: OwnBroker) -> None:
    worker = ground.start(grace=1.0, lease=ground.lease(5.0))
    ground.app.send_task("gated", (1,))
    ground.ledger.wait("begun")
    eventually(broker.is_on_disk, what="the broker has written what it needs")
    broker.server.kill()

    ground.open()
    ground.ledger.wait("work")
    worker.stop(within=10.0)

    assert not worker.said("Traceback")
    broker.server.start()
    ground.start(lease=ground.lease(2.0))
    # Whoever held it is gone: its lease ends, or ended with its connection.
    ground.wait_until_empty(within=30)
    assert set(ground.ledger.done()) == {1}
    assert ground.dead() == []


def test_a_worker_starts_when_the_broker_does(ground: Ground, broker: OwnBroker) -> None:
    result = ground.app.send_task("work", (1,))
    eventually(broker.is_on_disk, what="the broker has written what it needs")
    broker.server.kill()

    worker = ground.start(ready=False)
    worker.wait_until_it_says("cannot be reached|no server listens there")
    broker.server.start()

    assert result.get(60) == 1
    assert not worker.said("Traceback")
