"""Tells waiting consumers that there is something in a queue: each process writes one small document again and again.

    {prefix}-signals / ring-NN    {"by": WHO, "rung": {QUEUE: NUMBER, ...}}

``rung`` holds the queues of the last seconds, each with a number that rises, so that nothing is lost where a feed shows
the last of several revisions only. A process takes one of ``SLOTS`` documents by chance and keeps it while nobody else
writes it: so its writes meet no others, each takes one request whatever the number of queues, and the database never
holds more than ``SLOTS`` documents. One document for each queue would be written by all who publish at the same time;
most of that would be conflicts, which a cluster keeps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from http import HTTPStatus
from random import randrange
from uuid import uuid4

from ekiden.errors import EkidenError
from ekiden.locks import start_thread
from ekiden.loggers import safe_logger

from ekiden_couchdb.client import BulkOutcome, Client

logger = safe_logger(__name__)

SLOTS = 64
KEPT_SECONDS = 10.0

SHORTEST_PAUSE_SECONDS = 0.02
SHARE_OF_TIME, MOST_SAVED_SECONDS = 0.2, 1.0
"""A process spends no more of its time than this with ringing: the slower the server, the longer the pauses. Who has
not rung for some time has saved some, and may ring at once as long as it lasts."""

LONGEST_RING_SECONDS = 2.0
AFTER_TROUBLE_SECONDS, AFTER_REFUSAL_SECONDS = 1.0, 30.0
LINGER_SECONDS = 1.0
REVISIONS_KEPT = 5
_TRIES = 3


class Ringer:
    """Rings for one process. Every method may be called by any thread, and raises nothing.

    The first ring after a pause is written by who calls; what comes too soon after it is written by a thread, which
    ends when there has been nothing more to do for a second. ``_lock`` guards what is to be written, and the one who
    writes (``_is_writing``, or the thread) owns the document.
    """

    def __init__(self, client: Client, database: str) -> None:
        self._client = client
        self._database = database
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._pending: set[str] = set()
        self._next_at = 0.0
        self._saved = MOST_SAVED_SECONDS
        self._saved_at = time.monotonic()
        self._is_writing = False
        self._thread: threading.Thread | None = None
        self._closed = False
        self._who = uuid4().hex
        self._rung: dict[str, tuple[int, float]] = {}
        self._number = 0
        self._document_id = ""
        self._revision = ""

    def ring(self, queues: Iterable[str]) -> None:
        """Say that there is something in ``queues``: at once, or together with what else comes in the next moment."""
        with self._lock:
            self._pending.update(queues)
            if self._closed or not self._pending:
                return
            if self._thread is not None or self._is_writing or time.monotonic() < self._next_at:
                self._write_later()
                return
            self._is_writing = True
        try:
            self._write_pending()
        finally:
            with self._lock:
                self._is_writing = False
                self._changed.notify_all()

    def close(self) -> None:
        """Write what is left to be written, and end the thread. May be called again."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(LONGEST_RING_SECONDS + 1.0)

    def _write_later(self) -> None:
        """The caller holds the lock."""
        if self._thread is not None:
            self._changed.notify_all()
            return
        thread = threading.Thread(target=self._run, name="ekiden-couchdb-rings", daemon=True)
        try:
            start_thread(thread)
        except RuntimeError as error:  # no more threads: whoever rings next writes it
            logger.warning("no thread can be started that rings: %s", error)
        else:
            self._thread = thread

    def _run(self) -> None:
        try:
            self._write_while_there_is_something()
        except BaseException as bug:
            logger.critical("the thread that rings has failed; the next ring starts another: %r", bug, exc_info=bug)
            with self._lock:
                self._thread = None

    def _write_while_there_is_something(self) -> None:
        while True:
            with self._lock:
                give_up = time.monotonic() + LINGER_SECONDS
                while (pause := self._pause(give_up)) > 0:
                    self._changed.wait(pause)
                if not self._pending:
                    self._thread = None
                    return
            self._write_pending()

    def _pause(self, give_up: float) -> float:
        """How long the thread has to wait before it looks again. The caller holds the lock."""
        now = time.monotonic()
        if self._is_writing:
            return LONGEST_RING_SECONDS
        if self._closed:
            return 0.0
        return (self._next_at if self._pending else give_up) - now

    def _write_pending(self) -> None:
        began = time.monotonic()
        with self._lock:
            pending, self._pending = self._pending, set()
            for queue in pending:
                self._number += 1
                self._rung[queue] = (self._number, began)
            for queue in [queue for queue, (_, at) in self._rung.items() if at < began - KEPT_SECONDS]:
                del self._rung[queue]
            rung = {queue: number for queue, (number, _) in self._rung.items()}
        try:
            self._write(rung, min(began + LONGEST_RING_SECONDS, self._client.deadline()))
        except self._client.errors.refused:  # a hint: who does not hear it looks by himself, and `ekiden doctor` tells
            pause = AFTER_REFUSAL_SECONDS
        except EkidenError:
            pause = AFTER_TROUBLE_SECONDS
        except Exception as bug:
            logger.critical("nobody was rung for: %r", bug, exc_info=bug)
            self._document_id = ""
            pause = AFTER_TROUBLE_SECONDS
        else:
            pause = self._pause_after(time.monotonic() - began)
        with self._lock:
            self._next_at = time.monotonic() + pause

    def _pause_after(self, seconds: float) -> float:
        """How long nobody rings after a ring that took ``seconds``."""
        now = time.monotonic()
        saved = self._saved + (now - self._saved_at) * SHARE_OF_TIME - seconds
        self._saved, self._saved_at = min(saved, MOST_SAVED_SECONDS), now
        return max(SHORTEST_PAUSE_SECONDS, -saved / SHARE_OF_TIME)

    def _write(self, rung: dict[str, int], deadline: float) -> None:
        """Write the document, another one if somebody else has written this one. Raises what the client raises."""
        for _ in range(_TRIES):
            try:
                if not self._document_id:
                    self._take_a_document(deadline)
                document = {"_id": self._document_id, "by": self._who, "rung": rung}
                if self._revision:
                    document["_rev"] = self._revision
                (answer,) = self._client.bulk(self._database, [document], deadline=deadline)
            except EkidenError as error:
                self._document_id = ""
                if not self._client.is_missing(error):
                    raise
                self._client.lost(self._database)
                continue
            if answer.outcome in {BulkOutcome.OK, BulkOutcome.ACCEPTED}:
                self._revision = answer.rev
                return
            self._document_id = ""
            if answer.outcome is BulkOutcome.FORBIDDEN:
                raise self._client.errors.refused(f"{self._client.place}: {self._database} takes no documents.")

    def _take_a_document(self, deadline: float) -> None:
        self._client.ensure_database(self._database)
        document_id = f"ring-{randrange(SLOTS):02}"
        path = f"/{self._database}/{document_id}"
        found = self._client.ask(
            "GET", path, query={"conflicts": "true"}, accept={HTTPStatus.NOT_FOUND}, deadline=deadline
        )
        is_there = found.status == HTTPStatus.OK
        # Two processes of a cluster that wrote it at the same moment have left a branch that nobody needs.
        for revision in found.body.get("_conflicts", ()) if is_there else ():
            self._client.bulk(
                self._database, [{"_id": document_id, "_rev": revision, "_deleted": True}], deadline=deadline
            )
        if not is_there:
            self._keep_few_revisions(deadline)
        self._revision = str(found.body["_rev"]) if is_there else ""
        self._document_id = document_id

    def _keep_few_revisions(self, deadline: float) -> None:
        """They are written again and again. Where we may not say so, the server keeps a thousand revisions of each."""
        path = f"/{self._database}/_revs_limit"
        self._client.ask("PUT", path, REVISIONS_KEPT, accept=range(400, 500), harmless=True, deadline=deadline)
