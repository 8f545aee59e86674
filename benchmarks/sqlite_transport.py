"""What the SQLite transport and backend cost beside plain sqlite3, on the same file, in one run.

    python benchmarks/sqlite_transport.py [--messages N]

Each line is microseconds per message, ours beside the raw loop, and the ratio of their rates (100 % is as fast as
raw). The raw loops write the same rows into the same tables under the same indexes and ring the same bell, with the
same ``synchronous``; they know nothing of headers, answers, leases, errors or other processes.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sqlite3
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ekiden.message import Ending, Message, new_id
from ekiden.plugins import open_backend, open_transport
from ekiden.results import Start, StoredResult
from ekiden.sqlite import statements

BODY = b'["bench.noop", "0191f0c2a5d7f3c09f6e4a8b1d2c7e55", [1, 2], {}, {"retries": 0, "expires": null}]'
BATCH = 100

Item = TypeVar("Item")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--messages", type=int, default=20_000)
    count = parser.parse_args().messages
    with tempfile.TemporaryDirectory() as directory:
        ours, raw = Ours(Path(directory) / "ours.db"), Raw(Path(directory) / "raw.db")
        compare("publish, one at a time", count // 4, lambda n: ours.publish(n, 1), lambda n: raw.publish(n, 1))
        compare("publish, 100 at a time", count, lambda n: ours.publish(n, BATCH), lambda n: raw.publish(n, BATCH))
        compare("claim 100 and settle 100", count, ours.drain, raw.drain)
        ours.publish(100_000, BATCH, due=time.time() + 3600)
        ours.publish(count, BATCH)
        show("claim and settle beside 100,000 delayed", per_message(ours.drain, count), None)
        show("store results, 100 at a time", per_message(ours.put, count), None)
        show("begin, 100 at a time", per_message(ours.begin, count), None)
        show("a message wakes an idle consumer (median)", ours.wake_consumer(200), None)
        show("a result wakes who waits (median)", ours.wake_waiter(200), None)
        ours.close()
        raw.close()


class Ours:
    """What is measured."""

    def __init__(self, path: Path) -> None:
        self.transport = open_transport(f"sqlite:///{path}")
        self.backend = open_backend(f"sqlite:///{path}")
        self.consumer = self.transport.consumer(["default"], lease=60, prefetch=BATCH, name="bench")
        self.idle = self.transport.consumer(["idle"], lease=60, prefetch=BATCH, name="idle")

    def publish(self, count: int, batch: int, due: float | None = None) -> None:
        for messages in in_batches((Message(new_id(), "default", BODY, due=due) for _ in range(count)), batch):
            self.transport.publish(messages)

    def drain(self, count: int) -> None:
        while count > 0:
            deliveries = self.consumer.receive(BATCH, 1)
            self.consumer.settle([Ending(delivery) for delivery in deliveries])
            count -= len(deliveries)

    def put(self, count: int) -> None:
        for results in in_batches((StoredResult(new_id(), "SUCCESS", 0, b"3", 86400) for _ in range(count)), BATCH):
            self.backend.put(results)

    def begin(self, count: int) -> None:
        for starts in in_batches((Start(new_id(), 0, new_id(), 86400) for _ in range(count)), BATCH):
            self.backend.begin(starts)

    def wake_consumer(self, count: int) -> float:
        delays = []
        for _ in range(count):
            published = later(self.transport.publish, [Message(new_id(), "idle", BODY)])
            deliveries = self.idle.receive(1, 5)
            delays.append(time.perf_counter() - published[0])
            self.idle.settle([Ending(delivery) for delivery in deliveries])
        return statistics.median(delays) * 1e6

    def wake_waiter(self, count: int) -> float:
        delays = []
        for _ in range(count):
            result = StoredResult(new_id(), "SUCCESS", 0, b"3", 86400)
            stored = later(self.backend.put, [result])
            self.backend.wait([result.task_id], 5)
            delays.append(time.perf_counter() - stored[0])
        return statistics.median(delays) * 1e6

    def close(self) -> None:
        self.backend.close()
        self.transport.close()


class Raw:
    """The same rows by sqlite3 alone. The bell is that of a consumer of ours who never answers it."""

    def __init__(self, path: Path) -> None:
        self.transport = open_transport(f"sqlite:///{path}")
        self.consumer = self.transport.consumer(["default"], lease=60, prefetch=BATCH, name="bench")
        (address,) = Path(f"{path}-bells").iterdir()
        self.address = str(address)
        self.bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.bell.setblocking(False)
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("PRAGMA synchronous=normal")
        self.claim = 0

    def publish(self, count: int, batch: int) -> None:
        rows = (("default", new_id(), 4, 0, None, None, None, BODY) for _ in range(count))
        for some in in_batches(rows, batch):
            self.connection.execute("BEGIN IMMEDIATE")
            if batch == 1:
                self.connection.execute(statements.INSERT_MESSAGES[1], some[0])
            else:
                self.connection.executemany(statements.INSERT_MESSAGES[1], some)
            self.connection.execute("COMMIT")
            self.ring()

    def drain(self, count: int) -> None:
        execute = self.connection.execute
        while count > 0:
            self.claim += 1
            execute("BEGIN IMMEDIATE")
            rows = execute(
                "UPDATE message SET state = 2, until = ?, claim = ?, attempt = attempt + 1 WHERE seq IN (SELECT seq "
                "FROM message WHERE state = 0 AND queue = 'default' ORDER BY priority DESC, seq LIMIT 100) "
                "RETURNING seq, id, body, headers, priority, due, attempt",
                (time.time() + 60, self.claim),
            ).fetchall()
            execute("COMMIT")
            execute("BEGIN IMMEDIATE")
            self.connection.executemany(
                "DELETE FROM message WHERE seq = ? AND claim = ?", [(row[0], self.claim) for row in rows]
            )
            execute("COMMIT")
            count -= len(rows)

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.bell.sendto(b"!", self.address)

    def close(self) -> None:
        self.bell.close()
        self.connection.close()
        self.transport.close()


def compare(what: str, count: int, ours: Callable[[int], None], raw: Callable[[int], None]) -> None:
    """Both, a quarter at a time in turn, so that what else the machine does meets both."""
    times: dict[str, list[float]] = {"ours": [], "raw": []}
    for _ in range(4):
        times["raw"].append(per_message(raw, count // 4))
        times["ours"].append(per_message(ours, count // 4))
    show(what, statistics.median(times["ours"]), statistics.median(times["raw"]))


def per_message(run: Callable[[int], None], count: int) -> float:
    started = time.perf_counter()
    run(count)
    return (time.perf_counter() - started) / count * 1e6


def show(what: str, ours: float, raw: float | None) -> None:
    beside = f"raw {raw:8.2f} us   {raw / ours:6.0%} of its rate" if raw is not None else ""
    print(f"{what:44} {ours:8.2f} us   {beside}")


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def later(act: Callable[[list[Any]], object], batch: list[Any]) -> list[float]:
    """Do it in 5 ms in a thread; the returned list then holds when it began."""
    began: list[float] = []

    def run() -> None:
        time.sleep(0.005)
        began.append(time.perf_counter())
        act(batch)

    threading.Thread(target=run).start()
    return began


if __name__ == "__main__":
    main()
