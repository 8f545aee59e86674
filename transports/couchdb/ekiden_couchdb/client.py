"""Speaks HTTP with whichever of the servers can be reached.

Every call has one deadline: connecting, sending and answering. Where a server cannot be reached, the next one of the
URL is asked. Once a request was sent it may have been carried out, whatever happens to its answer: it is repeated only
where that does no harm; all else travels, and whoever called finds out what became of it.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import quote, urlencode

import msgspec
from ekiden.errors import EkidenError
from ekiden.urls import BrokerURL, Host

from ekiden_couchdb.clock import ServerClock
from ekiden_couchdb.connection import Connection, Received
from ekiden_couchdb.connections import Connections, Unreachable
from ekiden_couchdb.errors import (
    BROKEN,
    LATE,
    TROUBLE,
    Errors,
    NotJSON,
    has_not_heard_of_database,
    is_not_permitted,
    refusal_from,
    refusal_in,
    status_of,
)
from ekiden_couchdb.options import Place, address_of, options_in, place_in, tls_context

_encode = msgspec.json.Encoder().encode

_FEED_SILENCE_SECONDS = 60.0
_SAFE_IN_PATHS = "/$(),:!~"
_LARGE_BYTES = 16 * 1024
_BELIEVED_SECONDS = 1.0
"""Before so much is sent in a session that was not used for so long, it is asked whether that has ended."""

_NOT_READ = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND})
_UNHEARD_OF_PAUSE_SECONDS = 0.1


class Answer(msgspec.Struct, frozen=True):
    """What a server answered; ``body`` is what its JSON says, ``date`` the header of that name."""

    status: int
    body: Any
    date: str


class BulkOutcome(Enum):
    """What became of one document of a ``_bulk_docs``.

    OK: written. ACCEPTED: written to fewer copies than a quorum; another may win. CONFLICT: it has another revision.
    FORBIDDEN: the database does not take it. ERROR: anything else.
    """

    OK = "ok"
    ACCEPTED = "accepted"
    CONFLICT = "conflict"
    FORBIDDEN = "forbidden"
    ERROR = "error"


class BulkAnswer(msgspec.Struct, frozen=True, gc=False):
    """The answer for one document. ``rev`` where it was written; ``reason`` what the server said otherwise."""

    id: str
    outcome: BulkOutcome
    rev: str = ""
    reason: str = ""


class _Session(msgspec.Struct, frozen=True):
    """A session with one server: its cookie, and when (monotonic) the server took it last."""

    cookie: str
    good_at: float


class Client:
    """What one URL leads to, for any number of threads.

    Raises ``unavailable`` for what may work when tried again, and ``refused`` for what will not, each with one
    sentence; ``errors.status_of`` tells the status of the answer, if there was one. Nothing is connected before the
    first call.
    """

    def __init__(
        self,
        url: BrokerURL,
        *,
        unavailable: type[EkidenError],
        refused: type[EkidenError],
        too_large: type[EkidenError] | None = None,
    ) -> None:
        self.options = options_in(url)
        self.place: Place = place_in(url)
        self.errors = Errors(unavailable, refused, too_large or refused, username=self.place.username)
        self.clock = ServerClock()
        self._is_cluster: bool | None = None
        self._own = f"{self.options.prefix}-"
        self._a_database: str | None = None  # one of ours that is there
        self._connections = Connections(self.place.hosts, tls_context(url, self.options), self.options.server_hostname)
        self._headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self.options.auth == "basic" and self.place.username is not None:
            secret = f"{self.place.username}:{self.place.password or ''}".encode()
            self._headers["Authorization"] = "Basic " + base64.b64encode(secret).decode()
        self._begin()

    def database(self, kind: str) -> str:
        """The name of our database for ``kind``."""
        return f"{self.options.prefix}-{kind}"

    def deadline(self) -> float:
        """When a call that begins now must have ended, on the monotonic clock."""
        deadline: float | None = getattr(self._calls, "deadline", None)
        return time.monotonic() + self.options.timeout if deadline is None else deadline

    @contextmanager
    def one_deadline(self, *, by: float | None = None) -> Iterator[None]:
        """All requests that this thread makes in the ``with`` block have one deadline: the timeout from now, or ``by``.

        ``by`` (on the monotonic clock) holds where it is sooner; in the block of another deadline, that one holds.
        """
        if getattr(self._calls, "deadline", None) is not None:
            yield
            return
        self._calls.deadline = self.deadline() if by is None else min(self.deadline(), by)
        try:
            yield
        finally:
            self._calls.deadline = None

    @contextmanager
    def cut_by(self, cuttable: Cuttable) -> Iterator[None]:
        """What this thread asks in the ``with`` block ends when ``cuttable`` is cut, also at a silent server."""
        self._calls.cuttable = cuttable
        try:
            yield
        finally:
            self._calls.cuttable = None

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        accept: Collection[int] = (),
        harmless: bool = False,
        deadline: float | None = None,
    ) -> Answer:
        """Make one request. An answer outside of 2xx is raised, unless its status is among ``accept``.

        ``path`` is not percent-encoded. ``harmless``: it may be carried out twice, as what is got always may.
        ``deadline``: on the monotonic clock, if not the timeout from now.
        """
        deadline = self.deadline() if deadline is None else deadline
        content = None if body is None else _encode(body)
        harmless = harmless or method in {"GET", "HEAD"}
        target = _target(path, query)
        while True:
            received, host = self._exchange(method, target, content, harmless=harmless, deadline=deadline)
            if 200 <= received.status < 300 or received.status in accept:
                break
            error = self.error(refusal_from(received.status, received.body), host)
            if not (harmless and self._may_try_again(error, deadline)):
                raise error
        name = path[1:].partition("/")[0]
        if name.startswith(self._own) and 200 <= received.status < 300:
            self._a_database = name
        return Answer(received.status, received.body, received.headers.get("date", ""))

    def rows(self, answer: Answer) -> list[dict[str, Any]]:
        """The rows of an answer that has some. Raises ``refused`` for one that is no CouchDB's."""
        rows = answer.body.get("rows") if isinstance(answer.body, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self.errors.refused(f"{self.place}: it answered with something else than rows; is it CouchDB?")
        return rows

    def bulk(
        self, database: str, documents: Sequence[Mapping[str, Any]], *, deadline: float | None = None
    ) -> list[BulkAnswer]:
        """Write ``documents``, no two of one id, and return what became of each, in their order.

        Raises when nothing could be asked, or was answered: then any of them may or may not have been written.
        """
        if not documents:
            return []
        deadline = self.deadline() if deadline is None else deadline
        is_repeated = False
        while True:
            try:
                answers = self._bulk(database, documents, deadline)
            except EkidenError as error:
                if not self._may_try_again(error, deadline):
                    raise
                is_repeated = True
            else:
                return self._with_own_writes(database, documents, answers, deadline) if is_repeated else answers

    def hand_over(
        self, database: str, documents: Sequence[Mapping[str, Any]], *, deadline: float | None = None
    ) -> None:
        """Store documents under the revisions that they have, as replication does, where these are missing.

        The answer is the same however many copies of a cluster take them.
        """
        if documents:
            body = {"docs": documents, "new_edits": False}
            self.ask("POST", f"/{database}/_bulk_docs", body, harmless=True, deadline=deadline)

    @contextmanager
    def stream(
        self, path: str, query: Mapping[str, str] | None = None, *, silence: float = _FEED_SILENCE_SECONDS
    ) -> Iterator[Feed]:
        """A request whose answer does not end: its lines, over a connection of its own.

        Each line, also an empty one (a heartbeat), must come within ``silence`` seconds of the one before. The request
        is sent when the first is wanted: a server may have nothing to say for a while, not even that it has understood.
        """
        connection = self._connect(self.deadline())
        try:
            yield Feed(self, connection, self._stream_lines(connection, _target(path, query), silence))
        finally:
            connection.close()

    def ensure_database(self, name: str) -> None:
        """Make the database where it is missing and we may. Raises when it is missing afterwards, with one sentence."""
        if name in self._ensured:
            return
        if self.ask("GET", f"/{name}", accept={HTTPStatus.NOT_FOUND}).status == HTTPStatus.NOT_FOUND:
            self._create_database(name)
        self._ensured.add(name)

    def has_ensured(self, name: str) -> bool:
        """Whether this process has found or made the database already."""
        return name in self._ensured

    def is_missing(self, error: EkidenError) -> bool:
        """Whether ``error`` says that a database is missing (any more)."""
        return status_of(error) == HTTPStatus.NOT_FOUND

    def lost(self, database: str) -> None:
        """The database was found to be missing: the next ``ensure_database`` makes it anew."""
        self._ensured.discard(database)

    def is_cluster(self) -> bool:
        """Whether a document is kept by several nodes, which may disagree for a while. Asked once.

        True as long as that cannot be told.
        """
        if self._is_cluster is None:
            self._is_cluster = self._ask_whether_cluster()
        return self._is_cluster is not False

    def addresses(self) -> tuple[str, ...]:
        """The servers, in the order of the URL, as ``host:port``."""
        return tuple(dict.fromkeys(map(address_of, self.place.hosts)))

    def ask_in_order(self, addresses: Sequence[str]) -> None:
        """Ask the first of ``addresses``, which are those of the URL, that answers."""
        hosts = {address_of(host): host for host in self.place.hosts}
        ordered = [hosts[address] for address in addresses]
        if tuple(ordered) != self._connections.hosts:
            self._connections.reorder(ordered)

    def nodes_reached(self, times: int) -> set[str]:
        """The names of the nodes that so many new connections lead to; none where we may not ask for them."""
        names: set[str] = set()
        for _ in range(times):
            connection = self._connect(self.deadline())
            try:
                answer = self._authenticated(connection, "GET", "/_node/_local", None, self.deadline())
            except (*TROUBLE, NotJSON) as error:
                raise self.failed(error, connection.host) from error
            finally:
                connection.close()
            if answer.status != HTTPStatus.OK or not isinstance(answer.body, dict):
                return set()
            names.add(str(answer.body.get("name")))
        return names

    def server_time(self) -> float:
        """What the server's clock shows now at the least, in seconds since the epoch; at the most it is
        ``clock_error`` later."""
        self._ask_the_time()
        return self.clock.earliest()

    def latest_server_time(self) -> float:
        """What the server's clock shows now at the most."""
        self._ask_the_time()
        return self.clock.latest()

    def nearest_server_time(self, ours: float) -> float:
        """What the server's clock may show now that is nearest to ``ours``."""
        self._ask_the_time()
        return self.clock.nearest(ours)

    @property
    def clock_error(self) -> float:
        """How many seconds ``server_time`` may be behind."""
        self._ask_the_time()
        return self.clock.error

    def error(self, trouble: Exception, host: Host | None = None) -> EkidenError:
        """What to raise for ``trouble`` with ``host``."""
        where = self.place if host is None else f"CouchDB at {address_of(host)}"
        return self.errors.of(trouble, where, self.options.timeout)

    def failed(self, trouble: Exception, host: Host) -> EkidenError:
        """The same, for a connection that broke: a server that was silent is not asked again before it answers."""
        if isinstance(trouble, LATE):
            self._connections.turn_from(host)
        return self.error(trouble, host)

    def close(self) -> None:
        """Close every idle connection; those in use are closed when their calls end. May be called again."""
        self._connections.close()

    def forget(self) -> None:
        """In a forked child: drop every connection without touching the parent's."""
        self._connections.forget()
        self._begin()

    # Connections.

    def _begin(self) -> None:
        self._calls = threading.local()
        self._sessions: dict[Host, _Session] = {}
        self._ensured: set[str] = set()

    def _connect(self, deadline: float) -> Connection:
        try:
            return self._connections.connect(deadline)
        except Unreachable as trouble:
            raise self.error(trouble.error, trouble.host) from trouble.error

    def _exchange(
        self, method: str, target: str, content: bytes | None, *, harmless: bool, deadline: float
    ) -> tuple[Received, Host]:
        connection = self._connections.take_idle()
        was_idle = connection is not None
        if connection is None:
            connection = self._connect(deadline)
        asked_at = time.monotonic()
        cuttable: Cuttable | None = getattr(self._calls, "cuttable", None)
        try:
            with nullcontext() if cuttable is None else cuttable.holding(connection):
                received = self._authenticated(connection, method, target, content, deadline)
        except (*TROUBLE, NotJSON) as error:
            connection.close()
            if cuttable is not None and cuttable.is_cut:  # that says nothing of the server
                raise self.error(error, connection.host) from error
            if was_idle and harmless and not isinstance(error, (NotJSON, TimeoutError)):
                return self._exchange(method, target, content, harmless=harmless, deadline=deadline)
            if not isinstance(error, LATE):
                is_away = not was_idle
            else:
                is_away = time.monotonic() - asked_at >= self.options.timeout / 2
            if is_away:
                self._connections.turn_from(connection.host)
            if content is not None and isinstance(error, BROKEN):
                self._raise_what_was_not_read(target, deadline)
            raise self.error(error, connection.host) from error
        except BaseException:
            connection.close()  # the answer would be taken for the next one's
            raise
        self._connections.give_back(connection)
        return received, connection.host

    def _bulk(self, database: str, documents: Sequence[Mapping[str, Any]], deadline: float) -> list[BulkAnswer]:
        answer = self.ask("POST", f"/{database}/_bulk_docs", {"docs": documents}, deadline=deadline)
        if not isinstance(answer.body, list) or not all(isinstance(each, dict) for each in answer.body):
            raise self.errors.refused(f"{self.place}: it answered a _bulk_docs with something else than a list.")
        by_id = {str(each.get("id", "")): _bulk_answer(each) for each in answer.body}
        missing = BulkAnswer("", BulkOutcome.ERROR, reason="the server did not say what became of it")
        return [by_id.get(document["_id"], missing) for document in documents]

    def _raise_what_was_not_read(self, target: str, deadline: float) -> None:
        """Say why a connection broke, if it is that the server would not read what was sent.

        A server that lacks the database, or a right of ours, answers without reading the body and closes the
        connection; of a large body the kernel then makes a reset, by which the answer may be lost.
        """
        name = target[1:].partition("/")[0].partition("?")[0]
        if not name or name.startswith("_"):
            return
        try:
            received, host = self._exchange("GET", f"/{name}", None, harmless=True, deadline=deadline)
        except EkidenError:
            return  # what is to be said is that the connection broke
        if received.status in _NOT_READ:
            raise self.error(refusal_from(received.status, received.body), host)

    def _may_try_again(self, error: EkidenError, deadline: float) -> bool:
        """Whether it is a database that a node has not heard of; after a pause, when there is time for one."""
        if not has_not_heard_of_database(error) or time.monotonic() + _UNHEARD_OF_PAUSE_SECONDS >= deadline:
            return False
        time.sleep(_UNHEARD_OF_PAUSE_SECONDS)
        return True

    def _with_own_writes(
        self, database: str, documents: Sequence[Mapping[str, Any]], answers: list[BulkAnswer], deadline: float
    ) -> list[BulkAnswer]:
        """``answers`` to a request that was repeated: what is there exactly as we write it was written by us before."""
        doubtful = {
            answer.id: number for number, answer in enumerate(answers) if answer.outcome is BulkOutcome.CONFLICT
        }
        if not doubtful:
            return answers
        query = {"include_docs": "true", "attachments": "true"}
        keys = {"keys": list(doubtful)}
        path = f"/{database}/_all_docs"
        found = self.rows(self.ask("POST", path, keys, query=query, harmless=True, deadline=deadline))
        for document in [row["doc"] for row in found if isinstance(row.get("doc"), dict)]:
            number = doubtful[document["_id"]]
            if _content(document) == _content(documents[number]):
                answers[number] = BulkAnswer(document["_id"], BulkOutcome.OK, rev=document["_rev"])
        return answers

    def _authenticated(
        self, connection: Connection, method: str, target: str, content: bytes | None, deadline: float
    ) -> Received:
        """The answer to a request by who we are; where a session has ended, after a new one was begun."""
        if self.options.auth == "basic" or self.place.username is None:
            return self._timed(connection, method, target, content, self._headers, deadline)
        host = connection.host
        session = self._sessions.get(host)
        if session is not None and content is not None and len(content) >= _LARGE_BYTES:
            session = self._lasting(session, connection, deadline)
        if session is None:
            self._begin_session(connection, deadline)
        received = self._timed(connection, method, target, content, self._headers_of(host), deadline)
        if received.status == HTTPStatus.UNAUTHORIZED and session is not None:
            # The server has not read the body and closes the connection, whether it says so or not.
            connection.close()
            self._begin_session(connection, deadline)
            received = self._timed(connection, method, target, content, self._headers_of(host), deadline)
        if received.status != HTTPStatus.UNAUTHORIZED:
            self._note_session(host, received)
        return received

    def _lasting(self, session: _Session, connection: Connection, deadline: float) -> _Session | None:
        """``session``, if it has not ended: what is large is not sent to be refused unread."""
        if time.monotonic() < session.good_at + _BELIEVED_SECONDS:
            return session
        headers = self._headers_of(connection.host)
        said = self._timed(connection, "GET", "/_session", None, headers, deadline).body
        who = said.get("userCtx") if isinstance(said, dict) else None
        return session if isinstance(who, dict) and who.get("name") is not None else None

    def _timed(  # noqa: PLR0917
        self,
        connection: Connection,
        method: str,
        target: str,
        content: bytes | None,
        headers: Mapping[str, str],
        deadline: float,
    ) -> Received:
        asked_at = time.monotonic()
        received = connection.exchange(method, target, content, headers, deadline)
        date = received.headers.get("date")
        if date:
            self.clock.note(date, asked_at, time.monotonic())
        return received

    def _begin_session(self, connection: Connection, deadline: float) -> None:
        self._sessions.pop(connection.host, None)
        who = {"name": self.place.username, "password": self.place.password or ""}
        received = self._timed(connection, "POST", "/_session", _encode(who), self._headers, deadline)
        if received.status != HTTPStatus.OK:
            raise self.error(refusal_from(received.status, received.body), connection.host)
        self._note_session(connection.host, received)

    def _note_session(self, host: Host, received: Received) -> None:
        """The session was good a moment ago, and may have a new cookie."""
        cookie = received.headers.get("set-cookie", "").partition(";")[0]
        known = self._sessions.get(host)
        if cookie.startswith("AuthSession="):
            self._sessions[host] = _Session(cookie, time.monotonic())
        elif known is not None:
            self._sessions[host] = _Session(known.cookie, time.monotonic())

    def _headers_of(self, host: Host) -> Mapping[str, str]:
        session = self._sessions.get(host)
        return self._headers if session is None else {**self._headers, "Cookie": session.cookie}

    def _stream_lines(self, connection: Connection, target: str, silence: float) -> Iterator[bytes]:
        deadline = self.deadline()
        headers: Mapping[str, str] = self._headers
        if self.options.auth == "session" and self.place.username is not None:
            self._begin_session(connection, deadline)
            headers = self._headers_of(connection.host)
        received, lines = connection.stream(target, headers, deadline, silence=silence)
        if received is not None:
            raise self.error(refusal_from(received.status, received.body), connection.host)
        yield from lines

    # Asking once.

    def _create_database(self, name: str) -> None:
        query = {"q": str(self.options.q)} | ({} if self.options.n is None else {"n": str(self.options.n)})
        exists = HTTPStatus.PRECONDITION_FAILED
        try:
            self.ask("PUT", f"/{name}", query=query, accept={exists}, harmless=True)
        except self.errors.refused as error:
            refusal = refusal_in(error)
            if refusal is None or not is_not_permitted(refusal):
                raise
            raise self.errors.refused(
                f"{self.place} has no database {name!r} and does not permit us to make it: an administrator has to "
                f"make it and to add our user to the members in its _security ({refusal.reason})."
            ) from refusal

    def _ask_whether_cluster(self) -> bool | None:
        """By the number of nodes; who may not ask that looks at how many copies one of our databases has."""
        answer = self.ask("GET", "/_membership", accept=range(400, 500))
        if isinstance(answer.body, dict) and isinstance(answer.body.get("cluster_nodes"), list):
            return len(answer.body["cluster_nodes"]) > 1
        if self._a_database is None:
            return None
        info = self.ask("GET", f"/{self._a_database}", accept=range(400, 500)).body
        copies = info.get("cluster", {}).get("n", 1) if isinstance(info, dict) and "error" not in info else None
        return None if copies is None else int(copies) > 1

    def _ask_the_time(self) -> None:
        if not self.clock.is_known:
            self.ask("GET", "/", accept=range(400, 500))
        if not self.clock.is_known:
            raise self.errors.refused(f"{self.place} does not say the date in its answers; that is needed for leases.")


class Cuttable:
    """The requests of one thread, which any other may cut, for good. ``_lock`` guards all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self.is_cut = False

    @contextmanager
    def holding(self, connection: Connection) -> Iterator[None]:
        """Inside the ``with`` block a request is made over ``connection``."""
        with self._lock:
            self._connection = connection
            if self.is_cut:
                connection.cut()
        try:
            yield
        finally:
            with self._lock:
                self._connection = None

    def cut(self) -> None:
        """End the request that is made now, and those to come."""
        with self._lock:
            self.is_cut = True
            if self._connection is not None:
                self._connection.cut()


class Feed:
    """The lines of an answer that does not end. One thread reads; any may ``cut``, which ends the reading."""

    def __init__(self, client: Client, connection: Connection, lines: Iterator[bytes]) -> None:
        self._client = client
        self._connection = connection
        self._lines = lines
        self._is_cut = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        """The next line; an empty one is a heartbeat. Raises ``unavailable`` when the connection breaks."""
        try:
            return next(self._lines)
        except (*TROUBLE, NotJSON) as error:
            if self._is_cut:
                raise StopIteration from error
            raise self._client.failed(error, self._connection.host) from error

    def cut(self) -> None:
        """End the reading, by another thread or by the reader."""
        self._is_cut = True
        self._connection.cut()


def _target(path: str, query: Mapping[str, str] | None) -> str:
    """``path`` and ``query`` as they stand in a request. A plus sign in a path would be taken for a space."""
    target = quote(path, safe=_SAFE_IN_PATHS)
    return f"{target}?{urlencode(query)}" if query else target


def _content(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a document says, whatever its revision."""
    content = {name: value for name, value in document.items() if not name.startswith("_")}
    attachments = document.get("_attachments", {})
    return content | {f"_{name}": attachment.get("data") for name, attachment in attachments.items()}


def _bulk_answer(said: Mapping[str, Any]) -> BulkAnswer:
    document_id, error = str(said.get("id", "")), str(said.get("error", ""))
    reason = f"{error}: {said.get('reason', '')}"
    if said.get("ok") or (not error and "rev" in said):
        outcome = BulkOutcome.ACCEPTED if said.get("accepted") else BulkOutcome.OK
        return BulkAnswer(document_id, outcome, rev=str(said.get("rev", "")))
    match error:
        case "conflict":
            return BulkAnswer(document_id, BulkOutcome.CONFLICT, reason=reason)
        case "forbidden" | "unauthorized":
            return BulkAnswer(document_id, BulkOutcome.FORBIDDEN, reason=reason)
        case _:
            return BulkAnswer(document_id, BulkOutcome.ERROR, reason=reason)
