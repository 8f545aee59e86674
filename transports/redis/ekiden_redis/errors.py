"""What went wrong between us and a server, in one sentence, and whether trying again may help.

A server says it by a code, the first word of an error (``-READONLY You can't write ...``); raised inside a script,
Redis before 7 puts its own words around that, so the code is looked for anywhere. Some errors have no code but ``ERR``;
these are known by what was asked (``NotAdmitted``), or else by the server's words.
"""

from __future__ import annotations

import re
import socket

import hiredis
from ekiden.errors import EkidenError


class NotSaid(Exception):
    """The connection ended before there was an answer: the request may or may not have been carried out."""


class Overdue(TimeoutError):
    """The deadline of a call has passed."""


class NoTLS(TimeoutError):
    """The server did not answer to the beginning of TLS. One without TLS waits for more."""


class NotAdmitted(Exception):
    """The server answered ``command``, by which a connection begins, with an error."""

    def __init__(self, command: str, reply: hiredis.ReplyError) -> None:
        super().__init__(f"{command}: {reply}")
        self.command = command
        self.reply = reply


TROUBLE = (OSError, NotSaid, NotAdmitted, hiredis.HiredisError)
"""What a connection raises. ``Errors`` explains it."""

_NOT_THE_MASTER = ("READONLY", "MASTERDOWN", "LOADING", "CLUSTERDOWN")

_MAY_WORK_LATER = {
    "OOM": "is full: it has reached its maxmemory; let workers drain it, or give it more memory",
    "READONLY": "is a read-only replica now; the URL must lead to the master",
    "LOADING": "is still loading its data from disk",
    "MASTERDOWN": "is a replica that has lost its master",
    "MISCONF": "refuses writes because it could not save its data to disk; see its log, and its disk",
    "NOREPLICAS": "refuses writes because too few replicas follow it (min-replicas-to-write)",
    "BUSY": "is busy with a script of somebody's; SCRIPT KILL ends it",
    "CLUSTERDOWN": "belongs to a cluster that is down: some of its slots are served by nobody",
    "TRYAGAIN": "is moving these keys to another server of its cluster",
    "NOMASTERLINK": "is a replica without a link to its master",
    "max number of clients reached": "has as many connections as its maxclients allows",
}

_NO_PASSWORD = "wants a password: write it into the URL, as in redis://:password@host"
_TOO_LARGE = ("invalid bulk length", "invalid multibulk length")

_WILL_NOT_WORK = {
    "WRONGPASS": "refused the user name or the password",
    "NOAUTH": _NO_PASSWORD,
    "unauthenticated": _NO_PASSWORD,
    "NOPERM": "does not permit this user what is needed here; see ACL SETUSER",
    "can't run this command": "does not permit this user what is needed here; see ACL SETUSER",
    "can't access at least one of the keys": "does not permit this user the keys of this prefix; see ACL SETUSER",
    "SELECT is not allowed in cluster mode": "is one of a cluster, which has the database 0 only",
    "cluster support disabled": "is not one of a cluster: write redis:// instead of redis+cluster://",
    "WRONGTYPE": "holds another kind of thing under a key of this prefix",
    "MOVED": "is one of a cluster: write redis+cluster:// instead of redis://",
    "CROSSSLOT": "is one of a cluster: write redis+cluster:// instead of redis://",
    "DENIED": "is in protected mode: it takes connections from its own machine only until it has a password",
    "invalid bulk length": "does not take so large a message; see its setting proto-max-bulk-len",
    "invalid multibulk length": "does not take so large a batch",
    "unknown command": "does not know a command that is needed here; is it Redis 6.2 or newer, or Valkey",
}

_NOT_ADMITTED = {
    "AUTH": "has no password, and the URL names one",
    "SELECT": "does not have that database; see its setting `databases`",
    "HELLO": "does not speak RESP3, which waiting for results takes; is it Redis 6.2 or newer, or Valkey",
}
"""What an error without a code means, by the command that it answers."""

_WORDS = re.compile("|".join(rf"(?<![A-Za-z]){re.escape(words)}\b" for words in [*_MAY_WORK_LATER, *_WILL_NOT_WORK]))


def _words_on_tls(trouble: BaseException) -> str | None:
    import ssl  # a connection without TLS has not imported it

    if isinstance(trouble, ssl.SSLCertVerificationError):
        return f": its certificate is not accepted: {trouble.verify_message.rstrip('.')}."
    if isinstance(trouble, ssl.SSLError):
        return (
            f" does not speak TLS as we do ({trouble.reason or trouble}): rediss:// is for servers with "
            "TLS, redis:// for those without, and some servers want a certificate of ours (certfile=)."
        )
    return None


def _found_in(reply: str) -> str | None:
    """The code or the words in an error reply that say what it means; None where there are none that are known."""
    found = _WORDS.search(reply)
    return None if found is None else found.group()


class Errors:
    """Says what went wrong with ``unavailable`` (it may work when tried again) or ``refused`` (it will not)."""

    def __init__(self, unavailable: type[EkidenError], refused: type[EkidenError]) -> None:
        self.unavailable = unavailable
        self.refused = refused

    def of(self, trouble: Exception, where: object, seconds: float) -> EkidenError:
        """What to raise for ``trouble`` with the server ``where``, whose calls end after ``seconds``."""
        error = self._of(trouble, where, seconds)
        error.__cause__ = trouble
        return error

    def is_answer(self, error: EkidenError) -> bool:
        """Whether a server that is the right one has said this: it is about what was asked, not about the server."""
        cause = error.__cause__
        return isinstance(cause, hiredis.ReplyError) and not self.is_not_the_master(str(cause))

    def is_too_large(self, error: EkidenError) -> bool:
        """Whether a server will not take so large a message, or so large a batch."""
        return isinstance(error, self.refused) and any(words in str(error.__cause__) for words in _TOO_LARGE)

    def is_full(self, error: EkidenError) -> bool:
        """Whether a server has reached its maxmemory."""
        return _found_in(str(error.__cause__)) == "OOM"

    def is_wrong_type(self, reply: str) -> bool:
        """Whether an error reply says that a key holds another kind of thing."""
        return _found_in(reply) == "WRONGTYPE"

    def is_not_the_master(self, reply: str) -> bool:
        """Whether an error reply says that another server may be the right one (by now)."""
        return _found_in(reply) in _NOT_THE_MASTER

    def _of(self, trouble: Exception, where: object, seconds: float) -> EkidenError:
        if isinstance(trouble, EkidenError):
            return trouble
        if isinstance(trouble, hiredis.ReplyError):
            return self._of_reply(str(trouble), where)
        if isinstance(trouble, NotAdmitted):
            return self._of_reply(str(trouble.reply), where, otherwise=_NOT_ADMITTED[trouble.command])
        if isinstance(trouble, NoTLS):
            return self.unavailable(
                f"{where} did not begin to speak TLS within {seconds:g} s; redis:// is without TLS."
            )
        if isinstance(trouble, TimeoutError):
            return self.unavailable(f"{where} did not answer within {seconds:g} s.")
        if (of_tls := _words_on_tls(trouble)) is not None:
            return self.refused(f"{where}{of_tls}")
        if isinstance(trouble, socket.gaierror):
            return self.unavailable(f"{where}: there is no host of this name ({trouble.strerror}).")
        if isinstance(trouble, hiredis.ProtocolError):
            return self.refused(
                f"{where} does not speak the Redis protocol: is it another kind of server, or one with TLS (rediss://)?"
            )
        if isinstance(trouble, (NotSaid, ConnectionResetError, BrokenPipeError)):
            return self.unavailable(
                f"{where} closed the connection before it answered: is it being stopped, or does it want TLS (rediss://)?"
            )
        if isinstance(trouble, OSError):
            return self.unavailable(f"{where} cannot be reached: {trouble.strerror or trouble}.")
        return self.unavailable(f"{where}: {type(trouble).__name__}: {trouble}")

    def _of_reply(self, text: str, where: object, *, otherwise: str | None = None) -> EkidenError:
        """``otherwise``: what an error means in which no known code or words are found."""
        words = _found_in(text)
        if words is None:
            told = "answered with an error:" if otherwise is None else otherwise
            return self.refused(f"{where} {told} {text if otherwise is None else f'({text})'}.")
        if words in _MAY_WORK_LATER:
            return self.unavailable(f"{where} {_MAY_WORK_LATER[words]}.")
        return self.refused(f"{where} {_WILL_NOT_WORK[words]} ({text}).")
