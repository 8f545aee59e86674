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

import re
from collections.abc import Iterable
from enum import IntEnum
from http import HTTPStatus
from typing import Any, Self

import msgspec
from ekiden.loggers import safe_logger

from ekiden_couchdb.client import BulkOutcome, Client

logger = safe_logger(__name__)

FORMAT = 1
KIND = "generations"
MESSAGES = "messages"
"""What the databases of messages are called, behind the prefix."""
_DOCUMENT = "catalogue"
_REMEMBERED_NAMES = 200
_NAME = re.compile(r"[a-z0-9_$()+-]*")


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
    """Reads and writes the catalogue. Raises what the client raises.

    What cannot be read is as if there were none: it is copied aside, and written over by the next ``save``.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._unreadable = ""  # the revision of one
        self.database = client.database(KIND)

    def load(self) -> Catalogue | None:
        """What it says now; None where there is none."""
        query = {"conflicts": "true"}
        answer = self._client.ask("GET", self._path, query=query, accept={HTTPStatus.NOT_FOUND})
        if answer.status == HTTPStatus.NOT_FOUND:
            return None
        catalogue = self._decoded(answer.body)
        conflicts = [str(rev) for rev in answer.body.get("_conflicts", [])]
        for rev in conflicts:
            branch = self._client.ask("GET", self._path, query={"rev": rev}, accept={HTTPStatus.NOT_FOUND})
            if branch.status != HTTPStatus.NOT_FOUND and (other := self._decoded(branch.body)) is not None:
                rev = str(answer.body["_rev"])  # whatever is written goes over the visible branch
                catalogue = msgspec.structs.replace(other, rev=rev) if catalogue is None else catalogue.merged(other)
        if catalogue is None:
            self._set_aside(answer.body)
            return None
        if conflicts:
            self._end_conflict(catalogue, conflicts)
        return catalogue

    def save(self, catalogue: Catalogue) -> Catalogue | None:
        """Write it over the revision that it was read as (none: there was no catalogue); returns it with the new one.

        None: somebody else was quicker, or too few nodes of a cluster have it to rely on; load it again.
        """
        document = _encoded(catalogue)
        if not catalogue.rev and self._unreadable:
            document["_rev"] = self._unreadable
        (answer,) = self._client.bulk(self.database, [document])
        match answer.outcome:
            case BulkOutcome.OK:
                self._unreadable = ""
                return msgspec.structs.replace(catalogue, rev=answer.rev)
            case BulkOutcome.ACCEPTED | BulkOutcome.CONFLICT:
                return None
            case BulkOutcome.FORBIDDEN:
                raise self._client.errors.refused(
                    f"{self._client.place}: {self.database} does not take the catalogue ({answer.reason})."
                )
            case BulkOutcome.ERROR:
                raise self._client.errors.unavailable(
                    f"{self._client.place}: the catalogue could not be stored in {self.database} ({answer.reason})."
                )

    @property
    def _path(self) -> str:
        return f"/{self.database}/{_DOCUMENT}"

    def _decoded(self, document: dict[str, Any]) -> Catalogue | None:
        """What a document says; None where it cannot be read. Raises ``refused`` for that of a later version."""
        written = document.get("format", FORMAT)
        if isinstance(written, int) and written > FORMAT:
            raise self._client.errors.refused(
                f"{self._client.place}: the catalogue in {self.database} is of a later version of ekiden: use that one."
            )
        try:
            catalogue = msgspec.convert(document, Catalogue)
        except msgspec.ValidationError:
            return None
        known = tuple(each for each in map(_sane, catalogue.generations) if is_generation(self._client, each.name))
        return msgspec.structs.replace(catalogue, generations=known, rev=document["_rev"]) if known else None

    def _set_aside(self, document: dict[str, Any]) -> None:
        """Copy it to where it is in nobody's way, and say so, once for each revision."""
        rev = str(document["_rev"])
        if rev == self._unreadable:
            return
        copy = {name: value for name, value in document.items() if not name.startswith("_")}
        self._client.bulk(self.database, [{**copy, "_id": f"{_DOCUMENT}-unreadable-{rev}"}])
        self._unreadable = rev
        logger.error(
            "%s: the catalogue cannot be read, so it is set aside as %s-unreadable-%s, and made anew of the databases "
            "that are there",
            self.database,
            _DOCUMENT,
            rev,
        )

    def _end_conflict(self, merged: Catalogue, losers: Iterable[str]) -> None:
        """Store what the branches say together over the visible one; only then end the others."""
        if self.save(merged) is not None:
            for rev in losers:
                self._client.ask("DELETE", self._path, query={"rev": rev}, accept={HTTPStatus.CONFLICT})


def is_generation(client: Client, name: str) -> bool:
    """Whether a database of this name may be one of ours for messages: what is not is neither read nor deleted."""
    plain = client.database(MESSAGES)
    return name == plain or (name.startswith(f"{plain}-") and bool(_NAME.fullmatch(name.removeprefix(plain))))


def _sane(generation: Generation) -> Generation:
    """The same; at a stage that is none it is read, and never deleted."""
    is_known = any(generation.stage == stage for stage in Stage)
    return generation if is_known else msgspec.structs.replace(generation, stage=int(Stage.OPEN))


def _ordered(generations: Iterable[Generation]) -> tuple[Generation, ...]:
    return tuple(sorted(generations, key=lambda each: (each.opens, each.name)))


def _encoded(catalogue: Catalogue) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(catalogue)
    rev = document.pop("rev", "")
    return {"_id": _DOCUMENT, **document} | ({"_rev": rev} if rev else {})
