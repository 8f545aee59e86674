"""Runs commands and scripts at whichever server is the right one.

Every call has one deadline: finding the server, connecting, sending and answering. It is repeated once when a
connection that had been idle turns out to be closed, if it is harmless to carry it out twice. In a cluster it follows
redirections. Where a key holds something else than it should (a string under the name of a queue's hash), that is set
aside under another name, said in the log, and the call is repeated: whatever somebody wrote there, it stops nobody.
All else travels: whoever calls decides when to try again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import hiredis
import msgspec
from ekiden.digests import sha1
from ekiden.errors import EkidenError
from ekiden.loggers import safe_logger
from ekiden.urls import BrokerURL

from ekiden_redis.connection import Access, Address, Part, Reply, pack_command
from ekiden_redis.errors import TROUBLE, Errors, NotSaid
from ekiden_redis.options import Arrangement, options_in, place_in, tls_context
from ekiden_redis.servers import Cluster, OneServer, Sentinels, Server, Servers

logger = safe_logger("ekiden_redis")

_LARGE_BYTES = 1024 * 1024

_TRY_AGAIN_SECONDS = 0.02
"""Between two tries while a cluster moves a slot."""


class Script:
    """A Lua script. ``repeatable``: it does no harm to carry it out a second time with the same arguments.

    ``kinds``: what kind of thing (as TYPE calls it) each of its keys is, again and again where there are more keys.
    """

    __slots__ = ("digest", "kinds", "repeatable", "source")

    def __init__(self, source: str, *, kinds: Sequence[str], repeatable: bool = True) -> None:
        self.source = source
        self.digest = sha1(source.encode(), usedforsecurity=False).hexdigest().encode()
        self.kinds = kinds
        self.repeatable = repeatable


_SET_ASIDE = Script(
    """
-- KEYS: any key. ARGV: what kind of thing belongs there, and the name that something else gets. Returns what kind that
-- was; '' when nothing was wrong.
local kind = redis.call('TYPE', KEYS[1]).ok
if kind == 'none' or kind == ARGV[1] then return '' end
redis.call('RENAME', KEYS[1], ARGV[2])
return kind
""".strip(),
    kinds=(),
)

_KINDS_OF_COMMANDS: dict[Part, str] = {b"ZRANGEBYLEX": "zset", b"XREVRANGE": "stream"}
"""What kind of thing a command's key is, where it would be refused something else."""


class Call(NamedTuple):
    """A script to run with ``keys`` and ``arguments``, or (``script`` None) the command in ``arguments``.

    In a cluster the first key says which server is asked, and all keys of a script must be of one slot.
    """

    script: Script | None
    keys: Sequence[bytes]
    arguments: Sequence[Part]


class Client:
    """What one URL leads to, for any number of threads.

    Raises ``unavailable`` for what may work when tried again, and ``refused`` for what will not, each with one
    sentence. Nothing is connected before the first call.
    """

    def __init__(self, url: BrokerURL, *, unavailable: type[EkidenError], refused: type[EkidenError]) -> None:
        self.options = options_in(url)
        self.place = place_in(url, self.options)
        self.errors = Errors(unavailable, refused)
        self._access = Access(
            self.place.username,
            self.place.password,
            self.place.database,
            tls_context(url, self.options),
            self.options.server_hostname,
        )
        self.is_cluster = self.place.arrangement is Arrangement.CLUSTER
        """Whether keys are on several servers."""
        self._servers = self._find_servers()

    def run(self, script: Script, keys: Sequence[bytes], arguments: Sequence[Part] = ()) -> Reply:
        """Run a script and return what it returns."""
        return self._one(Call(script, keys, arguments))

    def command(self, *parts: Part, key: bytes = b"") -> Reply:
        """Send a command that may be carried out twice; in a cluster, to the server that has ``key``."""
        return self._one(Call(None, (key,), parts))

    def run_all(
        self, calls: Sequence[Call], *, within: float | None = None, by: float | None = None
    ) -> list[Reply | EkidenError]:
        """Do all of ``calls`` in one trip to each server; returns a reply or an error for each, in their order.

        Calls for one server are carried out in their order; others may come between them. Raises nothing. ``within``
        (seconds) and ``by`` (on the monotonic clock): if they are to end sooner than other calls.
        """
        deadline = time.monotonic() + (self.options.timeout if within is None else within)
        if by is not None and by < deadline:
            deadline = by
        answers: list[Reply | EkidenError] = [None] * len(calls)
        waiting: Sequence[int] = range(len(calls))
        looked_anew = False
        while waiting:
            again: list[int] = []
            for server, numbers in self._by_server(calls, waiting, answers, deadline):
                asked = [calls[number] for number in numbers]
                for number, reply in zip(numbers, self._exchange(server, asked, deadline), strict=True):
                    if isinstance(reply, hiredis.ReplyError):
                        reply = self._after(reply, calls[number], server, deadline)
                    if isinstance(reply, _WrongServer):
                        elsewhere = not looked_anew and self._is_elsewhere(calls[number], server, deadline)
                        reply = _AGAIN if elsewhere else reply.error
                    if reply is _AGAIN:
                        again.append(number)
                    answers[number] = reply
            looked_anew = looked_anew or bool(again)
            waiting = again
        return answers

    def server(self, key: bytes, deadline: float) -> Server:
        """The server that has ``key``, for connections of one's own; tell ``failed`` of their trouble."""
        try:
            return self._servers.of(key, deadline)
        except TROUBLE as error:
            raise self.error(error) from error

    def deadline(self) -> float:
        """When a call that begins now must have ended, on the monotonic clock."""
        return time.monotonic() + self.options.timeout

    def error(self, trouble: Exception, address: Address | None = None) -> EkidenError:
        """What to raise for an error reply, or for what a connection of one's own raised."""
        return self.errors.of(trouble, address or self.place, self.options.timeout)

    def failed(self, trouble: Exception, server: Server | None) -> EkidenError:
        """The same, and the next call finds out anew which server is the right one."""
        if server is not None:
            self._servers.failed(server)
        return self.error(trouble, None if server is None else server.address)

    def close(self) -> None:
        """Close every idle connection; those in use are closed when their calls end. May be called again."""
        self._servers.close()

    def forget(self) -> None:
        """In a forked child: drop every connection without touching the parent's."""
        self._servers = self._find_servers()

    def _find_servers(self) -> Servers:
        match self.place.arrangement:
            case Arrangement.ONE_SERVER:
                return OneServer(self.place, self._access)
            case Arrangement.CLUSTER:
                return Cluster(self.place, self._access)
            case Arrangement.SENTINEL:
                options, access = self.options, self._access
                return Sentinels(
                    self.place,
                    access,
                    Access(
                        options.sentinel_username,
                        options.sentinel_password,
                        context=access.context,
                        server_hostname=access.server_hostname,
                    ),
                )

    def _one(self, call: Call) -> Reply:
        (answer,) = self.run_all((call,))
        if isinstance(answer, EkidenError):
            raise answer
        return answer

    def _by_server(
        self, calls: Sequence[Call], numbers: Sequence[int], answers: list[Reply | EkidenError], deadline: float
    ) -> Iterable[tuple[Server, Sequence[int]]]:
        """Which calls each server gets; a call that none can be found for is answered with an error."""
        servers: dict[Server, list[int]] = {}
        for number in numbers:
            keys = calls[number].keys
            try:
                server = self._servers.of(keys[0] if keys else b"", deadline)
            except TROUBLE as error:
                answers[number] = self.error(error)
            else:
                if not self.is_cluster and not number:
                    return ((server, numbers),)  # it is the same one for all
                servers.setdefault(server, []).append(number)
        return servers.items()

    def _exchange(
        self, server: Server, calls: Sequence[Call], deadline: float, *, asking: bool = False, whole: bool = False
    ) -> list[Reply | EkidenError]:
        """Send ``calls`` to one server, and read a reply to each. Scripts that it does not know are sent ``whole``.

        ``asking``: for keys that the cluster is just moving there.
        """
        replies: list[Reply | EkidenError] = []
        knows_all = True
        packed = _packed(calls, asking=asking, whole=whole)
        connection = idle = server.take_idle()
        try:
            if connection is None:
                connection = server.connect(deadline)
            connection.send(packed, deadline)
            for _ in calls:
                if asking:
                    connection.read(deadline)
                reply = connection.read(deadline)
                if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
                    knows_all = False
                replies.append(reply)
        except TROUBLE as error:
            failure: EkidenError = self.failed(error, server)
            if connection is None:
                return [_WrongServer(failure)] * len(calls)
            if not asking:
                replies += connection.last_words()
            connection.close()
            hung_up = isinstance(error, (OSError, NotSaid)) and not isinstance(error, TimeoutError)
            stale = idle is not None and not replies and hung_up
            if stale and all(call.script is None or call.script.repeatable for call in calls):
                return self._exchange(server, calls, deadline, asking=asking, whole=whole)
            said = [failure if _is_unknown_script(reply) else reply for reply in replies[: len(calls)]]
            return [*said, *[failure] * (len(calls) - len(said))]
        except BaseException:
            if connection is not None:
                connection.close()  # the reply would be taken for the next one's
            raise
        if len(packed) > _LARGE_BYTES and any(isinstance(reply, hiredis.ReplyError) for reply in replies):
            # The server keeps what it has received in the connection's buffer for seconds: a full one needs the room.
            connection.close()
        else:
            server.give_back(connection)
        return replies if knows_all else self._with_whole_scripts(server, calls, replies, deadline, asking=asking)

    def _with_whole_scripts(
        self,
        server: Server,
        calls: Sequence[Call],
        replies: list[Reply | EkidenError],
        deadline: float,
        *,
        asking: bool,
    ) -> list[Reply | EkidenError]:
        """``replies``, after the scripts that the server did not know (any more) were sent to it whole."""
        unknown = [number for number, reply in enumerate(replies) if _is_unknown_script(reply)]
        again = [calls[number] for number in unknown]
        answers = self._exchange(server, again, deadline, asking=asking, whole=True)
        for number, reply in zip(unknown, answers, strict=True):
            replies[number] = reply
        return replies

    def _after(self, reply: hiredis.ReplyError, call: Call, server: Server, deadline: float) -> Reply | EkidenError:
        """What becomes of a call that was answered with an error: another server's answer, an error, or _AGAIN."""
        text = str(reply)
        if self.is_cluster and time.monotonic() < deadline:
            other = self._servers.redirected(text)
            if text.startswith("ASK ") and other is not None:
                (answer,) = self._exchange(other, (call,), deadline, asking=True)
                return self.error(answer, other.address) if isinstance(answer, hiredis.ReplyError) else answer
            if other is not None:
                return _AGAIN
            if text.startswith("TRYAGAIN"):
                time.sleep(_TRY_AGAIN_SECONDS)
                return _AGAIN
        if self.errors.is_not_the_master(text):
            return _WrongServer(self.failed(reply, server))
        if self.errors.is_wrong_type(text) and self._set_aside(call, server, deadline):
            return _AGAIN
        return self.error(reply, server.address)

    def _set_aside(self, call: Call, server: Server, deadline: float) -> bool:
        """Rename those keys of ``call`` that hold something else than they should; whether there were any."""
        if call.script is None:
            kinds: Sequence[str] = (_KINDS_OF_COMMANDS.get(call.arguments[0], ""),)
        else:
            kinds = call.script.kinds
        if not kinds[0] or time.monotonic() >= deadline:
            return False
        keys = {key: kinds[number % len(kinds)] for number, key in enumerate(call.keys)}
        names = [key + b":set-aside-%d" % time.time_ns() for key in keys]
        renaming = [
            Call(_SET_ASIDE, (key,), (kind, name)) for (key, kind), name in zip(keys.items(), names, strict=True)
        ]
        found = False
        for (key, kind), name, was in zip(keys.items(), names, self._exchange(server, renaming, deadline), strict=True):
            if isinstance(was, bytes) and was:
                found = True
                logger.error(
                    "%s: the key %r held a %s and not a %s; it is kept as %r", server.address, key, was, kind, name
                )
        return found

    def _is_elsewhere(self, call: Call, server: Server, deadline: float) -> bool:
        """Whether by now another server than ``server``, which did nothing, is the right one for ``call``."""
        try:
            found = self._servers.of(call.keys[0] if call.keys else b"", deadline)
        except TROUBLE:
            return False  # what ``server`` said is told
        if found.address != server.address:
            return True
        # The next call asks again: by then Sentinels may have made another one the master, while this one, started
        # again, takes itself for it and loses what it is told.
        self._servers.failed(found)
        return False


class _WrongServer(msgspec.Struct, frozen=True):
    """A server could not be reached, or says that it is not the master: it has done nothing. ``error`` tells."""

    error: EkidenError


_AGAIN = object()


def _packed(calls: Sequence[Call], *, asking: bool, whole: bool) -> bytes:
    """The commands as they are sent: scripts by their digests, or ``whole``; each after ASKING, if that must be."""
    commands: list[bytes] = []
    for script, keys, arguments in calls:
        if asking:
            commands.append(pack_command((b"ASKING",)))
        if script is None:
            commands.append(pack_command(tuple(arguments)))
        elif whole:
            commands.append(pack_command((b"EVAL", script.source, b"%d" % len(keys), *keys, *arguments)))
        else:
            commands.append(pack_command((b"EVALSHA", script.digest, b"%d" % len(keys), *keys, *arguments)))
    return commands[0] if len(commands) == 1 else b"".join(commands)


def _is_unknown_script(reply: Reply) -> bool:
    return isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT")
