"""What the tests of workers share: patience, and short words for looking at what a worker left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ekiden import Ekiden
from ekiden.message import Delivery, Message, Seen

PATIENCE = 10.0
"""Seconds that a test waits for what must happen, before it says that it did not."""

Found = TypeVar("Found")


def eventually(look: Callable[[], Found | None], *, what: str, within: float = PATIENCE) -> Found:
    """Call ``look`` until it returns something true, and return that."""
    give_up = time.monotonic() + within
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < give_up, f"{what}: not within {within} s; last seen: {found!r}"
        time.sleep(0.005)


def arrived(event: threading.Event, within: float = PATIENCE) -> bool:
    """Whether an event is set, at last."""
    return event.wait(within)


def is_empty(app: Ekiden, queue: str = "default") -> bool:
    """Whether a queue holds nothing at all."""
    depth = app.transport.depth(queue)
    return not (depth.ready or depth.delayed or depth.leased)


def wait_until_settled(app: Ekiden, queue: str = "default") -> None:
    """Wait until a queue holds nothing any more."""
    eventually(lambda: is_empty(app, queue), what=f"{queue} is empty")


def dead_letters(app: Ekiden, queue: str = "default") -> list[Message]:
    """What is in ``<queue>.dead``."""
    return [seen.message for seen in app.transport.browse(f"{queue}.dead", limit=100_000)]


def the_dead_letter(app: Ekiden, queue: str = "default") -> Message:
    """The one dead letter there is, once it is there."""
    (found,) = eventually(lambda: dead_letters(app, queue), what=f"a dead letter in {queue}.dead")
    return found


def the_message(app: Ekiden, queue: str = "default") -> Seen:
    """The one message of a queue."""
    (found,) = app.transport.browse(queue)
    return found


def hand_out_and_lose(app: Ekiden, times: int, queue: str = "default") -> None:
    """Receive what is in a queue and never end it, as a worker does that is killed, ``times`` times."""
    for number in range(times):
        with app.transport.consumer([queue], lease=60.0, prefetch=100, name=f"doomed-{number}") as consumer:
            deliveries: list[Delivery] = consumer.receive(100, PATIENCE)
            assert deliveries


class Gate:
    """A body that waits at a gate: the test sees that it arrived, and lets it through."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.open = threading.Event()

    def pass_through(self) -> None:
        """Called by the body."""
        self.arrived.set()
        assert self.open.wait(PATIENCE), "nobody opened the gate"


class Notes:
    """What bodies and receivers noted, in order."""

    def __init__(self) -> None:
        self.taken: list[Any] = []

    def take(self, what: Any) -> None:
        """Note something down."""
        self.taken.append(what)

    def wait_for(self, count: int) -> list[Any]:
        """Every note, once there are ``count``."""
        eventually(lambda: len(self.taken) >= count, what=f"{count} notes, not {self.taken!r}")
        return list(self.taken)
