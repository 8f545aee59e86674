"""Rotation: new messages go to a new database, and the old one is sealed, drained and dropped with its tombstones.

What keeps every message, whoever is stopped for however long between two of its steps:

- A publisher writes where it last knew the current generation to be. Until that is sealed the message is read from
  there, since consumers read all; afterwards the database refuses it, or is gone; both make the publisher look again.
- A new generation is announced some time before it takes messages, so that consumers know it first.
- It is sealed by a validation function, and a document that must be refused proves that this works.
- It is found empty after the last write that could have slipped past the seal has ended, and once more before it goes.
- What stays long in a sealed one is moved (``moving``), so that each comes to its end.
- Its name has the time in it and is never used again; nobody but whoever has just chosen a name creates it.
"""

from __future__ import annotations

import os
import time
from http import HTTPStatus
from typing import Any

import msgspec

from ekiden_couchdb.catalogue import MESSAGES, Catalogue, CatalogueStore, Generation, Stage
from ekiden_couchdb.client import BulkOutcome, Client
from ekiden_couchdb.purging import is_whole

SEAL = "_design/ekiden-sealed"

_SEALED = """function (document, before) {
  if ((!before || before._deleted) && !document._deleted && document._id.indexOf("~~") !== 0) {
    throw({forbidden: 'this database of messages is sealed; new ones go to the next'});
  }
}"""
_REVISIONS_KEPT = 20
_MOST_GENERATIONS = 8
_FEW_ROWS = 20
_UPDATES_OF_ONE_TOMBSTONE = 2.5  # a message and its note: stored, the message claimed, both deleted


class Limits(msgspec.Struct, frozen=True):
    """When which step is taken; all but the first in seconds.

    ``rotate_after``: so many tombstones make a database full, and at least twice as many as there are documents in it:
    so each message is moved a few times at the most. ``known_after``: by then every process has read the catalogue
    again. ``announced``: so long a new generation is known before it takes messages, and so long the one before is
    known not to take them before it is sealed. ``drained_after``: from the seal to the first look whether it is empty.
    ``moved_after``: from the seal until what is left in it is moved. ``dropped_after``: from the look that found it
    empty to the last one. In a cluster these two looks come ``in_cluster`` times as late. ``tidied_every``: how often
    each process looks whether there is something to do. ``evidence``: so long a cluster keeps a tombstone at the least.

    A node of CouchDB may go by validation functions that are 67 seconds old, where it did not hear of the new ones.
    """

    rotate_after: int = 20_000
    known_after: float = 5.0
    announced: float = 15.0
    drained_after: float = 15.0
    moved_after: float = 600.0
    dropped_after: float = 150.0
    in_cluster: float = 5.0
    tidied_every: float = 10.0
    evidence: float = 300.0


class Rotation:
    """Takes the steps; whoever calls is the only one that tidies. Raises what the client raises."""

    def __init__(self, client: Client, store: CatalogueStore, limits: Limits) -> None:
        self._client = client
        self._store = store
        self._limits = limits

    def advance(self, catalogue: Catalogue, now: int) -> Catalogue:
        """Take the steps that are due for the generations that take no new messages; returns what is then stored."""
        current = catalogue.current(now)
        for generation in catalogue.generations:
            if generation.opens >= current.opens:
                break
            changed = self._advanced(catalogue, generation, current, now)
            if changed is None:
                continue
            stored = self._store.save(changed)
            if stored is None:
                break  # somebody else has changed it; the next round sees how
            catalogue = stored
        return catalogue

    def is_full(self, catalogue: Catalogue) -> bool:
        """Whether it is time for the next generation. There are never many: one that is held up holds up the others."""
        newest = catalogue.generations[-1]
        if newest.stage != Stage.OPEN:
            return True
        if len(catalogue.generations) >= _MOST_GENERATIONS:
            return False
        info = self._client.ask("GET", f"/{newest.name}", accept={HTTPStatus.NOT_FOUND}).body
        return _tombstones(info) >= max(self._limits.rotate_after, 2 * int(info.get("doc_count", 0)))

    def overdue(self, catalogue: Catalogue, now: int) -> list[str]:
        """The generations out of which what is left is to be moved."""
        sealed = [each for each in catalogue.generations if each.stage == Stage.SEALED]
        return [each.name for each in sealed if now - each.since >= _milliseconds(self._limits.moved_after)]

    def begin_next(self, catalogue: Catalogue, now: int) -> Catalogue:
        """Create a generation and announce it."""
        name = create_generation(self._client, like=catalogue.generations[-1].name)
        opens = now + _milliseconds(self._limits.announced)
        stored = self._store.save(catalogue.with_generation(Generation(name, opens)))
        if stored is not None:
            return stored
        found = self._store.load()
        if found is None or name not in found.names():
            self._drop(name)  # nobody has heard of it
        return found or catalogue

    def adopt(self, catalogue: Catalogue) -> Catalogue:
        """Take databases into the catalogue that are there and not in it: of a process that died creating one."""
        changed = catalogue
        for name in existing_generations(self._client) or ():
            if name not in catalogue.names() and name not in catalogue.gone:
                changed = changed.with_generation(Generation(name, opens=0))
        return catalogue if changed is catalogue else self._store.save(changed) or catalogue

    def _advanced(
        self, catalogue: Catalogue, generation: Generation, current: Generation, now: int
    ) -> Catalogue | None:
        """The catalogue after the next step of ``generation``; None while it has none to take."""
        waited = (now - generation.since) / 1000
        match Stage(generation.stage):
            case Stage.OPEN:
                if now - current.opens >= _milliseconds(self._limits.announced) and self._seal(generation.name):
                    return catalogue.with_generation(generation.at(Stage.SEALED, now))
            case Stage.SEALED:
                if waited >= self._limits.drained_after * self._slowness():
                    return self._drained(catalogue, generation, now)
            case Stage.DRAINED:
                # The oldest first: what is moved out of an older one must find where it was moved to.
                if generation == catalogue.generations[0] and waited >= self._limits.dropped_after * self._slowness():
                    stage = Stage.DROPPED if self._may_go(generation.name) else Stage.SEALED
                    return catalogue.with_generation(generation.at(stage, now))
            case Stage.DROPPED:
                self._drop(generation.name)
                return catalogue.without(generation.name)
        return None

    def _drained(self, catalogue: Catalogue, generation: Generation, now: int) -> Catalogue | None:
        exists, is_empty = self._look(generation.name)
        if not exists:
            return catalogue.without(generation.name)
        if is_empty:
            return catalogue.with_generation(generation.at(Stage.DRAINED, now))
        return None

    def _may_go(self, name: str) -> bool:
        """Whether nothing is in it, and nothing can come to it any more."""
        if self._client.is_cluster() and not is_whole(self._client):
            return False
        exists, is_empty = self._look(name)
        return not exists or (is_empty and self._refuses_documents(name))

    def _slowness(self) -> float:
        return self._limits.in_cluster if self._client.is_cluster() else 1.0

    def _look(self, name: str) -> tuple[bool, bool]:
        """Whether the database exists, and whether it holds no message."""
        query = {"limit": str(_FEW_ROWS), "endkey": '"~"'}  # notes, and what consumers write of themselves, begin so
        answer = self._client.ask("GET", f"/{name}/_all_docs", query=query, accept={HTTPStatus.NOT_FOUND})
        if answer.status == HTTPStatus.NOT_FOUND:
            return False, True
        return True, all(str(row.get("id")).startswith("_") for row in self._client.rows(answer))

    def _seal(self, name: str) -> bool:
        """Let the database refuse new documents. Whether it does now, or is not there at all."""
        design = {"language": "javascript", "validate_doc_update": _SEALED}
        settled = {HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND}
        answer = self._client.ask("PUT", f"/{name}/{SEAL}", design, accept=settled, harmless=True)
        if answer.status == HTTPStatus.NOT_FOUND:
            return True
        if answer.status == HTTPStatus.ACCEPTED:
            return False
        try:
            is_sealed = self._refuses_documents(name)
        except self._client.errors.unavailable:
            # Where no function can be run (no JavaScript there), nothing could be settled in it any more.
            self._unseal(name)
            raise
        return is_sealed

    def _refuses_documents(self, name: str) -> bool:
        probe = {"_id": f"probe-{os.urandom(8).hex()}"}
        (answer,) = self._client.bulk(name, [probe])
        match answer.outcome:
            case BulkOutcome.FORBIDDEN:
                return True
            case BulkOutcome.OK | BulkOutcome.ACCEPTED:
                self._client.bulk(name, [probe | {"_rev": answer.rev, "_deleted": True}])
                return False
            case _:
                raise self._client.errors.unavailable(
                    f"{self._client.place}: the database {name!r} could not be sealed: {answer.reason}."
                )

    def _unseal(self, name: str) -> None:
        design = self._client.ask("GET", f"/{name}/{SEAL}", accept={HTTPStatus.NOT_FOUND})
        if design.status != HTTPStatus.NOT_FOUND:
            query = {"rev": design.body["_rev"]}
            self._client.ask("DELETE", f"/{name}/{SEAL}", query=query, accept={HTTPStatus.CONFLICT})

    def _drop(self, name: str) -> None:
        self._client.ask("DELETE", f"/{name}", accept={HTTPStatus.NOT_FOUND}, harmless=True)


def create_generation(client: Client, *, like: str | None) -> str:
    """Create a database for messages under a name of its own, for whom ``like`` is for. Raises ``refused``."""
    now = time.time_ns() // 1_000_000
    stamp = time.strftime("%Y%m%d%H%M%S", time.gmtime(now // 1000)) + f"{now % 1000:03d}"
    name = f"{client.database(MESSAGES)}-{stamp}-{os.urandom(3).hex()}"
    create_database(client, name, like=like)
    client.ask("PUT", f"/{name}/_revs_limit", _REVISIONS_KEPT, accept=range(400, 600))
    return name


def create_database(client: Client, name: str, *, like: str | None) -> None:
    """Create a database where it is missing, for the users that ``like`` is for. Raises ``refused``."""
    query = {"q": str(client.options.q)} | ({} if client.options.n is None else {"n": str(client.options.n)})
    exists = HTTPStatus.PRECONDITION_FAILED
    answer = client.ask("PUT", f"/{name}", query=query, accept={exists}, harmless=True)
    if like is None or answer.status == exists:
        return
    security = client.ask("GET", f"/{like}/_security", accept={HTTPStatus.NOT_FOUND}).body
    if isinstance(security, dict) and ("members" in security or "admins" in security):
        client.ask("PUT", f"/{name}/_security", security)


def existing_generations(client: Client) -> list[str] | None:
    """The databases of messages that are there, by age; None where this user may not list databases."""
    kind = client.database(MESSAGES)
    query = {"startkey": f'"{kind}"', "endkey": f'"{kind}.."'}
    answer = client.ask("GET", "/_all_dbs", query=query, accept=range(400, 500))
    if not isinstance(answer.body, list):
        return None
    return sorted(name for name in answer.body if name == kind or _is_generation(name.removeprefix(f"{kind}-")))


def _is_generation(stamp: str) -> bool:
    moment, _, number = stamp.partition("-")
    return len(moment) == len("20260102030405678") and moment.isdigit() and len(number) == len("123abc")


def _tombstones(info: dict[str, Any]) -> int:
    """How many a database has. Where it does not count them: by how many updates it has had."""
    if "doc_del_count" in info:
        return int(info["doc_del_count"])
    updates = int(str(info.get("update_seq", 0)).partition("-")[0])
    return int((updates - int(info.get("doc_count", 0))) / _UPDATES_OF_ONE_TOMBSTONE)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
