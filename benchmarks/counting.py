"""Counts the requests that reach a server: a proxy on the way to it that knows where a request begins."""

from __future__ import annotations

import re
import socket
import struct
import threading
from typing import Protocol

from ekiden.testing.proxy import Proxy

_REQUEST_LINE = re.compile(rb"\b[A-Z]+ [^ \r\n]+ HTTP/1\.1\r\n")


class Counter(Protocol):
    """Counts the requests that begin in one connection's bytes."""

    def __call__(self, data: bytes) -> int:
        """How many begin in these, which follow those of the call before."""
        ...


class MongoDBMessages:
    """Each begins with its length in four bytes."""

    def __init__(self) -> None:
        self._left = 0
        self._header = b""

    def __call__(self, data: bytes) -> int:
        begun = 0
        while data:
            if self._left:
                skipped = min(self._left, len(data))
                self._left -= skipped
                data = data[skipped:]
                continue
            missing = 4 - len(self._header)
            self._header += data[:missing]
            data = data[missing:]
            if len(self._header) == 4:
                self._left = struct.unpack("<i", self._header)[0] - 4
                self._header = b""
                begun += 1
        return begun


class HTTPRequests:
    """Each has its request line, which arrives in one piece."""

    def __call__(self, data: bytes) -> int:
        return len(_REQUEST_LINE.findall(data))


class CountingProxy(Proxy):
    """``requests``: how many have come through since it was made."""

    def __init__(self, host: str, port: int, kind: type[Counter]) -> None:
        self.requests = 0
        self._server_port = port
        self._kind = kind
        self._counters: dict[socket.socket, Counter] = {}
        self._counting = threading.Lock()  # guards both: each connection has a thread of its own
        super().__init__(host, port)

    def pass_on(self, data: bytes, receiver: socket.socket) -> None:
        """What goes to the server is counted; what comes back is not."""
        if receiver.getpeername()[1] == self._server_port:
            with self._counting:
                self.requests += self._counters.setdefault(receiver, self._kind())(data)
        super().pass_on(data, receiver)
