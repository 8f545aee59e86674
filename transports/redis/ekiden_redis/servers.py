"""Which server is the right one: the only one, the master that the Sentinels name, or the one that has a key's slot.

    Server                           one server and the idle connections to it
    OneServer, Sentinels, Cluster    find the Server for a key

What they raise (``errors.TROUBLE``) is explained by whoever called. Any thread may call them.
"""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from operator import itemgetter

import hiredis
from ekiden.locks import call_holding
from ekiden.urls import Host

from ekiden_redis.connection import Access, Address, Connection, Part, Reply
from ekiden_redis.errors import TROUBLE, Overdue
from ekiden_redis.keys import slot_of
from ekiden_redis.options import Place

_IDLE_SECONDS = 60.0
"""Connections that nobody has used for so long are closed, one with each call."""

_ONE_SENTINEL_SECONDS = 2.0
"""So long one Sentinel, or one server of a cluster, has to say where the others are, before the next is asked."""


class Server:
    """One server and the idle connections to it. ``check`` raises when a new connection leads to the wrong one."""

    def __init__(
        self, address: Address, access: Access, *, check: Callable[[Connection, float], None] | None = None
    ) -> None:
        self.address = address
        self._access = access
        self._check = check
        self._idle: list[Connection] = []  # append and pop are single steps, so no lock is needed
        self._closed = False

    def connect(self, deadline: float, *, protocol: int = 2) -> Connection:
        """A new connection, speaking this version of RESP."""
        connection = Connection(self.address, self._access, deadline, protocol=protocol)
        try:
            if self._check is not None:
                self._check(connection, deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    def take_idle(self) -> Connection | None:
        """A connection that nobody uses; None when there is none."""
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if not connection.is_stale():
                return connection
            connection.close()
        return None

    def give_back(self, connection: Connection) -> None:
        """A call has ended well."""
        now = connection.used_at = time.monotonic()
        idle = self._idle
        idle.append(connection)  # the one that was used last is taken first, so the others grow old
        if self._closed:
            self.drop_idle()
        elif len(idle) > 1:
            self._close_the_old(now)

    def drop_idle(self) -> None:
        """Close what nobody uses: it is from before the server was started again."""
        while self._idle:
            self._close_oldest()

    def close(self) -> None:
        """Close what nobody uses now, and the others when they are given back."""
        self._closed = True
        self.drop_idle()

    def _close_the_old(self, now: float) -> None:
        if any(now - oldest.used_at > _IDLE_SECONDS for oldest in self._idle[:1]):
            self._close_oldest()

    def _close_oldest(self) -> None:
        with suppress(IndexError):  # another thread was faster
            self._idle.pop(0).close()


class Servers(ABC):
    """Finds the server for a key."""

    @abstractmethod
    def of(self, key: bytes, deadline: float) -> Server:
        """The server that has ``key``."""

    @abstractmethod
    def failed(self, server: Server) -> None:
        """``server`` did not answer, or says that it is not the master: look again before the next call."""

    def redirected(self, reply: str) -> Server | None:
        """The server that an error reply sends us to; None when it does not."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Close every idle connection."""


class OneServer(Servers):
    """The URL names the server."""

    def __init__(self, place: Place, access: Access) -> None:
        (host,) = place.hosts or (Host(""),)
        self._server = Server(Address(host.name, host.port or 0, place.path), access)

    def of(self, key: bytes, deadline: float) -> Server:
        return self._server

    def failed(self, server: Server) -> None:
        server.drop_idle()

    def close(self) -> None:
        self._server.close()


class Sentinels(Servers):
    """The Sentinels of the URL say which server is the master of a service; it is asked whether it knows."""

    def __init__(self, place: Place, access: Access, access_to_sentinels: Access) -> None:
        self._place = place
        self._access = access
        self._access_to_sentinels = access_to_sentinels
        self._asking = threading.RLock()
        self._sentinels = [Address(host.name, host.port or 0) for host in place.hosts]
        self._master: Server | None = None
        self._closed = False

    def of(self, key: bytes, deadline: float) -> Server:
        master = self._master
        if master is not None:
            return master
        found: list[Server] = []

        def find() -> None:
            if self._master is None:
                self._master = Server(self._ask(deadline), self._access, check=_check_is_master)
                if self._closed:
                    self._master.close()
            found.append(self._master)

        _call_alone(self._asking, find, deadline)
        return found[0]

    def failed(self, server: Server) -> None:
        if self._master is server:
            self._master = None
        server.close()

    def close(self) -> None:
        self._closed = True
        master = self._master
        if master is not None:
            master.close()

    def _ask(self, deadline: float) -> Address:
        """What the first Sentinel says that answers; it is asked first the next time."""
        trouble: Exception | None = None
        for sentinel in list(self._sentinels):
            try:
                reply = _ask_one(
                    sentinel,
                    self._access_to_sentinels,
                    ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._place.service),
                    deadline,
                )
            except TROUBLE as error:
                trouble = trouble or error
                continue
            if reply is not None:
                self._sentinels.remove(sentinel)
                self._sentinels.insert(0, sentinel)
                name, port = reply
                return Address(name.decode(), int(port))
            trouble = UnknownService(f"none of the Sentinels knows a service {self._place.service!r}")
        assert trouble is not None
        raise trouble


class UnknownService(OSError):
    """No Sentinel that was asked knows a master for the service."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.strerror = text


class NotTheMaster(OSError):
    """A Sentinel named a server that is not the master: a failover is under way."""

    def __init__(self) -> None:
        super().__init__("it is not the master (any more): the Sentinels are choosing another")
        self.strerror = str(self)


def _check_is_master(connection: Connection, deadline: float) -> None:
    role = connection.call("ROLE", deadline=deadline)
    # A user who may not ask is believed the Sentinels' word.
    if isinstance(role, list) and role[0] != b"master":
        raise NotTheMaster


class Cluster(Servers):
    """Any server of a cluster says which server has which slot; what has moved is learned from its redirections."""

    def __init__(self, place: Place, access: Access) -> None:
        self._place = place
        self._access = access
        self._asking = threading.RLock()
        self._servers: dict[Address, Server] = {}
        self._slots: list[tuple[int, int, Address]] = []
        self._moved: dict[int, Address] = {}
        self._known = False
        self._closed = False

    def of(self, key: bytes, deadline: float) -> Server:
        slot = slot_of(key)
        if not self._known:
            _call_alone(self._asking, lambda: None if self._known else self._ask(deadline), deadline)
        address = self._moved.get(slot)
        if address is None:
            slots = self._slots
            at = bisect_right(slots, slot, key=itemgetter(0)) - 1
            if at < 0 or slots[at][1] < slot:
                self._known = False
                raise NobodyHasTheSlot(slot)
            address = slots[at][2]
        return self._server(address)

    def failed(self, server: Server) -> None:
        self._known = False
        server.drop_idle()

    def redirected(self, reply: str) -> Server | None:
        kind, _, rest = reply.partition(" ")
        if kind not in {"MOVED", "ASK"}:
            return None
        slot, _, where = rest.partition(" ")
        name, _, port = where.split(" ")[0].rpartition(":")
        address = Address(name or self._place.hosts[0].name, int(port))
        if kind == "MOVED":
            self._moved[int(slot)] = address
        return self._server(address)

    def close(self) -> None:
        self._closed = True
        for server in list(self._servers.values()):
            server.close()

    def _server(self, address: Address) -> Server:
        server = self._servers.get(address)
        if server is None:
            server = self._servers.setdefault(address, Server(address, self._access))
            if self._closed:
                server.close()
        return server

    def _ask(self, deadline: float) -> None:
        """Ask the servers that are known, in any order, then those of the URL, until one says who has what."""
        trouble: Exception | None = None
        known = list(self._servers)
        random.shuffle(known)
        for address in [*known, *(Address(host.name, host.port or 0) for host in self._place.hosts)]:
            try:
                reply = _ask_one(address, self._access, ("CLUSTER", "SLOTS"), deadline)
            except TROUBLE as error:
                trouble = trouble or error
                continue
            ranges = [
                (first, last, Address((master[0] or b"").decode() or address.host, master[1]))
                for first, last, master, *_ in reply
            ]
            self._slots = sorted(ranges, key=itemgetter(0))
            self._moved = {}
            self._known = True
            return
        assert trouble is not None
        raise trouble


class NobodyHasTheSlot(OSError):
    """No server of the cluster has a slot."""

    def __init__(self, slot: int) -> None:
        super().__init__(f"no server of the cluster has slot {slot}")
        self.strerror = str(self)


def _call_alone(lock: threading.RLock, act: Callable[[], None], deadline: float) -> None:
    """Call ``act`` while holding ``lock``. Raises Overdue where that is another thread's until the deadline."""
    if not call_holding(lock, act, timeout=deadline - time.monotonic()):
        raise Overdue


def _ask_one(address: Address, access: Access, command: tuple[Part, ...], deadline: float) -> Reply:
    deadline = min(deadline, time.monotonic() + _ONE_SENTINEL_SECONDS)
    connection = Connection(address, access, deadline)
    try:
        reply = connection.call(*command, deadline=deadline)
    finally:
        connection.close()
    if isinstance(reply, hiredis.ReplyError):
        raise reply
    return reply
