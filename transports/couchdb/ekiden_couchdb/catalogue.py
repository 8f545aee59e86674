"""The catalogue: the one document that says which databases hold messages.

    <prefix>-generations / catalogue

Messages are kept in generations, databases of which the newest takes the new messages. A database is in the catalogue
before any message is in it, and its deletion is in the catalogue before it is deleted; each step is a compare-and-set
of this document, so that of two processes that want to take one, one does.

    OPEN       takes messages: the newest whose time has come takes the new ones
    SEALED     takes no new document any more (a validation function); what it holds is claimed, settled, moved
    DRAINED    sealed and found empty: consumers do not look into it any more
    DROPPED    may be deleted at any moment

In a cluster the document itself may get conflicts; then all branches count, and of two that differ about one database
the one that lets it live longer.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from http import HTTPStatus
from typing import Any, Self

import msgspec

from ekiden_couchdb.client import Client

KIND = "generations"
_DOCUMENT = "catalogue"
_REMEMBERED_NAMES = 200


class Stage(IntEnum):
    """How far a generation has come; they go through it in this order."""

    OPEN = 0
    SEALED = 1
    DRAINED = 2
    DROPPED = 3


class Generation(msgspec.Struct, frozen=True, omit_defaults=True):
    """One database of messages. ``opens`` and ``since`` (when its stage began) are the server's milliseconds."""

    name: str
    opens: int
    stage: int = Stage.OPEN
    since: int = 0

    def at(self, stage: Stage, now: int) -> Self:
        """The same, at another stage from now on."""
        return msgspec.structs.replace(self, stage=int(stage), since=now)


class Catalogue(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the document says. ``generations`` are ordered by age.

    ``gone``: the names of those that were deleted lately. ``tidier``: who tidies, until ``tidier_until``.
    ``longest_lease``: the longest (seconds) that any consumer has given. ``rev`` is not stored in it.
    """

    generations: tuple[Generation, ...] = ()
    gone: tuple[str, ...] = ()
    tidier: str = ""
    tidier_until: int = 0
    longest_lease: float = 0.0
    rev: str = ""

    def current(self, now: int) -> Generation:
        """The one that new messages go to."""
        candidates = [each for each in self.generations if each.stage == Stage.OPEN]
        opened = [each for each in candidates if each.opens <= now]
        return (opened or candidates[:1] or list(self.generations))[-1]

    def readable(self) -> tuple[str, ...]:
        """Those that may hold messages, oldest first."""
        return tuple(each.name for each in self.generations if each.stage <= Stage.SEALED)

    def names(self) -> frozenset[str]:
        """All that are named in it."""
        return frozenset(each.name for each in self.generations)

    def with_generation(self, changed: Generation) -> Self:
        """The same with this generation added, or changed."""
        others = [each for each in self.generations if each.name != changed.name]
        return msgspec.structs.replace(self, generations=_ordered([*others, changed]))

    def without(self, name: str) -> Self:
        """The same with this generation gone."""
        return msgspec.structs.replace(
            self,
            generations=tuple(each for each in self.generations if each.name != name),
            gone=(*self.gone, name)[-_REMEMBERED_NAMES:],
        )

    def merged(self, other: Catalogue) -> Self:
        """Both, where a conflict has made two of it."""
        gone = dict.fromkeys((*self.gone, *other.gone))
        found: dict[str, Generation] = {}
        for each in (*self.generations, *other.generations):
            known = found.get(each.name)
            if each.name not in gone and (known is None or each.stage < known.stage):
                found[each.name] = each
        return msgspec.structs.replace(
            self,
            generations=_ordered(found.values()),
            gone=tuple(gone)[-_REMEMBERED_NAMES:],
            longest_lease=max(self.longest_lease, other.longest_lease),
        )


class CatalogueStore:
    """Reads and writes the catalogue. Raises what the client raises."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.database = client.database(KIND)

    def load(self) -> Catalogue | None:
        """What it says now; None where there is none."""
        query = {"conflicts": "true"}
        answer = self._client.ask("GET", self._path, query=query, accept={HTTPStatus.NOT_FOUND})
        if answer.status == HTTPStatus.NOT_FOUND:
            return None
        catalogue = _decoded(answer.body)
        conflicts = answer.body.get("_conflicts", [])
        for rev in conflicts:
            branch = self._client.ask("GET", self._path, query={"rev": rev}, accept={HTTPStatus.NOT_FOUND})
            if branch.status != HTTPStatus.NOT_FOUND:
                catalogue = catalogue.merged(_decoded(branch.body))
        if conflicts:
            self._end_conflict(catalogue, conflicts)
        return catalogue

    def save(self, catalogue: Catalogue) -> Catalogue | None:
        """Write it over the revision that it was read as (none: there was no catalogue); returns it with the new one.

        None: somebody else was quicker, or too few nodes of a cluster have it to rely on; load it again.
        """
        answer = self._client.ask("PUT", self._path, _encoded(catalogue), accept={HTTPStatus.CONFLICT})
        if answer.status != HTTPStatus.CREATED:
            return None
        return msgspec.structs.replace(catalogue, rev=answer.body["rev"])

    @property
    def _path(self) -> str:
        return f"/{self.database}/{_DOCUMENT}"

    def _end_conflict(self, merged: Catalogue, losers: Iterable[str]) -> None:
        """Store what the branches say together over the visible one; only then end the others."""
        if self.save(merged) is not None:
            for rev in losers:
                self._client.ask("DELETE", self._path, query={"rev": rev}, accept={HTTPStatus.CONFLICT})


def _ordered(generations: Iterable[Generation]) -> tuple[Generation, ...]:
    return tuple(sorted(generations, key=lambda each: (each.opens, each.name)))


def _decoded(document: dict[str, Any]) -> Catalogue:
    catalogue = msgspec.convert(document, Catalogue)
    return msgspec.structs.replace(catalogue, rev=document["_rev"])


def _encoded(catalogue: Catalogue) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(catalogue)
    rev = document.pop("rev", "")
    return document | ({"_rev": rev} if rev else {})
