"""What went wrong between us and the servers, in one sentence, and whether trying again may help.

A server says it by a number, pymongo by the class of its error; who could not be reached at all is found in what
pymongo knows of each server. What TLS says it says by a name, also where pymongo has kept only the text of its error.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Iterable, Iterator
from typing import Any

from bson.errors import BSONError
from ekiden.errors import BackendError, EkidenError, TransportCrashed, TransportError
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DocumentTooLarge,
    EncryptionError,
    ExecutionTimeout,
    InvalidName,
    InvalidOperation,
    NetworkTimeout,
    NotPrimaryError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WaitQueueTimeoutError,
)

from ekiden_mongodb.options import Place

TROUBLE: tuple[type[Exception], ...] = (PyMongoError, BSONError, OSError, OverflowError)
"""What pymongo raises. ``Errors`` explains it."""

ABOUT_THE_VALUE: tuple[type[Exception], ...] = (BSONError, OverflowError)
"""What pymongo raises for a value that cannot be sent: too large, a number beyond 64 bits, half a character."""

NETWORK_TROUBLE = (ConnectionFailure, NetworkTimeout, ExecutionTimeout, OSError)
"""After these a request may or may not have been carried out."""

UNAUTHORIZED, AUTHENTICATION_FAILED, DUPLICATE_KEY = 13, 18, 11000
NO_TRANSACTIONS = frozenset({20, 59, 115, 263, 303})
"""What servers answer that have no transactions."""

_TOO_SLOW = frozenset({50, 262})

_MAY_WORK_LATER = {
    6: "lost a server that it needs",
    7: "lost a server that it needs",
    24: "is busy: a lock could not be had in time",
    46: "is busy: a lock could not be had in time",
    64: "has stored it, but not on as many members in time as the write concern wants",
    89: "lost a server that it needs",
    91: "is shutting down",
    100: "has too few members that can be reached for its write concern (w=majority)",
    112: "is busy: others write the same documents",
    133: "finds no member of a shard that it may ask",
    189: "has no primary just now: the old one stepped down",
    202: "lost a server that it needs",
    251: "has dropped the transaction",
    462: "is overloaded and takes no more requests just now",
    9001: "lost a server that it needs",
    10058: "is shutting down",
    10107: "has no primary just now",
    11600: "is shutting down",
    11602: "has no primary just now: the old one stepped down",
    13388: "has just moved a collection to another shard",
    13435: "has no primary just now",
    13436: "has no primary just now: a member is still recovering",
    14031: "is out of disk space",
    16500: "takes no more requests just now: its request rate is used up",
    28: "is out of disk space",
    50000: "takes no more requests just now: its request rate is used up",
}

_TAKES_NO_SUCH_VALUE = {
    10334: "takes no document above 16 MiB",
    17280: "takes no index entry so long: the name of a queue, or an id, is too long",
    17419: "takes no document above 16 MiB",
    17420: "takes no document above 16 MiB",
}
"""What is about one document alone, and not about the server."""

_WILL_NOT_WORK = {
    11: "refused the user name or the password",
    AUTHENTICATION_FAILED: "refused the user name or the password",
    73: "does not take this name for a database or collection",
    79: "does not know the write concern that the URL asks for (w=)",
    26: "does not have a collection that is needed here",
    59: "does not know a command that is needed here; is it MongoDB 4.2 or newer",
    115: "does not support a command that is needed here; is it MongoDB 4.2 or newer",
    40324: "does not know a pipeline stage that is needed here; is it MongoDB 4.2 or newer",
    85: "has an index on the same fields with other options; drop it, and it is made anew",
    86: "has another index of the same name; drop it, and it is made anew",
    121: "refuses a document by a rule (validator) on the collection",
    10003: "has a collection of this name that is capped; use another prefix",
}

_CLOSED = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED})
_ABOUT_TLS = "tls=true is for servers with TLS, and some want a certificate of ours (tlsCertificateKeyFile=)"
_QUOTA_WORDS = ("quota", "out of disk", "no space left", "disk full")
"""Services that keep one in bounds answer with a code of their own for much else, too."""

_TLS_REASON = re.compile(r"\[(?:SSL|X509)(?:: (\w+))?\]")
_ERRNO = re.compile(r"\[Errno (\d+)\]")
"""How Python writes the name of what OpenSSL said, and the number of what the system said."""


class Errors:
    """Says what went wrong with ``unavailable`` (it may work when tried again), ``refused`` (it will not), or
    ``unstorable`` (it will not, for this value, and may for others)."""

    def __init__(
        self,
        place: Place,
        seconds: float,
        unavailable: type[EkidenError],
        refused: type[EkidenError],
        unstorable: type[EkidenError] | None = None,
    ) -> None:
        self.unavailable = unavailable
        self.refused = refused
        self.unstorable = unstorable or refused
        self._place = place
        self._seconds = seconds

    def crashed(self, thread: str, bug: BaseException) -> EkidenError:
        """What to raise where our own code has failed on a thread of ours: a bug, which no waiting mends."""
        kind = TransportCrashed if issubclass(self.unavailable, TransportError) else BackendError
        error = kind(f"The thread {thread} has failed: {bug!r}.")
        error.__cause__ = bug
        return error

    def of(self, trouble: Exception, servers: Iterable[Any] = ()) -> EkidenError:
        """What to raise for ``trouble``; ``servers`` is what pymongo knows of each of them."""
        error = self._of(trouble, servers)
        error.__cause__ = trouble
        return error

    def of_code(self, code: int | None, message: str) -> EkidenError:
        """What to raise for one answer of a server, such as that about one document of several."""
        where = self._place
        if code in _TOO_SLOW:
            return self._too_slow()
        if code in _MAY_WORK_LATER:
            return self.unavailable(f"{where} {_MAY_WORK_LATER[code]} ({message}).")
        if code in _TAKES_NO_SUCH_VALUE:
            return self.unstorable(f"{where} {_TAKES_NO_SUCH_VALUE[code]} ({message}).")
        if code == UNAUTHORIZED:
            return self._unauthorized(message)
        if code in (11, AUTHENTICATION_FAILED):
            return self._not_authenticated(message)
        if code in _WILL_NOT_WORK:
            return self.refused(f"{where} {_WILL_NOT_WORK[code]} ({message}).")
        if any(words in message.lower() for words in _QUOTA_WORDS):
            return self.unavailable(f"{where} is full: {message.rstrip('.')}.")
        return self.refused(f"{where} answered with an error: {message} (code {code}).")

    def _of(self, trouble: Exception, servers: Iterable[Any]) -> EkidenError:
        where = self._place
        match trouble:
            case EkidenError():
                return trouble
            case ServerSelectionTimeoutError():
                return self._no_server(list(servers))
            case ConnectionFailure():
                return self._of_connection(trouble)
            case BulkWriteError():
                return self._of_bulk(trouble)
            case ExecutionTimeout():
                return self._too_slow()
            case OperationFailure():
                return self._of_operation(trouble)
            case DocumentTooLarge():
                return self.unstorable(f"{where} takes no document above 16 MiB: {trouble}.")
            case BSONError() | OverflowError():
                return self.unstorable(f"{where}: what was to be sent or was answered is not BSON: {trouble}.")
            case InvalidOperation():
                return self.unavailable(f"{where}: the connections were closed here meanwhile ({trouble}).")
            case ConfigurationError():
                return self._of_configuration(trouble)
            case InvalidName() | EncryptionError():
                return self.refused(f"{where}: {str(trouble).rstrip('.')}.")
            case _:
                return self.unavailable(f"{where}: {type(trouble).__name__}: {trouble}")

    def _of_operation(self, trouble: OperationFailure) -> EkidenError:
        details = trouble.details or {}
        message = str(details.get("errmsg") or trouble).rstrip(".")
        retry = trouble.has_error_label("RetryableWriteError") or trouble.has_error_label("TransientTransactionError")
        if trouble.has_error_label("SystemOverloadedError"):
            return self.unavailable(f"{self._place} is overloaded and takes no more requests just now ({message}).")
        if retry and trouble.code not in _MAY_WORK_LATER:
            return self.unavailable(f"{self._place} could not do it now ({message}).")
        return self.of_code(trouble.code, message)

    def _of_bulk(self, trouble: BulkWriteError) -> EkidenError:
        said = [*trouble.details.get("writeErrors", ()), *trouble.details.get("writeConcernErrors", ())]
        if not said:
            return self.unavailable(f"{self._place}: {trouble}")
        # What the whole batch may be tried again for is told before what one document will be refused for again.
        said.sort(key=lambda each: each.get("code") in _TAKES_NO_SUCH_VALUE)
        return self.of_code(said[0].get("code"), str(said[0].get("errmsg", "")).rstrip("."))

    def _of_configuration(self, trouble: ConfigurationError) -> EkidenError:
        text = str(trouble).rstrip(".")
        # dnspython's errors lie below those of pymongo, but for one that pymongo finds by itself.
        if any(type(cause).__module__.startswith("dns.") for cause in _causes(trouble)) or "DNS" in text:
            return self.unavailable(f"{self._place}: its servers cannot be looked up by DNS: {text}.")
        return self.refused(f"{self._place}: {text}.")

    def _unauthorized(self, message: str) -> EkidenError:
        who = (
            f"the user {self._place.username!r}" if self._place.username else "somebody without user name and password"
        )
        return self.refused(
            f"{self._place} does not permit {who} what is needed here: it needs the role readWrite on the database "
            f"{self._place.database!r} ({message})."
        )

    def _not_authenticated(self, message: str) -> EkidenError:
        hint = (
            "" if self._place.names_authentication_database else "; the URL says by authSource= where the user is known"
        )
        if self._place.names_authentication_database:
            hint = "; is the user known in another database (authSource=admin)?"
        return self.refused(f"{self._place} refused the user name or the password ({message}){hint}.")

    def _of_connection(self, trouble: Exception) -> EkidenError:
        where = self._place
        match trouble:
            case WaitQueueTimeoutError():
                return self.unavailable(f"{where}: all connections are in use (maxPoolSize) for {self._seconds:g} s.")
            case NetworkTimeout():
                return self._too_slow()
            case NotPrimaryError():
                return self.unavailable(f"{where} has no primary just now; a new one is elected.")
            case _:
                pass
        for cause in _causes(trouble):
            if isinstance(cause, OperationFailure):
                return self._of_operation(cause)
            if isinstance(cause, OSError):
                return self._of_socket(cause)
        text = _plain(trouble)
        # What pymongo heard while it looked for the servers has lost its cause.
        if (tls := _TLS_REASON.search(text)) is not None:
            if tls[1] == "CERTIFICATE_VERIFY_FAILED":
                return self.refused(f"{where}: its certificate is not accepted: {text}.")
            return self.refused(f"{where} does not speak TLS as we do ({text}): {_ABOUT_TLS}.")
        said = _ERRNO.search(text)
        if said is None or int(said[1]) in _CLOSED:
            return self.unavailable(
                f"{where} closed the connection instead of answering ({text}): is it being stopped, or does it want "
                "TLS (tls=true)?"
            )
        return self.unavailable(f"{where} cannot be reached: {text}.")

    def _of_socket(self, trouble: OSError) -> EkidenError:
        where = self._place
        match trouble:
            case ssl.SSLCertVerificationError():
                return self.refused(f"{where}: its certificate is not accepted: {trouble.verify_message.rstrip('.')}.")
            case ssl.SSLError():
                return self.refused(f"{where} does not speak TLS as we do ({trouble.reason or trouble}): {_ABOUT_TLS}.")
            case socket.gaierror():
                return self.unavailable(f"{where}: there is no host of this name ({trouble.strerror}).")
            case TimeoutError():
                return self._too_slow()
            case _:
                return self.unavailable(f"{where} cannot be reached: {trouble.strerror or trouble}.")

    def _too_slow(self) -> EkidenError:
        return self.unavailable(f"{self._place} did not answer within {self._seconds:g} s.")

    def _no_server(self, servers: list[Any]) -> EkidenError:
        """Nobody who may be asked was found in time: why not is what is known of each server."""
        where = self._place
        found = [self._of_connection(server.error) for server in servers if server.error is not None]
        for error in found:
            if isinstance(error, self.refused):
                return error
        names = {server.server_type_name for server in servers}
        if names & {"RSSecondary", "RSOther", "RSArbiter", "RSGhost"}:
            return self.unavailable(
                f"{where} has no primary: one is being elected, or too few members of the replica set can be reached."
            )
        if found:
            return found[0]
        if not servers:
            return self.unavailable(
                f"{where}: no server is a member of the replica set that the URL names (replicaSet=), or none of its "
                "members has the address that was given."
            )
        return self._too_slow()


def _causes(trouble: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = trouble
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _plain(trouble: Exception) -> str:
    """What pymongo says, without the timeouts that it lists behind it."""
    return str(trouble).partition(" (configured timeouts")[0].rstrip(".")
