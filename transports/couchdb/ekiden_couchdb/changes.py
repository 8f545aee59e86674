"""Follows what changes in one database: a thread reads a continuous ``_changes`` feed and hands on what it says.

It always asks for what came behind a sequence that it knows: the newest one when it began, then that of the last change
heard. So nothing is missed between two connections, and nothing falls between the moment in which somebody begins to
follow and the one in which the server answers. A cluster may tell a change more than once.

Where nothing changes the server sends heartbeats; a connection on which none came for a while is given up. A feed that
broke is opened anew after a pause, which grows while that fails.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from random import random
from typing import Any

import msgspec
from ekiden.errors import EkidenError
from ekiden.locks import Flag, start_thread
from ekiden.loggers import safe_logger

from ekiden_couchdb.client import Client, Cuttable, Feed
from ekiden_couchdb.odd_json import readable

logger = safe_logger(__name__)

FROM_THE_BEGINNING = "0"

SHORTEST_HEARTBEAT_SECONDS, LONGEST_HEARTBEAT_SECONDS = 0.3, 10.0
HEARTBEATS_MISSED = 3
"""After so many a connection is given up. They are as many as fit into the URL's timeout."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 5.0
REFUSED_PAUSE_SECONDS = 30.0
"""Between two tries; the last where the server will not have it, which somebody may change."""

LASTING_SECONDS = 5.0
"""A feed that lasted so long was a good one: the next try comes soon."""

CLOSED_WITHIN_SECONDS = 5.0

NO_DOCUMENT = msgspec.Raw(b"null")


class Change(msgspec.Struct, frozen=True):
    """One document has changed; ``doc`` is the document as it is now, where documents were wanted, else JSON's null."""

    id: str
    doc: msgspec.Raw = NO_DOCUMENT


class _Line(msgspec.Struct, frozen=True):
    """A line of a feed: a change, or why it ends."""

    seq: Any = None
    id: str = ""
    doc: msgspec.Raw = NO_DOCUMENT
    error: str = ""
    reason: str = ""


_decode_line = msgspec.json.Decoder(_Line).decode


class Changes:
    """The changes of ``database`` behind ``since`` (a sequence; None: the newest one when it begins).

    The thread calls ``heard`` for each change, ``began`` when it follows from a new place on (what was changed before
    may have been missed, what is changed from now on is not), and ``failed`` when it has stopped to follow. They must
    be quick. What one of them raises is logged, and the thread goes on: nobody would begin it again. ``trouble`` and
    ``trouble_since`` (monotonic) say why it does not follow now; both are None while it does.
    """

    def __init__(
        self,
        client: Client,
        database: str,
        *,
        thread_name: str,
        heard: Callable[[Change], None],
        began: Callable[[], None],
        failed: Callable[[], None],
        since: Any = None,
        with_documents: bool = False,
    ) -> None:
        self._client = client
        self._database = database
        self._heard, self._began, self._failed = heard, began, failed
        self._since = since
        self._with_documents = with_documents
        self._heartbeat = min(
            max(client.options.timeout / HEARTBEATS_MISSED, SHORTEST_HEARTBEAT_SECONDS), LONGEST_HEARTBEAT_SECONDS
        )
        self.trouble: EkidenError | None = None
        self.trouble_since: float | None = time.monotonic()
        self._lock = threading.Lock()  # guards _feed
        self._feed: Feed | None = None
        self._asked = Cuttable()
        self._closed = Flag()
        self._thread = threading.Thread(target=self._run, name=thread_name, daemon=True)

    @property
    def is_live(self) -> bool:
        """Whether it follows now."""
        return self.trouble_since is None

    def start(self) -> None:
        """Begin to follow. Raises ``unavailable`` where the system has no more threads."""
        try:
            start_thread(self._thread)
        except RuntimeError as error:
            raise self._client.errors.unavailable(f"no thread can be started for a feed: {error}.") from error

    def end(self) -> None:
        """Have the thread end, without waiting for it."""
        self._closed.set()
        self._asked.cut()
        with self._lock:
            if self._feed is not None:
                self._feed.cut()

    def close(self) -> None:
        """End the thread. May be called again, and by the thread itself."""
        self.end()
        if self._thread is not threading.current_thread() and self._thread.ident is not None:
            self._thread.join(CLOSED_WITHIN_SECONDS)

    def _run(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._closed.is_set():
            began = time.monotonic()
            is_refused = False
            try:
                with self._client.cut_by(self._asked):
                    self._follow()
            except EkidenError as error:
                self.trouble = error
                is_refused = isinstance(error, self._client.errors.refused) and not self._client.is_missing(error)
            except BaseException as bug:  # whatever it is, nobody would follow any more
                name = threading.current_thread().name
                logger.critical("the thread %s has failed and begins anew: %r", name, bug, exc_info=bug)
                self.trouble = self._client.errors.crashed(name, bug)
            if self.is_live:
                self.trouble_since = time.monotonic()
                self._tell(self._failed)
            if time.monotonic() - began >= LASTING_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            self._closed.wait((REFUSED_PAUSE_SECONDS if is_refused else pause) * (0.5 + random() / 2))
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    def _follow(self) -> None:
        """Read until the feed ends. Raises what the client raises."""
        self._client.ensure_database(self._database)
        try:
            if self._find_a_new_place():
                self._note_live()
                self._tell(self._began)
            query = {
                "feed": "continuous",
                "since": self._since if isinstance(self._since, str) else msgspec.json.encode(self._since).decode(),
                "heartbeat": str(round(self._heartbeat * 1000)),
                "include_docs": "true" if self._with_documents else "false",
            }
            silence = self._heartbeat * HEARTBEATS_MISSED
            with self._client.stream(f"/{self._database}/_changes", query, silence=silence) as feed:
                with self._lock:
                    self._feed = feed
                try:
                    if not self._closed.is_set():
                        self._read(feed)
                finally:
                    with self._lock:
                        self._feed = None
        except EkidenError as error:
            if self._client.is_missing(error):  # somebody has deleted the database: what comes is in a new one
                self._client.lost(self._database)
                self._since = None
            raise

    def _find_a_new_place(self) -> bool:
        """Where there is none to go on from, begin behind the newest change. Whether it was so."""
        if isinstance(self._since, str):
            return False
        newest = newest_sequence(self._client, self._database)
        # Some work-alikes count from one again in a database that was lost and made anew.
        if self._since is None or (isinstance(newest, int) and newest < self._since):
            self._since = newest
            return True
        return False

    def _note_live(self) -> None:
        self.trouble = None
        self.trouble_since = None

    def _read(self, feed: Feed) -> None:
        for text in feed:
            self._note_live()
            if not text.strip():
                continue
            line = self._line(text)
            if line is None:
                continue
            if line.error:
                raise self._client.errors.unavailable(
                    f"{self._client.place} has ended the feed of {self._database} ({line.error}: {line.reason})."
                )
            if line.seq is None:  # the server is about to stop
                return
            self._tell(functools.partial(self._heard, Change(line.id, line.doc)))
            self._since = line.seq

    def _line(self, text: bytes) -> _Line | None:
        """What a line says; None for one that cannot be read, which is passed over: it would come again and again."""
        try:
            return _decode_line(text)
        except (ValueError, RecursionError) as error:
            with contextlib.suppress(ValueError, RecursionError):
                return _decode_line(readable(text))
            logger.error("the feed of %s said something that is no change: %s", self._database, error)
            return None

    def _tell(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as bug:
            logger.critical("what the feed of %s said could not be heard: %r", self._database, bug, exc_info=bug)


def newest_sequence(client: Client, database: str) -> Any:
    """The sequence behind which the next change will be. Raises what the client raises."""
    answer = client.ask("GET", f"/{database}/_changes", query={"since": "now", "limit": "1"})
    if not isinstance(answer.body, dict) or "last_seq" not in answer.body:
        raise client.errors.refused(f"{client.place}: its _changes do not end with a sequence; is it CouchDB?")
    return answer.body["last_seq"]
