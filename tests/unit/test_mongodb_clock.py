"""The server's time is never thought to be later than it is, and is asked for again when it may have changed."""

from __future__ import annotations

import threading
import time

import pytest
from ekiden_mongodb import clock
from ekiden_mongodb.clock import ServerClock

AHEAD = 5000.0
"""How far (seconds) the server's clock is ahead of this machine's monotonic one."""


class Server:
    """A server that tells its time, and how often it was asked. ``slow``: seconds before it answers."""

    def __init__(self, slow: float = 0.0) -> None:
        self.ahead = AHEAD
        self.asked = 0
        self.name = "first"
        self.slow = slow

    def tell(self) -> float:
        self.asked += 1
        told = time.monotonic() + self.ahead
        if self.slow:
            threading.Event().wait(self.slow)
        return told


@pytest.mark.parametrize("slow", [0.0, 0.02])
def test_the_time_is_a_lower_bound_that_is_wrong_by_less_than_it_says(slow: float) -> None:
    server = Server(slow)
    found = ServerClock(server.tell, lambda: server.name)

    before = time.monotonic() + AHEAD
    now = found.now()
    after = time.monotonic() + AHEAD

    assert now <= after
    assert now + found.reading().error >= before


def test_it_is_asked_for_once_and_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    found = ServerClock(server.tell, lambda: server.name)
    for _ in range(10):
        found.now()
    asked_once = server.asked

    monkeypatch.setattr(clock, "MEASURED_FOR_SECONDS", 0.0)
    found.now()

    assert server.asked == 2 * asked_once


def test_it_is_asked_for_again_after_trouble() -> None:
    server = Server()
    found = ServerClock(server.tell, lambda: server.name)
    found.now()
    server.ahead += 100

    found.doubt()

    assert found.now() >= time.monotonic() + AHEAD + 99


def test_another_primary_is_asked_for_its_own_time() -> None:
    server = Server()
    found = ServerClock(server.tell, lambda: server.name)
    found.now()
    server.ahead, server.name = AHEAD - 100, "second"

    assert found.now() <= time.monotonic() + AHEAD - 100


def test_it_is_asked_for_again_when_this_machine_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    found = ServerClock(server.tell, lambda: server.name)
    found.now()
    server.ahead += 3600
    right_time = time.time

    monkeypatch.setattr(time, "time", lambda: right_time() + 3600)

    assert found.now() >= time.monotonic() + AHEAD + 3599
