"""One file, many processes: locks, checkpoints, forks, and everything that can be wrong with a file."""

import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable
from ekiden.sqlite import database as module
from ekiden.sqlite import statements
from ekiden.sqlite.database import Database
from ekiden.testing.conformance.pace import assert_quick

NOBODY = 65534


def opened(path: Path, *, busy_timeout: float = 10.0) -> Database:
    return Database(
        str(path),
        synchronous="normal",
        busy_timeout=busy_timeout,
        unavailable=BrokerUnavailable,
        refused=BrokerRefused,
        too_large=BrokerRefused,
    )


def write_a_record(database: Database, key: str, value: bytes = b"") -> None:
    database.write(lambda connection: connection.execute(statements.WRITE_RECORD, (key, 1, None, value)).rowcount)


def records(database: Database) -> list[str]:
    return [row[0] for row in database.read(statements.SCAN_RECORDS, ("", None, 0))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    database = opened(path)
    yield database
    database.close()


# Transactions.


def test_what_is_committed_is_read(database: Database) -> None:
    write_a_record(database, "a")

    assert records(database) == ["a"]


def test_what_raises_is_rolled_back_and_the_next_transaction_works(database: Database) -> None:
    def write_and_fail(connection: sqlite3.Connection) -> None:
        connection.execute(statements.WRITE_RECORD, ("a", 1, None, b""))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        database.write(write_and_fail)

    write_a_record(database, "b")

    assert records(database) == ["b"]


def test_many_threads_and_connections_write_at_once_and_nothing_is_lost(path: Path, database: Database) -> None:
    other = opened(path)

    def write(number: int) -> None:
        for n in range(50):
            write_a_record(database if number % 2 else other, f"{number}-{n}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(records(database)) == 300
    other.close()


@pytest.mark.slow
def test_many_processes_that_open_a_new_file_at_once_all_succeed(path: Path) -> None:
    script = f"from tests.unit.test_sqlite_database import *; write_a_record(opened(Path({str(path)!r})), sys.argv[1])"
    processes = [subprocess.Popen([sys.executable, "-c", script, str(number)]) for number in range(6)]

    assert [process.wait(60) for process in processes] == [0] * 6

    database = opened(path)
    assert records(database) == [str(number) for number in range(6)]
    database.close()


def test_closing_a_database_and_using_it_again_opens_it_again(database: Database) -> None:
    write_a_record(database, "a")
    database.close()

    assert records(database) == ["a"]


# What is wrong with files.


def test_a_file_that_another_program_holds_locked_is_unavailable_for_now(path: Path) -> None:
    database = opened(path, busy_timeout=0.2)
    write_a_record(database, "before")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()

    with pytest.raises(BrokerUnavailable, match="locked by another process"):
        write_a_record(database, "while")

    took = time.monotonic() - started
    assert took > 0.15
    assert_quick(took, 2)
    assert records(database) == ["before"]
    other.execute("COMMIT")
    write_a_record(database, "after")
    assert records(database) == ["after", "before"]
    other.close()
    database.close()


def test_a_full_disk_is_unavailable_for_now_and_deleting_still_works(database: Database) -> None:
    for number in range(50):
        write_a_record(database, f"{number:02}", bytes(4000))
    ((pages,),) = database.write(lambda connection: connection.execute("PRAGMA page_count").fetchall())
    database.write(lambda connection: connection.execute(f"PRAGMA max_page_count={pages}").fetchall())

    with pytest.raises(BrokerUnavailable, match="the disk is full"):
        write_a_record(database, "too much", bytes(100_000))

    database.write(lambda connection: connection.execute(statements.DELETE_RECORD, ("00",)).rowcount)
    assert len(records(database)) == 49


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_unavailable_and_nothing_is_lost(path: Path) -> None:
    script = f"""
import resource
from tests.unit.test_sqlite_database import *
database = opened(Path({str(path)!r}))
write_a_record(database, "before")
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    write_a_record(database, "large", bytes(1_000_000))
except BrokerUnavailable as error:
    print(error)
write_a_record(database, "after")
print(records(database))
"""

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)

    error, kept = result.stdout.splitlines()
    assert error.startswith(f"sqlite:///{path}: the disk ")
    assert kept == "['after', 'before']"


def make_newer(path: Path) -> None:
    database = opened(path)
    write_a_record(database, "a")
    newer = f"PRAGMA user_version={statements.FORMAT_VERSION + 1}"
    database.write(lambda connection: connection.execute(newer).fetchall())
    database.close()


def make_anothers(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE customers (name)")
    connection.close()


def damage(path: Path) -> None:
    database = opened(path)
    for number in range(1000):
        write_a_record(database, str(number), bytes(100))
    database.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * len(content[4096:])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b"this is a text, and not at all a database" * 100), "not an SQLite database"),
        (make_anothers, "belongs to another program"),
        (make_newer, "install a newer ekiden"),
        (damage, "damaged"),
    ],
    ids=["text", "another program's", "newer", "damaged"],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(
    path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(path)
    database = opened(path)

    for use in (lambda: write_a_record(database, "a"), lambda: records(database)):
        with pytest.raises(BrokerRefused, match=said) as refusal:
            use()
        assert str(refusal.value).startswith(f"sqlite:///{path}: ")
        assert "\n" not in str(refusal.value)
    database.close()


@pytest.mark.slow
def test_a_file_that_may_only_be_read_is_refused() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.db"
        database = opened(path)
        write_a_record(database, "a")
        database.close()
        os.chmod(directory, 0o755)
        path.chmod(0o444)
        script = f"""
from tests.unit.test_sqlite_database import *
if os.getuid() == 0:  # whom no right stops
    os.setuid(NOBODY)
try:
    write_a_record(opened(Path({str(path)!r})), "b")
except BrokerRefused as error:
    print(error)
"""

        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)

        assert result.stdout.startswith(f"sqlite:///{path}: the file or its directory is read-only for this user")


def test_a_place_where_no_file_can_be_made_is_refused() -> None:
    database = opened(Path("/proc/x.db"))

    with pytest.raises(BrokerRefused, match="cannot be opened or made"):
        write_a_record(database, "a")


def test_only_its_owner_may_read_the_file(path: Path, database: Database) -> None:
    write_a_record(database, "a")

    assert {entry.name: entry.stat().st_mode & 0o077 for entry in path.parent.iterdir()} == {
        "x.db": 0,
        "x.db-shm": 0,
        "x.db-wal": 0,
    }


def test_the_file_shrinks_when_it_can(path: Path, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAL_IDLE_SECONDS", 0.0)
    monkeypatch.setattr(module, "CHECKPOINT_EVERY_SECONDS", 0.0)
    for number in range(700):
        write_a_record(database, str(number), bytes(10_000))
    database.tidy()
    grown = path.stat().st_size
    database.write(lambda connection: connection.execute("DELETE FROM record").rowcount)

    database.tidy()

    assert path.stat().st_size < grown - 3_000_000


# Checkpoints.


def wal_size(path: Path) -> int:
    return path.with_name("x.db-wal").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("size_bytes", [100, 10_000, 1_000_000], ids=["small", "medium", "large"])
def test_the_wal_stays_bounded(path: Path, database: Database, size_bytes: int) -> None:
    largest = 0
    for number in range(3000 if size_bytes < 1_000_000 else 150):
        write_a_record(database, str(number % 10), bytes(size_bytes))
        largest = max(largest, wal_size(path))

    assert largest < 2 * module.WAL_LIMIT_BYTES


def test_an_idle_process_empties_the_wal(path: Path, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    write_a_record(database, "a")
    database.tidy()
    assert wal_size(path) > 0  # written a moment ago: nobody is idle
    monkeypatch.setattr(module, "WAL_IDLE_SECONDS", 0.0)

    database.tidy()

    assert wal_size(path) == 0
    assert records(database) == ["a"]


def test_one_checkpoint_does_not_follow_another_at_once(
    path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAL_IDLE_SECONDS", 0.0)
    monkeypatch.setattr(module, "CHECKPOINT_EVERY_SECONDS", 60.0)
    other = opened(path)
    write_a_record(database, "a")
    database.tidy()
    write_a_record(other, "b")

    other.tidy()

    assert wal_size(path) > 0
    other.close()


def test_a_checkpoint_that_came_too_soon_is_not_tried_at_each_commit(
    path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECKPOINT_EVERY_SECONDS", 60.0)
    monkeypatch.setattr(module, "WAL_PAGES", 1)
    write_a_record(database, "a")  # followed by a checkpoint
    write_a_record(database, "b")  # too soon for another one
    lock = path.with_name("x.db-checkpoint.lock")
    lock.unlink()

    write_a_record(database, "c")

    assert not lock.exists()  # whoever tries makes it


def test_a_reader_that_never_ends_does_not_stop_the_writers(path: Path, database: Database) -> None:
    write_a_record(database, "a")
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM record").fetchall()
    started = time.monotonic()

    for number in range(600):
        write_a_record(database, f"b{number}")

    assert time.monotonic() - started < 20
    assert len(records(database)) == 601
    reader.close()


# Forks.


def in_a_child(act: Callable[[], object]) -> Callable[[], int]:
    """Do it in a forked child; calling what is returned waits for the child and returns its exit code."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the child must not go on as a second pytest
            os.write(2, f"in the child: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_parent_and_child_both_write_after_a_fork(database: Database) -> None:
    write_a_record(database, "before")

    ended = in_a_child(lambda: write_a_record(database, "child"))
    write_a_record(database, "parent")

    assert ended() == 0
    assert records(database) == ["before", "child", "parent"]


def test_what_a_child_commits_is_kept_when_the_parent_closes_first(path: Path, database: Database) -> None:
    write_a_record(database, "before")
    closed_end, closing_end = os.pipe()

    def write_twice() -> None:
        write_a_record(database, "first")
        os.read(closed_end, 1)  # until the parent has closed
        write_a_record(database, "second")

    ended = in_a_child(write_twice)
    while "first" not in records(database):
        time.sleep(0.01)
    database.close()
    os.write(closing_end, b"!")

    assert ended() == 0
    later = opened(path)
    assert records(later) == ["before", "first", "second"]
    later.close()


def test_forks_while_other_threads_read_and_write_lose_nothing(database: Database) -> None:
    write_a_record(database, "0")
    stopped = threading.Event()

    def work() -> None:
        number = 0
        while not stopped.is_set():
            number += 1
            write_a_record(database, f"thread {number:05}")
            records(database)

    thread = threading.Thread(target=work)
    thread.start()
    ends = [in_a_child(lambda number=number: write_a_record(database, f"child {number}")) for number in range(10)]
    codes = [ended() for ended in ends]
    stopped.set()
    thread.join()

    assert codes == [0] * 10
    assert [key for key in records(database) if key.startswith("child")] == [f"child {number}" for number in range(10)]


def test_a_child_forked_while_a_transaction_would_not_end_refuses_to_use_the_file(path: Path) -> None:
    database = opened(path, busy_timeout=-0.9)  # so that the fork waits for a tenth of a second only
    write_a_record(database, "before")

    def must_be_refused() -> None:
        with pytest.raises(BrokerRefused, match="spawn"):
            write_a_record(database, "child")

    def fork_and_write(connection: sqlite3.Connection) -> None:
        ended = in_a_child(must_be_refused)
        assert ended() == 0
        connection.execute(statements.WRITE_RECORD, ("during", 1, None, b""))

    database.write(fork_and_write)

    assert records(database) == ["before", "during"]
    database.close()
