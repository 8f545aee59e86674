"""Several processes on one broker: some are killed, some are stopped and wake up late, one forks."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import pytest

from ekiden.message import SETTLED, Ending, SettleOutcome, new_id
from ekiden.results import Backend
from ekiden.testing.children import POISON
from ekiden.testing.conformance.fixtures import (
    LONG_LEASE,
    PATIENCE,
    BackendFixtures,
    TransportFixtures,
    a_message,
    a_result,
    bodies,
    numbered,
    settle,
)
from ekiden.testing.conformance.pace import assert_quick
from ekiden.transport import Transport

LOST = SettleOutcome.LOST.value


class Child:
    """One program of ``ekiden.testing.children`` in a process of its own, killed at the end of the ``with`` block.

    A thread of its own reads what the child tells; it ends with the child's output.
    """

    def __init__(self, url: str, program: str, **arguments: object) -> None:
        command = [sys.executable, "-m", "ekiden.testing.children", url, program, json.dumps(arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._told: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="reads a child's output", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def next(self, *, within: float = PATIENCE) -> dict[str, Any]:
        """The next thing that the child tells."""
        try:
            told = self._told.get(timeout=within)
        except queue.Empty:
            raise AssertionError(f"the child told nothing within {within} s") from None
        assert told is not None, f"the child ended with status {self._process.wait()}"
        return told

    def rest(self) -> list[dict[str, Any]]:
        """Everything that the child told until now or, when it has ended, until its end."""
        if self._process.poll() is not None:
            self._reader.join(PATIENCE)
        told = []
        while not self._told.empty():
            line = self._told.get()
            if line is not None:
                told.append(line)
        return told

    def ask(self, command: str) -> dict[str, Any]:
        """Give the child a command, and return what it tells then."""
        self.command(command)
        return self.next()

    def command(self, command: str) -> None:
        """Give the child a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child."""
        self._process.send_signal(number)

    def wait(self, *, within: float = PATIENCE) -> int:
        """The child's exit status, once it has ended by itself."""
        return self._process.wait(within)

    def kill(self) -> None:
        """End the child as ``kill -9`` does, also when it is stopped, and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        self._reader.join(PATIENCE)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # a child that is killed may leave half a line
                self._told.put(json.loads(line))
        self._told.put(None)


class ProcessConformance(TransportFixtures):
    """For transports that several processes of one machine can open: ``url`` must lead children to the same broker."""

    messages_in_a_storm = 3000
    """So many are worked off while workers are killed. Override it where the server of the tests is a slow one."""

    @pytest.fixture
    def processes(self) -> Iterator[ExitStack]:
        """Children that enter it are killed when the test ends."""
        with ExitStack() as processes:
            yield processes

    def test_what_a_process_publishes_another_receives(
        self, url: str, transport: Transport, queue: str, processes: ExitStack
    ) -> None:
        child = self.start_worker(processes, url, queue=queue)
        transport.publish([a_message(queue, b"first")])  # now both are connected, and the queue is there
        child.next()
        child.next()
        published = time.time()
        transport.publish([a_message(queue, b"hello")])

        (received,) = child.next()["received"]

        assert received["body"] == "hello"
        assert_quick(received["at"] - published, 0.5)
        assert child.next()["settled"] == [SettleOutcome.SETTLED.value]
        self.assert_depth(transport, queue, ready=0)

    @pytest.mark.slow
    @pytest.mark.timeout(180)
    def test_a_storm_of_kills_loses_no_message(
        self, url: str, transport: Transport, queue: str, processes: ExitStack
    ) -> None:
        messages = numbered(queue, self.messages_in_a_storm)
        for start in range(0, len(messages), 500):
            transport.publish(messages[start : start + 500])
        processed: Counter[str] = Counter()
        slots = 4
        # Half of them open under their predecessor's name; of the others the leases have to end.
        lease = max(transport.description.shortest_lease, 3.0)
        limit, kills, started = 10, 0, time.monotonic()

        def start_in(slot: int) -> Child:
            name = f"{queue}-{slot}" if slot % 2 else new_id()
            arguments = {"queue": queue, "name": name, "lease": lease, "limit": limit, "seconds_per_batch": 0.02}
            return processes.enter_context(Child(url, "work", **arguments))

        def note(child: Child) -> None:
            for told in child.rest():
                processed.update(received["id"] for received in told.get("received", ()))

        workers = [start_in(slot) for slot in range(slots)]
        for turn in range(12):
            victim = turn % slots
            workers[victim].next(within=30)  # it has opened its consumer
            threading.Event().wait(0.15)
            workers[victim].kill()
            note(workers[victim])
            workers[victim] = start_in(victim)
            kills += 1
        while len(processed) < len(messages) and time.monotonic() < started + 120:
            threading.Event().wait(0.1)
            for worker in workers:
                note(worker)

        lost = {message.id for message in messages} - set(processed)
        assert not lost, f"{len(lost)} of {len(messages)} messages were lost"
        assert processed.total() - len(messages) <= kills * limit
        self.assert_depth(transport, queue, ready=0)

    @pytest.mark.slow
    def test_a_killed_workers_messages_come_back(
        self, url: str, transport: Transport, queue: str, processes: ExitStack
    ) -> None:
        transport.publish(numbered(queue, 5))
        child = self.start_worker(
            processes, url, queue=queue, lease=transport.description.shortest_lease, limit=5, seconds_per_batch=60
        )
        held = [received["id"] for received in child.next()["received"]]

        child.kill()

        again = self.collect(self.consume(transport, queue), 5, within=self.noticed_within(transport))
        attempts = {delivery.message.id: delivery.attempt for delivery in again}
        assert all(attempts[message_id] == 2 for message_id in held)

    def test_a_replaced_workers_messages_come_back_at_once(
        self, url: str, transport: Transport, queue: str, processes: ExitStack
    ) -> None:
        transport.publish(numbered(queue, 5))
        child = self.start_worker(
            processes, url, queue=queue, name=f"{queue}-slot", lease=LONG_LEASE, limit=5, seconds_per_batch=60
        )
        held = [received["id"] for received in child.next()["received"]]
        child.kill()

        again = self.collect(self.consume(transport, queue, name=f"{queue}-slot"), 5, within=PATIENCE)

        attempts = {delivery.message.id: delivery.attempt for delivery in again}
        assert all(attempts[message_id] == 2 for message_id in held)

    @pytest.mark.slow
    def test_a_worker_that_wakes_after_its_lease_can_end_nothing(
        self, url: str, transport: Transport, queue: str, processes: ExitStack
    ) -> None:
        message = a_message(queue, b"body", headers={"kind": "x"})
        transport.publish([message])
        lease = transport.description.shortest_lease
        zombie = processes.enter_context(Child(url, "hold", queue=queue, name=f"{queue}-zombie", lease=lease))
        zombie.next()
        assert zombie.next()["received"][0]["attempt"] == 1
        zombie.signal(signal.SIGSTOP)
        consumer = self.consume(transport, queue)
        held = self.collect_one(consumer, within=self.noticed_within(transport))

        zombie.signal(signal.SIGCONT)
        answers = [zombie.ask("extend")["done"], zombie.ask("release")["done"], zombie.ask("settle")["done"]]

        assert answers == [[LOST], [], [LOST]]
        assert (held.message, held.attempt) == (message, 2)
        assert consumer.extend([held]) == [SETTLED]
        self.assert_depth(transport, f"{queue}-next", ready=0)
        assert consumer.settle([Ending(held)]) == [SETTLED]
        self.assert_depth(transport, queue, ready=0)

    @pytest.mark.slow
    def test_poison_is_counted_although_nobody_survives_to_report_it(
        self, url: str, transport: Transport, queue: str, processes: ExitStack
    ) -> None:
        transport.publish([a_message(queue, POISON, headers={"kind": "x"}, priority=9), a_message(queue, b"behind it")])
        attempts = []

        for _ in range(3):
            child = self.start_worker(processes, url, queue=queue, name=f"{queue}-slot", limit=1, die_at_poison=True)
            received: dict[str, Any] = {}
            while received.get("body") != POISON.decode():
                received = next(iter(child.next().get("received", ())), {})
            assert child.wait() == -signal.SIGKILL
            attempts.append(received["attempt"])

        consumer = self.consume(transport, queue, name=f"{queue}-slot")
        (survivor,) = [one for one in self.collect(consumer, 1) if one.message.body == POISON]
        assert attempts == [1, 2, 3]
        assert survivor.attempt == 4
        assert dict(survivor.message.headers) == {"kind": "x"}

    def test_after_a_fork_parent_and_child_both_work(
        self, url: str, transport: Transport, queue: str, processes: ExitStack
    ) -> None:
        child = processes.enter_context(Child(url, "fork", queue=queue))

        told = child.next(within=30)

        assert told == {"child_status": 0, "settled": [SettleOutcome.SETTLED.value]}
        consumer = self.consume(transport, queue)
        done = self.collect(consumer, 3)
        assert sorted(bodies(done)) == [b"child-anew: settled", b"child: settled", b"parent: settled"]
        settle(consumer, done)
        self.assert_depth(transport, queue, ready=0)

    def start_worker(
        self,
        processes: ExitStack,
        url: str,
        *,
        queue: str,
        name: str | None = None,
        lease: float = LONG_LEASE,
        limit: int = 10,
        seconds_per_batch: float = 0.0,
        die_at_poison: bool = False,
        clock_runs_ahead: float = 0.0,
    ) -> Child:
        """A worker in a process of its own that has opened its consumer."""
        child = Child(
            url,
            "work",
            queue=queue,
            name=name or new_id(),
            lease=lease,
            limit=limit,
            seconds_per_batch=seconds_per_batch,
            die_at_poison=die_at_poison,
            clock_runs_ahead=clock_runs_ahead,
        )
        processes.enter_context(child)
        assert child.next(within=30) == {"ready": True}
        return child

    def noticed_within(self, transport: Transport) -> float:
        """By then (seconds) a dead consumer's shortest lease has ended and its messages were handed out again."""
        description = transport.description
        return description.shortest_lease + description.dead_consumer_noticed_within + description.wakes_within + 10.0


class BrokerClockConformance(ProcessConformance):
    """For transports whose time is the broker's: a worker whose clock is wrong changes nothing."""

    @pytest.mark.parametrize("ahead", [600.0, -600.0])
    @pytest.mark.slow
    def test_a_worker_whose_clock_is_wrong_neither_steals_nor_comes_early(
        self, url: str, transport: Transport, queue: str, processes: ExitStack, ahead: float
    ) -> None:
        transport.publish([a_message(queue, b"held")])
        consumer = self.consume(transport, queue)
        held = self.collect_one(consumer)
        due = time.time() + 1.0
        transport.publish([a_message(queue, b"later", due_in=1.0), a_message(queue, b"much later", due_in=300.0)])

        child = self.start_worker(processes, url, queue=queue, clock_runs_ahead=ahead)
        (received,) = child.next()["received"]

        assert received["body"] == "later"
        assert received["at"] - ahead > due - 0.05
        assert consumer.settle([Ending(held)]) == [SETTLED]
        self.assert_depth(transport, queue, ready=0, delayed=1)


class BackendProcessConformance(BackendFixtures):
    """For backends that several processes of one machine can open."""

    @pytest.fixture
    def processes(self) -> Iterator[ExitStack]:
        """Children that enter it are killed when the test ends."""
        with ExitStack() as processes:
            yield processes

    def test_a_result_wakes_who_waits_in_another_process(
        self, url: str, backend: Backend, processes: ExitStack
    ) -> None:
        task_id = new_id()
        child = processes.enter_context(Child(url, "wait", task_id=task_id))
        child.next(within=30)
        threading.Event().wait(0.2)
        stored = time.monotonic()

        backend.put([a_result(task_id=task_id, body=b"done")])

        told = child.next()
        assert told["body"] == "done"
        assert_quick(told["at"] - stored, 0.5)

    @pytest.mark.slow
    def test_of_processes_that_begin_at_once_one_may_go(self, url: str, processes: ExitStack) -> None:
        task_ids = [new_id() for _ in range(50)]
        children = [
            processes.enter_context(Child(url, "begin", task_ids=task_ids, message_id=f"message-{number}"))
            for number in range(3)
        ]
        for child in children:
            child.next(within=30)
        for child in children:
            child.command("begin")

        answers = [child.next(within=30)["outcomes"] for child in children]

        assert all(sorted(outcomes) == ["go", "second copy", "second copy"] for outcomes in zip(*answers, strict=True))

    @pytest.mark.slow
    def test_of_processes_that_write_at_one_version_one_wins(
        self, url: str, backend: Backend, processes: ExitStack
    ) -> None:
        key = new_id()
        children = [processes.enter_context(Child(url, "increment", key=key, times=50)) for _ in range(3)]
        for child in children:
            child.next(within=30)
        for child in children:
            child.command("increment")

        for child in children:
            assert child.next(within=30) == {"done": True}

        (record,) = backend.read([key])
        assert record is not None
        assert (record.value, record.version) == (b"150", 150)

    def test_after_a_fork_parent_and_child_both_work(self, url: str, processes: ExitStack) -> None:
        child = processes.enter_context(Child(url, "fork_backend", task_id=new_id()))

        assert child.next(within=30) == {"child_status": 0, "records": 3}
