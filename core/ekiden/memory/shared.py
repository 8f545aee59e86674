"""Which broker and store a ``memory://`` URL means: one of each per process and name."""

from __future__ import annotations

import os
import threading

from ekiden.errors import ConfigurationError
from ekiden.memory.broker import Broker
from ekiden.memory.store import Store
from ekiden.urls import BrokerURL


class Shared:
    """What ``memory://NAME`` means in this process."""

    def __init__(self) -> None:
        self.broker = Broker()
        self.store = Store()


class Registry:
    """Everything that this process holds in memory, by name. A forked child begins with nothing."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._process_id = os.getpid()
        self._lock = threading.Lock()
        self._by_name: dict[str, Shared] = {}

    def named(self, name: str) -> Shared:
        if self._process_id != os.getpid():
            self._start()  # the lock may have been taken in the parent when the child was made
        with self._lock:
            return self._by_name.setdefault(name, Shared())

    def discard(self, name: str) -> None:
        with self._lock:
            self._by_name.pop(name, None)


# The one module-level state of ekiden: a name must mean the same broker to all who open it.
in_this_process = Registry()


def discard(name: str) -> None:
    """Drop the broker and the store called ``name``; who opens the name next finds them empty. For tests."""
    in_this_process.discard(name)


def name_in(url: BrokerURL) -> str:
    hosts = [host for host in url.hosts if host.port is None]
    if len(url.hosts) > 1 or len(hosts) != len(url.hosts) or url.path or url.username or url.variant:
        raise ConfigurationError(f"{url}: write memory:// or memory://NAME, with nothing else but options.")
    return hosts[0].name if hosts else ""
