"""Opens a TCP connection to a host, by whichever of its addresses answers first.

A name may have several addresses (``localhost`` is ``::1`` and ``127.0.0.1``), of which some may be dead: refusing, or
silent. They are tried in the resolver's order. The next one is tried as soon as one refuses, and beside one that says
nothing for ``STAGGER_SECONDS`` (RFC 8305), so a dead address costs a moment and not the whole deadline.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from typing import Any

STAGGER_SECONDS = 0.25

_UNDER_WAY = frozenset({errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", errno.EINPROGRESS)})

_Address = tuple[int, int, int, str, Any]
"""As ``socket.getaddrinfo`` lists them."""


def open_tcp(host: str, port: int, deadline: float) -> socket.socket:
    """A connected socket that does not block, by ``deadline`` (``time.monotonic()`` seconds).

    Raises socket.gaierror for a name that has no address, TimeoutError when no address has answered, and otherwise what
    went wrong; of several addresses the OSError names each.
    """
    addresses: list[_Address] = list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    attempts = _Attempts(addresses)
    try:
        return attempts.first_connected(deadline)
    finally:
        attempts.close()


class _Attempts:
    """The addresses of one host that are being tried. ``close`` closes all but the one that was returned."""

    def __init__(self, addresses: list[_Address]) -> None:
        self._left = addresses[::-1]
        self._selector = selectors.DefaultSelector()
        self._under_way: dict[socket.socket, Any] = {}
        self._errors: list[tuple[Any, OSError]] = []

    def first_connected(self, deadline: float) -> socket.socket:
        """Try the addresses, and return the first socket that is connected."""
        start_at = time.monotonic()
        while self._left or self._under_way:
            now = time.monotonic()
            if self._left and (now >= start_at or not self._under_way):
                start_at = now + STAGGER_SECONDS
                connected = self._start(self._left.pop())
            else:
                if now >= deadline:
                    raise TimeoutError
                until = min(deadline, start_at) if self._left else deadline
                connected = self._look(until - now)
            if connected is not None:
                return connected
        raise self._failure()

    def _start(self, address: _Address) -> socket.socket | None:
        family, kind, protocol, _, where = address
        try:
            opened = socket.socket(family, kind, protocol)
        except OSError as error:  # this machine does not speak IPv6
            self._errors.append((where, error))
            return None
        self._under_way[opened] = where
        opened.setblocking(False)
        code = opened.connect_ex(where)
        if code in _UNDER_WAY:
            self._selector.register(opened, selectors.EVENT_WRITE)
            return None
        return self._ended(opened, code)

    def _look(self, seconds: float) -> socket.socket | None:
        """Wait for one to end, well or badly."""
        for key, _ in self._selector.select(max(0.0, seconds)):
            opened = key.fileobj
            assert isinstance(opened, socket.socket)
            self._selector.unregister(opened)
            connected = self._ended(opened, opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
            if connected is not None:
                return connected
        return None

    def _ended(self, opened: socket.socket, code: int) -> socket.socket | None:
        where = self._under_way.pop(opened)
        if not code:
            return opened
        opened.close()
        self._errors.append((where, OSError(code, os.strerror(code))))
        return None

    def _failure(self) -> OSError:
        """What to raise when none has answered: the last error, which names all addresses where there are several."""
        if not self._errors:
            return OSError(errno.EADDRNOTAVAIL, "it has no address")
        last = self._errors[-1][1]
        if len(self._errors) == 1:
            return last
        by_reason: dict[str, list[str]] = {}
        for where, error in self._errors:
            by_reason.setdefault(error.strerror or str(error), []).append(str(where[0]))
        text = "; ".join(f"{reason} ({', '.join(names)})" for reason, names in by_reason.items())
        return OSError(last.errno, text)

    def close(self) -> None:
        """Give up the attempts that are still under way."""
        for opened in self._under_way:
            opened.close()
        self._selector.close()
