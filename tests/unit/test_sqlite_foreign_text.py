"""A text that is not UTF-8, in any column where another program can have written it, stops nobody."""

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from ekiden.message import STORED, Ending, Message, new_id
from ekiden.plugins import open_backend, open_transport
from ekiden.results import BeginOutcome, Start, StoredResult
from ekiden.sqlite import statements
from ekiden.sqlite.backend import SQLiteBackend
from ekiden.sqlite.transport import SQLiteTransport

TEXT = "CAST(x'61ff' AS TEXT)"
"""'a', and a byte that begins no character."""


def text_columns() -> Iterator[tuple[str, str]]:
    for statement in statements.TABLES:
        if table := re.search(r"CREATE TABLE (\w+)", statement):
            for column in re.findall(r"(\w+) TEXT", statement):
                yield table[1], column


ENDED = {"ends": "1.0", "until": "1.0", "seq": "NULL", "number": "NULL"}
"""What a planted row has besides: it is one that is to be tidied away, or to be handed out."""


def plant(path: Path, table: str, column: str) -> None:
    """A second row like one that is there, with a text that is none."""
    with closing(sqlite3.connect(path)) as connection, connection:
        names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        unique = {"id": "'another'", "task_id": "'another'", "key": "'p/another'", "name": "'reply.another'"}
        unique |= {"join_id": "'another'", **ENDED, column: TEXT}
        values = ", ".join(unique.get(name, name) for name in names)
        connection.execute(f"INSERT INTO {table} SELECT {values} FROM {table} LIMIT 1")
        connection.execute(f"INSERT OR IGNORE INTO {table} SELECT {values.replace('1.0', '9e9')} FROM {table} LIMIT 1")


@pytest.fixture
def transport(tmp_path: Path) -> Iterator[SQLiteTransport]:
    with open_transport(f"sqlite:///{tmp_path}/x.db") as transport:
        assert isinstance(transport, SQLiteTransport)
        yield transport


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[SQLiteBackend]:
    backend = open_backend(f"sqlite:///{tmp_path}/x.db")
    assert isinstance(backend, SQLiteBackend)
    yield backend
    backend.close()


@pytest.mark.parametrize(("table", "column"), list(text_columns()))
def test_a_text_that_is_none_stops_nobody(
    transport: SQLiteTransport, backend: SQLiteBackend, tmp_path: Path, table: str, column: str
) -> None:
    use(transport, backend, "before")
    with transport.consumer(["reply.mine"], lease=60, prefetch=1, name="mine"):
        transport.publish([Message(new_id(), "queue", b"", headers={"x": 1})])
        backend.join("join", "member", b"", size=2, expires=60.0)
        plant(tmp_path / "x.db", table, column)
        backend._tidy_at = 0.0
        use(transport, backend, "after")

    time.sleep(0.01)
    backend._tidy_at = 0.0
    use(transport, backend, "at last")
    with closing(sqlite3.connect(tmp_path / "x.db")) as connection:
        connection.text_factory = bytes
        for name, ends in (("joining", "ends"), ("reply_queue", "until")):
            assert connection.execute(f"SELECT * FROM {name} WHERE {ends} < 2").fetchall() == [], "it is tidied away"


def use(transport: SQLiteTransport, backend: SQLiteBackend, name: str) -> None:
    """Everything that reads the tables, for one caller that has nothing to do with what is planted."""
    listener = transport.listen("topic")
    transport.broadcast("topic", [b"heard"])
    assert b"heard" in listener.receive(5)
    listener.close()
    message = Message(new_id(), "queue", name.encode())
    assert transport.publish([message]) == [STORED]
    assert message.body in [seen.message.body for seen in transport.browse("queue")]
    assert (transport.depth("queue").ready or 0) >= 1
    with transport.consumer(["queue", f"reply.{name}"], lease=60, prefetch=100, name=name) as consumer:
        reply = Message(new_id(), f"reply.{name}", b"reply")
        assert transport.publish([reply]) == [STORED]
        found = {}
        give_up = time.monotonic() + 5
        while not {message.id, reply.id} <= found.keys() and time.monotonic() < give_up:
            found.update({each.message.id: each for each in consumer.receive(100, 0.1)})
        assert {message.id, reply.id} <= found.keys()
        consumer.settle([Ending(each) for each in found.values()])
        consumer.receive(100, 0.05)  # an idle one tidies
    result = StoredResult(new_id(), "SUCCESS", 0, b"1", 60.0)
    assert backend.put([result]) == [True]
    assert backend.get([result.task_id]) == [result]
    assert backend.wait([result.task_id], 5.0) == [result]
    assert [each.outcome for each in backend.begin([Start(new_id(), 0, "message", 60.0)])] == [BeginOutcome.GO]
    assert backend.join(f"join {name}", "member", b"x", size=1, expires=60.0).complete
    assert backend.write(f"p/{name}", b"value", expires=60.0) is not None
    assert f"p/{name}" in [record.key for record in backend.scan("p/")]
