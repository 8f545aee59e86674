"""What went wrong between us and a server, in one sentence, and whether trying again may help.

A status alone does not say it: CouchDB answers 401 to who is known and not permitted, and 500 to who may not make an
index. So the answer's ``error`` and ``reason`` are read, too.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from http import HTTPStatus
from typing import Any

import urllib3.exceptions
from ekiden.errors import BackendError, EkidenError, TransportCrashed, TransportError

TROUBLE = (OSError, http.client.HTTPException, urllib3.exceptions.HTTPError)
"""What a connection raises. ``Errors`` explains it."""

LATE = (TimeoutError, urllib3.exceptions.TimeoutError)
"""Those of them that say that time was over; of urllib3's, also one that says that nobody listens."""

BROKEN = (ConnectionError, http.client.HTTPException, urllib3.exceptions.ProtocolError)
"""Those that say that a connection ended too early."""

_NOT_PERMITTED = (
    "not a server admin",
    "not a db or server admin",
    "not authorized",
    "not allowed to access",
    "forbidden",
)
_LOCKED_OUT = "temporarily locked"
_NOT_HEARD_OF = "function_clause"
_TOO_LARGE = frozenset({HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_URI_TOO_LONG})


class Refusal(Exception):
    """An answer that is not the one that was hoped for: its ``status``, and the server's ``error`` and ``reason``."""

    def __init__(self, status: int, error: str, reason: str) -> None:
        super().__init__(f"{status} {error}: {reason}")
        self.status = status
        self.error = error
        self.reason = reason


class Overdue(TimeoutError):
    """The deadline of a call has passed."""


class SilentHandshake(TimeoutError):
    """A server took the connection and did not answer the beginning of TLS."""


class NoTLS(OSError):
    """A server that was spoken to with TLS speaks plain HTTP."""


class NotJSON(Exception):
    """A server answered with something that is not JSON. ``status``: with which status, ``kind``: with what."""

    def __init__(self, status: int, kind: str) -> None:
        super().__init__(f"{status} {kind}")
        self.status = status
        self.kind = kind


class Errors:
    """Says what went wrong with ``unavailable`` (it may work when tried again) or ``refused`` (it will not).

    ``too_large``, a kind of ``refused``, is for what no change at the server is expected to make it take.
    """

    def __init__(
        self,
        unavailable: type[EkidenError],
        refused: type[EkidenError],
        too_large: type[EkidenError],
        *,
        username: str | None,
    ) -> None:
        self.unavailable = unavailable
        self.refused = refused
        self.too_large = too_large
        self._user = "nobody" if username is None else f"user {username!r}"
        self._is_anonymous = username is None

    def crashed(self, thread: str, bug: BaseException) -> EkidenError:
        """What to raise where our own code has failed on a thread of ours: a bug, which no waiting mends."""
        kind = TransportCrashed if issubclass(self.unavailable, TransportError) else BackendError
        error = kind(f"The thread {thread} has failed: {bug!r}.")
        error.__cause__ = bug
        return error

    def of(self, trouble: Exception, where: object, seconds: float) -> EkidenError:
        """What to raise for ``trouble`` with the server ``where``, whose calls end after ``seconds``."""
        error = self._of(trouble, where, seconds)
        error.__cause__ = trouble
        return error

    def _of(self, trouble: Exception, where: object, seconds: float) -> EkidenError:
        if isinstance(trouble, EkidenError):
            return trouble
        if isinstance(trouble, Refusal):
            return self._of_refusal(trouble, where)
        if isinstance(trouble, NotJSON):
            return self._of_something_else(trouble, where)
        if isinstance(trouble, urllib3.exceptions.NameResolutionError):
            return self.unavailable(f"{where}: there is no host of this name.")
        if isinstance(trouble, urllib3.exceptions.NewConnectionError):
            cause = trouble.__cause__
            reason = (cause.strerror if isinstance(cause, OSError) else None) or cause or trouble
            return self.unavailable(f"{where} cannot be reached: {reason}.")
        if isinstance(trouble, NoTLS):
            return self.refused(
                f"{where} speaks HTTP without TLS: couchdbs:// is for servers with TLS, couchdb:// for those without."
            )
        if isinstance(trouble, SilentHandshake):
            return self.unavailable(
                f"{where} took the connection and did not answer TLS within {seconds:g} s: couchdbs:// is for servers "
                "with TLS, couchdb:// for those without."
            )
        if isinstance(trouble, LATE):
            return self.unavailable(f"{where} did not answer within {seconds:g} s.")
        if isinstance(trouble, ssl.SSLCertVerificationError):
            return self.refused(f"{where}: its certificate is not accepted: {trouble.verify_message.rstrip('.')}.")
        if isinstance(trouble, (ssl.SSLError, urllib3.exceptions.SSLError)):
            reason = (trouble.reason if isinstance(trouble, ssl.SSLError) else None) or trouble
            return self.refused(
                f"{where} does not speak TLS as we do ({reason}): couchdbs:// is for servers with TLS, couchdb:// for "
                "those without, and some servers want a certificate of ours (certfile=)."
            )
        if isinstance(trouble, socket.gaierror):
            return self.unavailable(f"{where}: there is no host of this name ({trouble.strerror}).")
        if isinstance(trouble, (http.client.RemoteDisconnected, http.client.IncompleteRead, ConnectionError)):
            return self.unavailable(
                f"{where} closed the connection before it had answered: is it being stopped, or does it want TLS "
                "(couchdbs://)?"
            )
        if isinstance(trouble, (http.client.HTTPException, urllib3.exceptions.HTTPError)):
            return self._of_protocol_error(trouble, where)
        if isinstance(trouble, OSError):
            return self.unavailable(f"{where} cannot be reached: {trouble.strerror or trouble}.")
        return self.unavailable(f"{where}: {type(trouble).__name__}: {trouble}")

    def _of_protocol_error(self, trouble: Exception, where: object) -> EkidenError:
        cause = trouble.args[-1] if trouble.args and isinstance(trouble.args[-1], BaseException) else None
        if isinstance(trouble, urllib3.exceptions.ProtocolError) or isinstance(
            cause, (OSError, http.client.IncompleteRead)
        ):
            return self.unavailable(f"{where} closed the connection before it had answered.")
        return self.refused(
            f"{where} does not speak HTTP: is it another kind of server, or one with TLS (couchdbs://)?"
        )

    def _of_something_else(self, trouble: NotJSON, where: object) -> EkidenError:
        if trouble.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return self.unavailable(
                f"{where}: a proxy in front of it answered {trouble.status} ({trouble.kind or 'nothing'})."
            )
        return self.refused(
            f"{where} is not CouchDB, or something stands in front of it: it answered {trouble.status} with "
            f"{trouble.kind or 'nothing'}."
        )

    def _of_refusal(self, refusal: Refusal, where: object) -> EkidenError:
        said = f"{refusal.error}: {refusal.reason}"
        if not refusal.error and refusal.status not in _TOO_LARGE:
            return self._of_something_else(NotJSON(refusal.status, "JSON that CouchDB does not write"), where)
        match refusal.status:
            case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                return self.too_large(
                    f"{where} does not take so large a document or request; see its settings max_document_size, "
                    f"max_attachment_size and max_http_request_size ({said})."
                )
            case HTTPStatus.REQUEST_URI_TOO_LONG:
                return self.too_large(f"{where} does not take so long an id or name.")
            case HTTPStatus.FORBIDDEN if _LOCKED_OUT in refusal.reason:
                return self.unavailable(f"{where} has locked {self._user} out for a while, after wrong passwords.")
            case status if is_not_permitted(refusal) and (status >= HTTPStatus.FORBIDDEN or not self._is_anonymous):
                return self.refused(
                    f"{where} does not permit {self._user} what is needed here ({said}); an administrator adds a user "
                    "to the members of a database by its _security."
                )
            case HTTPStatus.UNAUTHORIZED if self._is_anonymous:
                return self.refused(
                    f"{where} wants to know who asks: write a user and a password into the URL, as in "
                    "couchdb://user:password@host."
                )
            case HTTPStatus.UNAUTHORIZED:
                return self.refused(f"{where} refused the user name or the password ({said}).")
            case HTTPStatus.BAD_REQUEST if refusal.error == "illegal_database_name":
                return self.refused(f"{where} does not take the name of a database ({refusal.reason}).")
            case HTTPStatus.NOT_FOUND:
                return self.refused(f"{where} has no such database or document ({said}).")
            case HTTPStatus.REQUEST_TIMEOUT | HTTPStatus.TOO_MANY_REQUESTS:
                return self.unavailable(f"{where} is busy ({said}).")
            case status if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                return self.unavailable(f"{where} could not do it now: it answered {status} ({said}).")
            case status:
                return self.refused(f"{where} answered {status} ({said}).")


def refusal_in(error: BaseException) -> Refusal | None:
    """The answer that an error of ours was made of; None where there was no answer at all."""
    cause = error.__cause__
    return cause if isinstance(cause, Refusal) else None


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the answer that an error of ours was made of; None where there was no answer at all."""
    refusal = refusal_in(error)
    return None if refusal is None else refusal.status


def refusal_from(status: int, body: Any) -> Refusal:
    """What an answer with a status of trouble says."""
    said = body if isinstance(body, dict) else {}
    return Refusal(status, str(said.get("error", "")), str(said.get("reason", "")))


def has_not_heard_of_database(error: BaseException) -> bool:
    """Whether a node could not do it because another one has not heard yet of a database that was just made.

    CouchDB 3.5 answers the first writes so now and then (``fabric_doc_update`` knows no such reply of a node).
    """
    refusal = refusal_in(error)
    return (
        refusal is not None
        and refusal.status == HTTPStatus.INTERNAL_SERVER_ERROR
        and _NOT_HEARD_OF in f"{refusal.error} {refusal.reason}"
    )


def is_not_permitted(refusal: Refusal) -> bool:
    """Whether who asked is known and lacks a right."""
    if refusal.status == HTTPStatus.FORBIDDEN:
        return True
    if refusal.status not in {HTTPStatus.UNAUTHORIZED, HTTPStatus.INTERNAL_SERVER_ERROR}:
        return False
    reason = f"{refusal.error} {refusal.reason}".lower()
    return any(words in reason for words in _NOT_PERMITTED)
