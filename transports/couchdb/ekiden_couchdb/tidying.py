"""Deletes what has expired, a little at a time, and removes the tombstones of that where the server permits it.

Who reads passes over what has expired, so nothing depends on this but space. One process at a time does it for a
database: the document ``_local/ekiden-tidying``, which is neither replicated nor told of, says who, and until when.

What has expired is found with an index over ``ends``, which a database's administrator may make; without it nothing is
deleted. A deletion leaves a tombstone, which ``_purge`` removes; it is for server administrators. Elsewhere tombstones
stay, as large as the ids, and ``ekiden doctor`` says so.
"""

from __future__ import annotations

import threading
import time
from http import HTTPStatus
from random import random
from typing import Any
from uuid import uuid4

from ekiden.errors import EkidenError
from ekiden.locks import Flag, start_thread
from ekiden.loggers import safe_logger

from ekiden_couchdb.client import Client
from ekiden_couchdb.purging import Purger, may_purge
from ekiden_couchdb.store import DELETION, Edit, Store
from ekiden_couchdb.store_documents import LAST, members_of

logger = safe_logger(__name__)

TIDY_SECONDS = 60.0
MORE_SECONDS = 5.0
"""Between two steps, and when there was more than one step could do."""

_TURN_SECONDS = 2 * TIDY_SECONDS
STEP_SECONDS = 2.0
DELETED_AT_ONCE = 500
CLUSTER_DELAY_SECONDS = 300.0
"""In a cluster a tombstone is kept for so long, as evidence for branches that have lost."""

REVISIONS_KEPT = 50
CLOSED_WITHIN_SECONDS = 5.0

_DESIGN, _INDEX = "ekiden", "ends"
_TURN = "_local/ekiden-tidying"


class Tidying:
    """Tidies ``stores`` in a thread that lives while it has something to do; ``ask`` says that it may be time."""

    def __init__(self, client: Client, stores: tuple[Store, ...]) -> None:
        self._client = client
        self._stores = stores
        self._lock = threading.Lock()  # guards the thread, and when the next one begins
        self._next_at = time.monotonic() + TIDY_SECONDS * random()
        self._thread: threading.Thread | None = None
        self._closed = Flag()
        self._who = uuid4().hex
        self._indexed: dict[str, bool] = {}
        self._purgers: dict[str, Purger | None] = {}

    def ask(self) -> None:
        """After something was stored: begin a step, if it is time. Does not wait for it, and raises nothing."""
        if time.monotonic() < self._next_at:
            return
        with self._lock:
            if self._thread is not None or self._closed.is_set() or time.monotonic() < self._next_at:
                return
            thread = threading.Thread(target=self._run, name="ekiden-couchdb-tidies", daemon=True)
            try:
                start_thread(thread)
            except RuntimeError as error:  # no more threads
                logger.warning("no thread can be started that tidies the result store: %s", error)
                self._next_at = time.monotonic() + TIDY_SECONDS
            else:
                self._thread = thread

    def close(self) -> None:
        """End the step in progress. May be called again."""
        self._closed.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(CLOSED_WITHIN_SECONDS)

    def step(self) -> bool:
        """Tidy for a moment; whether there is more to do. Raises what the client raises."""
        more = False
        for store in self._stores:
            if not self._closed.is_set() and self._takes_turn(store):
                deadline = time.monotonic() + STEP_SECONDS
                more = self._delete_ended(store, deadline) or more
                more = self._purge(store, deadline) or more
        return more

    def _run(self) -> None:
        more = False
        try:
            more = self.step()
        except EkidenError:
            # Nobody waits for this, and whoever stores or reads hears of the same trouble.
            more = False
        except BaseException as bug:
            logger.critical("what has expired was not deleted; tried again: %r", bug, exc_info=bug)
        finally:
            with self._lock:
                self._next_at = time.monotonic() + (MORE_SECONDS if more else TIDY_SECONDS * (0.5 + random()))
                self._thread = None

    def _takes_turn(self, store: Store) -> bool:
        """Whether it is for us to tidy this database now. Nobody else will, until our next step is over."""
        path = f"/{store.name}/{_TURN}"
        found = self._client.ask("GET", path, accept={HTTPStatus.NOT_FOUND})
        document: dict[str, Any] = found.body if found.status == HTTPStatus.OK else {}
        if found.status != HTTPStatus.OK and _says_no_database(found.body):
            return False
        now = store.now()
        until = document.get("until")
        is_taken = isinstance(until, int | float) and now < until <= now + 2 * _TURN_SECONDS
        if is_taken and document.get("who") != self._who:
            return False
        turn = {"who": self._who, "until": now + _TURN_SECONDS}
        if "_rev" in document:
            turn["_rev"] = document["_rev"]
        answer = self._client.ask("PUT", path, turn, accept={HTTPStatus.CONFLICT}, harmless=True)
        return answer.status != HTTPStatus.CONFLICT

    def _delete_ended(self, store: Store, deadline: float) -> bool:
        """Delete what has expired; whether there is more."""
        if not self._has_index(store):
            return False
        while not self._closed.is_set():
            ended = _ended(self._client, store)
            for document in ended:
                if document["_id"].startswith("j:"):
                    _delete_members(store, document["_id"])
            store.write([Edit(document | DELETION, None) for document in ended], self._client.deadline())
            if len(ended) < DELETED_AT_ONCE:
                return False
            if time.monotonic() >= deadline:
                return True
        return True

    def _has_index(self, store: Store) -> bool:
        if store.name not in self._indexed:
            self._indexed[store.name] = make_index(self._client, store.name)
            # A join is written once for each of its members; the server would remember a thousand of its revisions.
            path = f"/{store.name}/_revs_limit"
            self._client.ask("PUT", path, REVISIONS_KEPT, accept=range(400, 500), harmless=True)
        return self._indexed[store.name]

    def _purge(self, store: Store, deadline: float) -> bool:
        """Remove tombstones; whether there are more."""
        if store.name not in self._purgers:
            permitted = may_purge(self._client, store.name)
            self._purgers[store.name] = Purger(self._client, store.name) if permitted else None
        purger = self._purgers[store.name]
        if purger is None:
            return False
        delay = CLUSTER_DELAY_SECONDS if self._client.is_cluster() else 0.0
        return purger.step(delay=delay, deadline=deadline)


def make_index(client: Client, database: str) -> bool:
    """Make the index over ``ends`` where it is missing; whether it is there. Raises ``unavailable``."""
    index = {"index": {"fields": ["ends"]}, "ddoc": _DESIGN, "name": _INDEX, "type": "json"}
    try:
        client.ask("POST", f"/{database}/_index", index, harmless=True)
    except client.errors.refused:
        path = f"/{database}/_design/{_DESIGN}"
        return client.ask("GET", path, accept=range(400, 500)).status == HTTPStatus.OK
    return True


def _ended(client: Client, store: Store) -> list[dict[str, Any]]:
    """Ids and revisions of some documents that have expired."""
    wanted = {
        "selector": {"ends": {"$gt": 0, "$lt": int(store.now() * 1000)}},
        "fields": ["_id", "_rev"],
        "limit": DELETED_AT_ONCE,
        "use_index": [_DESIGN, _INDEX],
    }
    answer = client.ask("POST", f"/{store.name}/_find", wanted, harmless=True)
    return [{"_id": each["_id"], "_rev": each["_rev"]} for each in answer.body["docs"]]


def _delete_members(store: Store, join_id: str) -> None:
    """Delete what the members of a join brought. Raises what the client raises."""
    first = members_of(join_id)
    ids = [document["_id"] for document in store.scan(first, first + LAST)]
    store.change(ids, lambda _id, document: None if document is None else DELETION)


def _says_no_database(said: Any) -> bool:
    """Whether a 404 is about the database: nothing was stored yet."""
    return isinstance(said, dict) and said.get("reason") not in {"missing", "deleted"}
