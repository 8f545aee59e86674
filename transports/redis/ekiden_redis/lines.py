"""Several connections that are waited for at once, and a bell that ends the waiting."""

from __future__ import annotations

import selectors
import socket
from contextlib import suppress
from typing import Generic, Protocol, TypeVar


class Line(Protocol):
    """What has a socket."""

    def fileno(self) -> int:
        """The socket's file descriptor."""
        ...


Owner = TypeVar("Owner")


class Lines(Generic[Owner]):
    """Each line has an owner, which is told when there is something to read.

    One thread waits; any may ring, add and remove meanwhile. Nobody may after it was closed.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)

    def wait(self, seconds: float) -> list[Owner]:
        """The owners of what can be read, after up to so many seconds; none when somebody rang or nothing came."""
        ready = [key.data for key, _ in self._selector.select(max(0.0, seconds))]
        if None in ready:
            self._bell.recv(1024)
        return [owner for owner in ready if owner is not None]

    def ring(self) -> None:
        """End the waiting, or the next one if nobody waits."""
        with suppress(BlockingIOError):  # it has been rung so often that nobody will miss it
            self._rope.send(b"!")

    def add(self, line: Line, owner: Owner) -> None:
        """Wait for this one, too, from now on."""
        self._selector.register(line, selectors.EVENT_READ, owner)
        self.ring()  # not every selector notices what is added while it waits

    def remove(self, line: Line) -> None:
        """Wait for this one no longer. It must be open still."""
        self._selector.unregister(line)

    def close(self) -> None:
        """Close the bell; the lines are their owners'. In a forked child it takes nothing from the parent."""
        self._selector.close()
        self._bell.close()
        self._rope.close()
