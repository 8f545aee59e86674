"""The connections to the servers of one URL, and which of the servers is asked: the first of them that answers.

Two nodes of a cluster that carry out two writes of one revision at the same moment may each see theirs win; one node
that carries out both never does. So every process asks the same one: the first of the URL that answers. One that does
not is *away*: the next one takes its place, until a thread finds that it answers again. That thread lives as long as a
server is away.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from ekiden.locks import Flag, start_thread
from ekiden.loggers import safe_logger
from ekiden.urls import Host

from ekiden_couchdb.connection import Connection, deadline_context
from ekiden_couchdb.errors import LATE, TROUBLE, NotJSON, Overdue
from ekiden_couchdb.options import address_of

logger = safe_logger(__name__)

_MOST_IDLE = 100
LOOK_SECONDS = 2.0
"""So often it is looked whether a server that is away answers again, and so long each look may take."""

_FAIR_SHARE_SECONDS = 0.2
"""A server that had less time than this to take a connection is not given up for it."""

_RESTS = frozenset({"maintenance_mode", "nolb"})
"""What a node says of itself that is up and wants not to be asked."""


class Unreachable(Exception):
    """None of the servers can be reached: the last that was tried, and what went wrong with it."""

    def __init__(self, host: Host, error: Exception) -> None:
        super().__init__(str(error))
        self.host = host
        self.error = error


class Connections:
    """Used by any thread. A connection that was taken or made is its thread's until it is given back or closed.

    ``_lock`` guards the order of the servers, those that are away, and the thread that looks for these.
    """

    def __init__(self, hosts: Sequence[Host], context: ssl.SSLContext | None, server_hostname: str | None) -> None:
        self._hosts = tuple(dict.fromkeys(hosts))
        self._context = None if context is None else deadline_context(context)
        self._server_hostname = server_hostname
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._idle: deque[Connection] = deque()
        self._away: frozenset[Host] = frozenset()
        self._first = self._hosts[0]
        self._looking: threading.Thread | None = None
        self._ended = Flag()

    @property
    def hosts(self) -> tuple[Host, ...]:
        """All servers, in the order in which they are asked."""
        return self._hosts

    def reorder(self, hosts: Sequence[Host]) -> None:
        """Ask the same servers in another order from now on."""
        with self._lock:
            self._hosts = tuple(hosts)
            self._choose()

    def take_idle(self) -> Connection | None:
        """One that is connected already, to the server that is to be asked now."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was quicker
                return None
            if connection.host == self._first and connection.is_usable:
                return connection
            connection.close()
        return None

    def connect(self, deadline: float) -> Connection:
        """A new one, to the first server that answers. Each gets its share of the time that is left."""
        candidates = self._candidates()
        for number, host in enumerate(candidates):
            connection = self.open(host)
            share = (deadline - time.monotonic()) / (len(candidates) - number)
            try:
                if share <= 0:
                    raise Overdue
                connection.connect(time.monotonic() + share)
            except TROUBLE as error:
                connection.close()
                if share >= _FAIR_SHARE_SECONDS or not isinstance(error, LATE):
                    self.turn_from(host)
                if number == len(candidates) - 1:
                    raise Unreachable(host, error) from error
            except BaseException:
                connection.close()
                raise
            else:
                return connection
        raise AssertionError("a URL names at least one host")

    def open(self, host: Host) -> Connection:
        """One to ``host``, which is not connected yet."""
        return Connection(host, self._context, self._server_hostname)

    def give_back(self, connection: Connection) -> None:
        """It is idle now."""
        if self._closed or connection.host != self._first or len(self._idle) >= _MOST_IDLE:
            connection.close()
        else:
            self._idle.append(connection)

    def turn_from(self, host: Host) -> None:
        """It does not answer: ask the others first, until it does. The only server is always asked."""
        if len(self._hosts) == 1:
            return
        with self._lock:
            if self._closed or host in self._away:
                return
            self._away |= {host}
            self._choose()
            if self._looking is None:
                self._look_for_the_away()

    def close(self) -> None:
        """Close those that are idle; others are closed when they are given back. May be called again."""
        self._closed = True
        self._ended.set()
        with self._lock:
            looking = self._looking
        if looking is not None and looking is not threading.current_thread():
            looking.join(2 * LOOK_SECONDS)
        self._close_idle()

    def forget(self) -> None:
        """In a forked child: make new locks, and close those that are idle; that leaves the parent's as they are."""
        self._close_idle()
        self._begin()

    def _close_idle(self) -> None:
        idle, self._idle = self._idle, deque()
        for connection in idle:
            connection.close()

    # Which server.

    def _candidates(self) -> list[Host]:
        with self._lock:
            return sorted(self._hosts, key=self._away.__contains__)

    def _choose(self) -> None:
        """The caller holds the lock."""
        first = next((host for host in self._hosts if host not in self._away), self._hosts[0])
        if first != self._first:
            logger.info("CouchDB is asked through %s now, not through %s", address_of(first), address_of(self._first))
        self._first = first

    def _look_for_the_away(self) -> None:
        """Start the thread. The caller holds the lock."""
        thread = threading.Thread(target=self._look, name="ekiden-couchdb-hosts", daemon=True)
        try:
            start_thread(thread)
        except RuntimeError as error:
            # No more threads: what is away is asked last, and forgotten with the next trouble.
            logger.warning("no thread can be started that finds CouchDB's nodes again: %s", error)
            self._away = frozenset()
            self._choose()
        else:
            self._looking = thread

    def _look(self) -> None:
        try:
            self._look_until_all_are_back()
        except BaseException as bug:
            logger.critical("the thread that looks for CouchDB's nodes has failed: %r", bug, exc_info=bug)
            with self._lock:  # all are tried anew, and one that does not answer gets another thread
                self._away = frozenset()
                self._choose()
                self._looking = None

    def _look_until_all_are_back(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            with self._lock:
                away = self._away
            back = {host for host in away if self._is_back(host)}
            with self._lock:
                self._away -= back
                self._choose()
                if not self._away:
                    self._looking = None
                    return

    def _is_back(self, host: Host) -> bool:
        connection = self.open(host)
        deadline = time.monotonic() + LOOK_SECONDS
        try:
            connection.connect(deadline)
            answer = connection.exchange("GET", "/_up", None, {"Accept": "application/json"}, deadline)
        except (*TROUBLE, NotJSON):
            return False
        finally:
            connection.close()
        said: Any = answer.body.get("status") if isinstance(answer.body, dict) else None
        # Who stands in for CouchDB may not know the path; any answer that is none of trouble will do.
        return answer.status < HTTPStatus.INTERNAL_SERVER_ERROR and said not in _RESTS
