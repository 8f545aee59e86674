"""Doorbells: who is rung, who is not, and what happens to bells that nobody answers."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from ekiden.sqlite import bell
from ekiden.sqlite.bell import Bell, Bells, PollingBell, SocketBell

LONG = 10.0


def nothing_changes() -> int:
    return 0


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Shorter than pytest's own: the addresses of the sockets in it have a hundred bytes."""
    with TemporaryDirectory() as short:
        yield Path(short)


@pytest.fixture
def bells(tmp_path: Path) -> Iterator[Bells]:
    bells = Bells(str(tmp_path / "x.db"), sockets=True, changes=nothing_changes)
    yield bells
    bells.close()


def waited(bell: Bell, timeout: float = LONG) -> float:
    started = time.monotonic()
    bell.wait(timeout)
    return time.monotonic() - started


def test_a_ring_before_the_wait_ends_it_at_once(bells: Bells) -> None:
    mine = bells.bell(["queue a"])

    bells.ring(["queue a"])

    assert waited(mine) < 1
    assert waited(mine, 0.05) >= 0.05
    mine.close()


def test_only_who_waits_for_the_subject_is_rung(bells: Bells) -> None:
    mine, neighbour = bells.bell(["queue a", "queue b"]), bells.bell(["queue c"])

    bells.ring(["queue b"])

    assert waited(mine) < 1
    assert waited(neighbour, 0.05) >= 0.05
    mine.close()
    neighbour.close()


def test_another_process_view_of_the_same_file_is_rung(tmp_path: Path, bells: Bells) -> None:
    others = Bells(str(tmp_path / "x.db"), sockets=True, changes=nothing_changes)
    mine = others.bell(["topic t"])
    ringing = threading.Timer(0.05, bells.ring, [["topic t"]])

    ringing.start()

    assert waited(mine) < LONG
    ringing.join()
    mine.close()


def test_a_bell_made_right_after_the_directory_was_listed_is_rung(bells: Bells) -> None:
    for number in range(50):
        bells.ring([f"queue {number}"])
        mine = bells.bell([f"queue {number}"])
        bells.ring([f"queue {number}"])
        assert waited(mine, 1) < 1
        mine.close()


def test_ringing_where_nobody_waits_does_nothing(bells: Bells, tmp_path: Path) -> None:
    bells.ring(["queue a"])

    assert list(tmp_path.iterdir()) == []


def test_a_bell_left_by_a_dead_process_is_removed(bells: Bells, tmp_path: Path) -> None:
    mine = bells.bell(["queue a"])
    (address,) = (tmp_path / "x.db-bells").iterdir()
    dead = address.with_name(f"{address.name.partition('.')[0]}.00000000")
    left = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    left.bind(str(dead))
    left.close()

    bells.ring(["queue a"])

    assert not dead.exists()
    assert waited(mine) < 1
    mine.close()


def test_a_bell_that_is_never_answered_does_not_block_who_rings(bells: Bells) -> None:
    mine = bells.bell(["queue a"])
    started = time.monotonic()

    for _ in range(5000):
        bells.ring(["queue a"])

    assert time.monotonic() - started < 5
    assert waited(mine) < 1
    assert waited(mine, 0.05) >= 0.05
    mine.close()


def test_closing_the_last_bell_leaves_nothing(bells: Bells, tmp_path: Path) -> None:
    bells.bell(["queue a", "queue b"]).close()
    bells.close()

    assert list(tmp_path.iterdir()) == []


def test_only_its_owner_may_enter_the_directory(bells: Bells, tmp_path: Path) -> None:
    mine = bells.bell(["queue a"])

    assert (tmp_path / "x.db-bells").stat().st_mode & 0o777 == 0o700
    mine.close()


def test_a_long_path_gets_a_short_directory_that_all_find(tmp_path: Path) -> None:
    long = tmp_path / ("d" * 100)
    long.mkdir()
    first, second = (Bells(str(long / "x.db"), sockets=True, changes=nothing_changes) for _ in range(2))
    mine = first.bell(["queue a"])

    second.ring(["queue a"])

    assert isinstance(mine, SocketBell)
    assert waited(mine) < 1
    mine.close()
    second.close()


@pytest.mark.parametrize(
    "spoil", [lambda place: place.write_text("a file"), lambda place: (place.mkdir(), place.chmod(0o777))]
)
def test_a_directory_that_is_not_private_is_not_used(
    bells: Bells, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(tmp_path / "x.db-bells")

    assert isinstance(bells.bell(["queue a"]), PollingBell)


def test_a_poller_notices_a_change(tmp_path: Path) -> None:
    version = [1]
    mine = Bells(str(tmp_path / "x.db"), sockets=False, changes=lambda: version[0]).bell(["queue a"])
    changing = threading.Timer(0.1, version.__setitem__, [0, 2])

    changing.start()

    assert waited(mine) < LONG
    assert waited(mine, 0.05) >= 0.05
    changing.join()


def test_of_many_pollers_one_looks_and_all_are_woken(tmp_path: Path) -> None:
    looks = [0]

    def look() -> int:
        looks[0] += 1
        return int(changed.is_set())

    changed = threading.Event()
    polling = Bells(str(tmp_path / "x.db"), sockets=False, changes=look)
    threads = [threading.Thread(target=waited, args=(polling.bell(["queue a"]),)) for _ in range(20)]
    for thread in threads:
        thread.start()
    looks[0] = 0

    time.sleep(10 * bell.POLL_SECONDS)
    seen = looks[0]
    changed.set()
    for thread in threads:
        thread.join(LONG)

    assert not any(thread.is_alive() for thread in threads)
    assert seen <= 20


def test_ringing_a_poller_ends_its_wait_alone(tmp_path: Path) -> None:
    polling = Bells(str(tmp_path / "x.db"), sockets=False, changes=nothing_changes)
    mine, other = polling.bell([]), polling.bell([])

    mine.ring()

    assert waited(mine) < 1
    assert waited(other, 0.05) >= 0.05


def test_a_forked_child_does_not_remove_the_parents_bell(bells: Bells, tmp_path: Path) -> None:
    mine = bells.bell(["queue a"])
    child = os.fork()
    if child == 0:
        mine.abandon()
        bells.forget()
        os._exit(0)
    os.waitpid(child, 0)

    bells.ring(["queue a"])

    assert waited(mine) < 1
    mine.close()
