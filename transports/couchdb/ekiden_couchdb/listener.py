"""Hears what is broadcast on a topic: follows the database of the day, and about midnight the next one, too.

A listener that was cut off reads on where it was, so a broadcast of the meantime is heard late.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

import msgspec
from ekiden.errors import TransportClosed
from ekiden.locks import Flag
from ekiden.transport import Listener

from ekiden_couchdb import events
from ekiden_couchdb.changes import FROM_THE_BEGINNING, Change, Changes, newest_sequence
from ekiden_couchdb.client import Client
from ekiden_couchdb.events import broadcast

AROUND_MIDNIGHT_SECONDS = 120.0
"""So long before a day begins its database is followed, and so long after it has ended."""

LOOK_AT_CLOCK_SECONDS = 30.0
HEARD_REMEMBERED = 10_000
"""A cluster may tell an event again; so many are remembered."""

_decode_event = msgspec.json.Decoder(events.Event).decode


__all__ = ["CouchDBListener", "broadcast"]


class CouchDBListener(Listener):
    """One topic, from one thread; ``close`` by any. Each database that it follows has a thread of its own.

    ``_lock`` guards what was heard; ``_receiving`` is held by who receives, and guards which databases are followed.
    """

    def __init__(self, client: Client, topic: str, *, left: Callable[[CouchDBListener], None]) -> None:
        self._client = client
        self._topic = topic
        self._left = left
        self._lock = threading.Lock()
        self._receiving = threading.Lock()
        self._called = Flag()
        self._payloads: deque[bytes] = deque()
        self._known: OrderedDict[str, None] = OrderedDict()
        self._closed = Flag()
        self._followed: dict[str, Changes] = {}
        self._lasts = events.is_lasting(client)
        events_now = self._wanted()
        for database in events_now:
            self._ensure(database)
        places = {database: newest_sequence(client, database) for database in events_now}
        if not self._lasts:
            events.drop_old_databases(client)
        for database, place in places.items():
            self._follow(database, place)

    def receive(self, timeout: float) -> list[bytes]:
        give_up = time.monotonic() + timeout
        if self._closed.is_set():
            raise TransportClosed(f"The listener to topic {self._topic!r} was closed.")
        with self._receiving:
            while True:
                self._turn()
                left = give_up - time.monotonic()
                heard = self._wait(min(left, LOOK_AT_CLOCK_SECONDS))
                if heard or self._closed.is_set() or left <= LOOK_AT_CLOCK_SECONDS:
                    return heard

    def close(self) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._called.set()
        with self._receiving:
            followed = list(self._followed.values())
            self._followed.clear()
        for changes in followed:
            changes.end()
        for changes in followed:
            changes.close()
        self._left(self)

    def abandon(self) -> None:
        """In a forked child: threads and connections are the parent's."""
        self._closed.set()
        self._followed.clear()

    # The databases.

    def _wanted(self) -> list[str]:
        """The databases in which something may be told now, the oldest first."""
        if self._lasts:
            return [events.lasting_database(self._client)]
        now = self._client.server_time()
        days = (now - AROUND_MIDNIGHT_SECONDS, now + AROUND_MIDNIGHT_SECONDS)
        return sorted({events.database_of(self._client, day) for day in days})

    def _turn(self) -> None:
        """Follow the databases of now. What is in one that was not followed yet was told since the last look."""
        wanted = self._wanted()
        for database in wanted:
            if database not in self._followed:
                self._ensure(database)
                self._follow(database, FROM_THE_BEGINNING)
                events.drop_old_databases(self._client)
        for database in [database for database in self._followed if database not in wanted]:
            self._followed.pop(database).close()

    def _ensure(self, database: str) -> None:
        if not self._lasts:
            events.ensure_database(self._client, database)

    def _follow(self, database: str, since: object) -> None:
        changes = Changes(
            self._client,
            database,
            thread_name="ekiden-couchdb-listener",
            heard=self._hear,
            began=self._tell,
            failed=self._tell,
            since=since,
            with_documents=True,
        )
        changes.start()
        self._followed[database] = changes

    # What was heard.

    def _hear(self, change: Change) -> None:
        try:
            event = _decode_event(change.doc)
        except (ValueError, RecursionError):
            return  # not one of ours
        with self._lock:
            if event.topic != self._topic or change.id in self._known:
                return
            self._known[change.id] = None
            if len(self._known) > HEARD_REMEMBERED:
                self._known.popitem(last=False)
            self._payloads.extend(event.payloads)
            self._called.set()

    def _tell(self) -> None:
        """Have who receives look at the feed's state."""
        self._called.set()

    def _wait(self, seconds: float) -> list[bytes]:
        """What was heard; waits for something. Raises when the feed has been broken for as long as a call may take."""
        give_up = time.monotonic() + seconds
        while True:
            self._called.clear()
            with self._lock:
                heard = list(self._payloads)
                self._payloads.clear()
            left = give_up - time.monotonic()
            if heard or self._closed.is_set() or left <= 0:
                return heard
            self._called.wait(min(left, self._trouble_lasts()))

    def _trouble_lasts(self) -> float:
        """How long the trouble that there is may still last. Raises it when that is over."""
        longest = self._client.options.timeout
        now = time.monotonic()
        lasts = LOOK_AT_CLOCK_SECONDS
        for changes in self._followed.values():
            trouble, since = changes.trouble, changes.trouble_since
            if since is not None:
                lasts = min(lasts, max(0.01, since + longest - now))
                is_refused = isinstance(trouble, self._client.errors.refused) and not self._client.is_missing(trouble)
                if trouble is not None and (now - since >= longest or is_refused):
                    raise trouble
        return lasts
