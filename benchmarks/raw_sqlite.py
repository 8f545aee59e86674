"""What sqlite3 reaches alone, with the rows that ekiden writes: the ceiling for the SQLite transport.

It writes the same rows into the same tables under the same indexes and rings the same bell, with the same
``synchronous``. It leaves out: headers, answers, leases that end, errors and other processes.
"""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import time
from pathlib import Path

from ekiden.message import new_id
from ekiden.plugins import open_transport
from ekiden.sqlite import statements
from timing import in_batches

BODY = b'["bench.noop", "0191f0c2a5d7f3c09f6e4a8b1d2c7e55", [1, 2], {}, {"retries": 0, "expires": null}]'
BATCH = 100


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

    def publish_one_by_one(self, count: int) -> None:
        """One transaction each."""
        self._publish(count, 1)

    def publish_in_batches(self, count: int) -> None:
        """One transaction for 100."""
        self._publish(count, BATCH)

    def _publish(self, count: int, batch: int) -> None:
        rows = (("default", new_id(), 4, 0, None, None, None, BODY) for _ in range(count))
        for some in in_batches(rows, batch):
            self.connection.execute("BEGIN IMMEDIATE")
            if batch == 1:
                self.connection.execute(statements.INSERT_MESSAGES[1], some[0])
            else:
                self.connection.executemany(statements.INSERT_MESSAGES[1], some)
            self.connection.execute("COMMIT")
            self.ring()

    def drain(self, count: int) -> float:
        """Claim 100, delete 100, until ``count`` are gone; how many a second."""
        began, all_of_them = time.perf_counter(), count
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
        return all_of_them / (time.perf_counter() - began)

    def ring(self) -> None:
        """Wake whoever waits."""
        with contextlib.suppress(BlockingIOError):
            self.bell.sendto(b"!", self.address)

    def close(self) -> None:
        """Close the file."""
        self.bell.close()
        self.connection.close()
        self.transport.close()
