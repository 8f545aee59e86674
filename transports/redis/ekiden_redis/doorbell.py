"""How a consumer waits: blocked on the bells of its queues, and woken at once by its own process too.

It blocks on Redis (BLPOP) over connections of its own: one, or in a cluster one for each queue, because one command
takes keys of one slot only. What this process has to say (stop; there is room) comes over a pair of sockets. Both are
waited for together, so nothing is polled.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Sequence

import hiredis
import msgspec

from ekiden_redis.client import Client
from ekiden_redis.connection import Connection, pack_command
from ekiden_redis.errors import TROUBLE, Overdue
from ekiden_redis.servers import Server

_SHORTEST_BLOCK_SECONDS = 0.001
"""To BLPOP, no seconds are for ever."""


class Knocker:
    """Wakes whoever waits in this process. ``knock`` may be called by any thread, and more than once."""

    def __init__(self) -> None:
        self._inside, self._outside = socket.socketpair()
        self._inside.setblocking(False)
        self._outside.setblocking(False)

    def fileno(self) -> int:
        """Readable after a knock, until it is heard."""
        return self._inside.fileno()

    def knock(self) -> None:
        """Wake whoever waits now, or else whoever waits next."""
        # So many knocks that nobody heard: one is enough. Or it was closed a moment ago: nobody waits any more.
        with contextlib.suppress(OSError):
            self._outside.send(b"k")

    def hear(self) -> None:
        """Forget the knocks until now."""
        with contextlib.suppress(BlockingIOError):
            while self._inside.recv(4096):
                continue

    def close(self) -> None:
        """Close both ends."""
        self._inside.close()
        self._outside.close()


class _Line(msgspec.Struct):
    """The connection that blocks on ``bells``. ``answers_by``: when its BLPOP is answered at the latest, or None."""

    bells: tuple[bytes, ...]
    server: Server | None = None
    connection: Connection | None = None
    answers_by: float | None = None


class Doorbell:
    """One consumer's. ``knock`` may be called by any thread; all else by the thread that receives.

    A BLPOP that is not answered when a wait ends stays where it is; the next wait goes on with it.
    """

    def __init__(self, client: Client, bells: Sequence[bytes]) -> None:
        self._client = client
        self._lines = [_Line((bell,)) for bell in bells] if client.is_cluster else [_Line(tuple(bells))]
        self._knocker = Knocker()
        self.knock = self._knocker.knock
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._knocker, selectors.EVENT_READ)

    def wait(self, seconds: float, *, at_most_late: float = 0.0) -> bool:
        """Wait until a bell rings or somebody knocks, at most ``seconds``; whether one of these came about.

        The server may be a tenth of a second late to say that nothing rang. ``at_most_late``: for so many seconds its
        word is waited for, which saves asking again. Raises what the client raises.
        """
        give_up = time.monotonic() + seconds
        while (left := give_up - time.monotonic()) > 0:
            self._block(left)
            news = self._selector.select(left + at_most_late)
            if not news:
                return False
            if self._heard(news):
                return True
        return False

    def pause(self, seconds: float) -> bool:
        """Wait until somebody knocks, at most ``seconds``; whether a bell rang meanwhile, which is for another then."""
        give_up = time.monotonic() + seconds
        rang = False
        while (left := give_up - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if key.data is None:
                    self._knocker.hear()
                    return rang
                rang |= self._answered(key.data)
        return rang

    def hang_up(self) -> None:
        """Block no more. A ring that was on its way is lost: pass it on."""
        for line in self._lines:
            self._close(line)

    def close(self) -> None:
        """The end: nothing else may be called after it."""
        self.hang_up()
        self._selector.close()
        self._knocker.close()

    def abandon(self) -> None:
        """In a forked child: close what it inherited. The selector is shared with the parent, who goes on using it."""
        for line in self._lines:
            if line.connection is not None:
                line.connection.close()
        self._selector.close()
        self._knocker.close()

    def _heard(self, news: Sequence[tuple[selectors.SelectorKey, int]]) -> bool:
        """Read all ``news``; whether there was a knock or a ring among them."""
        heard = False
        for key, _ in news:
            if key.data is None:
                self._knocker.hear()
                heard = True
            elif self._answered(key.data):
                heard = True
        return heard

    def _block(self, seconds: float) -> None:
        """Have every line blocked, those that are not yet for ``seconds``."""
        now = time.monotonic()
        for line in self._lines:
            if line.answers_by is None:
                try:
                    self._call(line, seconds)
                except TROUBLE as error:
                    raise self._broken(line, error) from error
            elif now > line.answers_by:
                raise self._broken(line, Overdue())

    def _call(self, line: _Line, seconds: float) -> None:
        deadline = self._client.deadline()
        if line.connection is None:
            line.server = self._client.server(line.bells[0], deadline)
            line.connection = line.server.connect(deadline)
            self._selector.register(line.connection, selectors.EVENT_READ, line)
        block = max(_SHORTEST_BLOCK_SECONDS, seconds)
        line.connection.send(pack_command((b"BLPOP", *line.bells, f"{block:.3f}")), deadline)
        line.answers_by = deadline + seconds

    def _answered(self, line: _Line) -> bool:
        """Read the answer to a BLPOP; whether it is a ring."""
        assert line.connection is not None
        line.answers_by = None
        try:
            reply = line.connection.read(self._client.deadline())
            if isinstance(reply, hiredis.ReplyError):
                if self._client.errors.is_wrong_type(str(reply)):
                    return True  # whoever claims deletes what is there instead of a bell
                raise reply
        except TROUBLE as error:
            raise self._broken(line, error) from error
        return reply is not None

    def _broken(self, line: _Line, trouble: Exception) -> Exception:
        self._close(line)
        return self._client.failed(trouble, line.server)

    def _close(self, line: _Line) -> None:
        if line.connection is not None:
            with contextlib.suppress(KeyError):  # it may have broken before it was registered
                self._selector.unregister(line.connection)
            line.connection.close()
        line.connection = line.answers_by = None
