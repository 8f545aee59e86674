"""The connections to the servers of one URL: those that are idle, and which server is tried first."""

from __future__ import annotations

import ssl
import time
from collections import deque
from collections.abc import Sequence

from ekiden.urls import Host

from ekiden_couchdb.connection import Connection, deadline_context
from ekiden_couchdb.errors import TROUBLE, Overdue

_MOST_IDLE = 100


class Unreachable(Exception):
    """None of the servers can be reached: the last that was tried, and what went wrong with it."""

    def __init__(self, host: Host, error: Exception) -> None:
        super().__init__(str(error))
        self.host = host
        self.error = error


class Connections:
    """Used by any thread. A connection that was taken or made is its thread's until it is given back or closed."""

    def __init__(self, hosts: Sequence[Host], context: ssl.SSLContext | None, server_hostname: str | None) -> None:
        self._hosts = hosts
        self._context = None if context is None else deadline_context(context)
        self._server_hostname = server_hostname
        self._closed = False
        self._first = 0
        self._idle: deque[Connection] = deque()

    def take_idle(self) -> Connection | None:
        """One that is connected already."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was quicker
                return None
            if connection.is_usable:
                return connection
            connection.close()
        return None

    def connect(self, deadline: float) -> Connection:
        """A new one, to the first server that can be reached. Each gets its share of the time that is left."""
        first, count = self._first, len(self._hosts)
        for number in range(count):
            host = self._hosts[(first + number) % count]
            connection = Connection(host, self._context, self._server_hostname)
            left = deadline - time.monotonic()
            try:
                if left <= 0:
                    raise Overdue
                connection.connect(time.monotonic() + left / (count - number))
            except TROUBLE as error:
                connection.close()
                if number == count - 1:
                    raise Unreachable(host, error) from error
            else:
                self._first = (first + number) % count
                return connection
        raise AssertionError("a URL names at least one host")

    def give_back(self, connection: Connection) -> None:
        """It is idle now."""
        if self._closed or len(self._idle) >= _MOST_IDLE:
            connection.close()
        else:
            self._idle.append(connection)

    def turn_from(self, host: Host) -> None:
        """Try another server first the next time."""
        if self._hosts[self._first] == host:
            self._first = (self._first + 1) % len(self._hosts)

    def close(self) -> None:
        """Close those that are idle; others are closed when they are given back. May be called again."""
        self._closed = True
        self.forget()

    def forget(self) -> None:
        """Close those that are idle. In a forked child that sends nothing, and leaves the parent's as they are."""
        idle, self._idle = self._idle, deque()
        for connection in idle:
            connection.close()
