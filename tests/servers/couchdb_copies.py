"""The databases of the cluster that ``couchdb_cluster`` plays: revision trees, in several copies that may differ.

Each copy checks a write by itself and keeps what it accepts; copies meet when ``replicate`` is called, as the nodes of
a cluster do a little later. What a write is answered follows from how many copies accepted it:

    as many as the quorum    ok
    fewer                    accepted: it is stored somewhere, and nobody may rely on it
    none                     conflict, or forbidden by the validation function
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

QUORUM = 2
MOST_PURGED_IDS, MOST_PURGED_REVISIONS = 100, 1000
DESIGN = "_design/"
ENFORCED, IGNORED, BROKEN = "enforced", "ignored", "broken"


class Unacceptable(Exception):
    """A request that is answered with 400; the text is the reason."""


@dataclass(frozen=True)
class Leaf:
    """The end of one branch: its revision, all revisions before it (the newest first), and what it says."""

    rev: str
    path: tuple[str, ...]
    body: dict[str, Any]
    deleted: bool

    def rank(self) -> tuple[bool, int, str]:
        """By which the visible one is chosen: living before deleted, then the longest branch, then the digest."""
        generation, _, digest = self.rev.partition("-")
        return not self.deleted, int(generation), digest


@dataclass
class Copy:
    """One copy of one database: the leaves of every document, and when (which ``sequence``) each changed last."""

    documents: dict[str, dict[str, Leaf]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    sequence: int = 0
    purges_done: int = 0
    designs: set[str] = field(default_factory=set)

    def winner(self, id_: str) -> Leaf | None:
        """What is visible of a document, a deletion as well; None where nothing was ever written, or all was purged."""
        return visible(self.documents.get(id_, {}).values())

    def write(self, id_: str, body: dict[str, Any], rev: str | None, *, deleted: bool) -> str | None:
        """The new revision; None is a conflict."""
        leaves = self.documents.get(id_, {})
        if rev is not None:
            parent = leaves.get(rev)
            if parent is None:
                return None
        else:
            parent = visible(leaves.values())
            if parent is not None and not parent.deleted:
                return None
        new = child(parent, body, deleted=deleted)
        if parent is not None:
            del leaves[parent.rev]
        self._put(id_, new)
        return new.rev

    def take_over(self, id_: str, leaf: Leaf) -> None:
        """Add a leaf of another copy."""
        leaves = self.documents.get(id_, {})
        if leaf.rev in leaves or any(leaf.rev in mine.path for mine in leaves.values()):
            return
        for older in [rev for rev in leaves if rev in leaf.path]:
            del leaves[older]
        self._put(id_, leaf)

    def purge(self, id_: str, revisions: Collection[str]) -> list[str]:
        """Forget these leaves, and the document when none is left. Returns those that were there."""
        leaves = self.documents.get(id_, {})
        found = [rev for rev in revisions if rev in leaves]
        for rev in found:
            del leaves[rev]
        if id_ in self.documents and not leaves:
            del self.documents[id_]
            self.changed.pop(id_, None)
        return found

    def _put(self, id_: str, leaf: Leaf) -> None:
        self.documents.setdefault(id_, {})[leaf.rev] = leaf
        if id_.startswith(DESIGN):
            self.designs.add(id_)
        self.sequence += 1
        self.changed.pop(id_, None)
        self.changed[id_] = self.sequence


class Database:
    """One database in ``count`` copies. Callers say which of them (by number) a request reaches.

    ``validation``: whether validation functions are ENFORCED, IGNORED, or BROKEN: there is nothing that can run them.
    """

    def __init__(self, count: int, validation: str = ENFORCED) -> None:
        self.copies = [Copy() for _ in range(count)]
        self.validation = validation
        self.security: dict[str, Any] = {}
        self.purges: list[dict[str, list[str]]] = []
        self.deleted_ever = 0

    def write(self, document: dict[str, Any], reaches: Collection[int]) -> dict[str, Any]:
        """What ``_bulk_docs`` answers for one document that arrives at these copies."""
        body = _content(document)
        id_, deleted = document["_id"], bool(document.get("_deleted"))
        revisions: list[str] = []
        refused = False
        if (
            self.validation == BROKEN
            and not id_.startswith(DESIGN)
            and any(is_sealed(self.copies[number]) for number in reaches)
        ):
            return {"id": id_, "error": "unknown_query_language", "reason": "javascript"}
        for number in reaches:
            copy = self.copies[number]
            winner = copy.winner(id_)
            is_new = winner is None or winner.deleted
            if is_new and not deleted and not id_.startswith((DESIGN, "~~")) and self._refuses_new(copy):
                refused = True
                continue
            rev = copy.write(id_, body, document.get("_rev"), deleted=deleted)
            if rev is not None:
                revisions.append(rev)
        if not revisions:
            if refused:
                return {"id": id_, "error": "forbidden", "reason": "sealed"}
            return {"id": id_, "error": "conflict", "reason": "Document update conflict."}
        self.deleted_ever += deleted
        best = max(set(revisions), key=revisions.count)
        answer = {"ok": True, "id": id_, "rev": best}
        if revisions.count(best) < min(QUORUM, len(self.copies)):
            answer["accepted"] = True
        return answer

    def replicated(self, document: dict[str, Any], reaches: Collection[int]) -> dict[str, Any] | None:
        """Store one document as replication does, under the revision that it has. The error, if there is one."""
        id_, rev = document["_id"], document["_rev"]
        body = _content(document)
        if any(self._refuses_new(self.copies[number]) for number in reaches):
            return {"id": id_, "rev": rev, "error": "forbidden", "reason": "sealed"}
        for number in reaches:
            self.copies[number].take_over(id_, Leaf(rev, _path(document), body, bool(document.get("_deleted"))))
        return None

    def leaves(self, id_: str, seen_by: Iterable[int]) -> list[Leaf]:
        """All leaves of a document that these copies know, the visible one first."""
        met = Copy()
        for number in seen_by:
            for leaf in self.copies[number].documents.get(id_, {}).values():
                met.take_over(id_, leaf)
        return sorted(met.documents.get(id_, {}).values(), key=Leaf.rank, reverse=True)

    def purge(self, wanted: dict[str, list[str]], reaches: Collection[int]) -> dict[str, list[str]]:
        """Purge at these copies; the others hear of it when they meet. Raises Unacceptable for too much at once."""
        if len(wanted) > MOST_PURGED_IDS:
            raise Unacceptable("Exceeded maximum number of documents.")
        if sum(map(len, wanted.values())) > MOST_PURGED_REVISIONS:
            raise Unacceptable("Exceeded maximum number of revisions.")
        self.purges.append(wanted)
        purged: dict[str, list[str]] = {id_: [] for id_ in wanted}
        for number in reaches:
            self._catch_up(self.copies[number], purged)
        return purged

    def replicate(self, between: Collection[int]) -> None:
        """These copies meet: afterwards each has done all purges and holds every leaf of the others."""
        for number in between:
            self._catch_up(self.copies[number], {})
        for source in between:
            for id_, leaves in list(self.copies[source].documents.items()):
                for leaf in list(leaves.values()):
                    for target in between:
                        if target != source:
                            self.copies[target].take_over(id_, leaf)

    def tell(self, source: int, target: int) -> None:
        """One copy tells another all that it holds."""
        for id_, leaves in list(self.copies[source].documents.items()):
            for leaf in list(leaves.values()):
                self.copies[target].take_over(id_, leaf)

    def _refuses_new(self, copy: Copy) -> bool:
        return self.validation == ENFORCED and is_sealed(copy)

    def _catch_up(self, copy: Copy, purged: dict[str, list[str]]) -> None:
        for wanted in self.purges[copy.purges_done :]:
            for id_, revisions in wanted.items():
                for rev in copy.purge(id_, revisions):
                    if rev not in purged.setdefault(id_, []):
                        purged[id_].append(rev)
        copy.purges_done = len(self.purges)


def child(parent: Leaf | None, body: dict[str, Any], *, deleted: bool) -> Leaf:
    """The leaf that a write makes: the same parent and content give the same revision, as in CouchDB."""
    before = () if parent is None else (parent.rev, *parent.path)
    generation = 1 if parent is None else int(parent.rev.partition("-")[0]) + 1
    text = json.dumps([before[:1], body, deleted], sort_keys=True)
    return Leaf(f"{generation}-{hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()}", before, body, deleted)


def visible(leaves: Iterable[Leaf]) -> Leaf | None:
    """The one of these leaves that readers see."""
    return max(leaves, key=Leaf.rank, default=None)


def is_sealed(copy: Copy) -> bool:
    """Whether a validation function is in force. All are taken for ours, which forbids new ones but for slots (~~)."""
    designs = map(copy.winner, copy.designs)
    return any(leaf is not None and not leaf.deleted and "validate_doc_update" in leaf.body for leaf in designs)


def living(copy: Copy) -> Iterator[tuple[str, Leaf]]:
    """Every document that is not deleted, with its visible leaf."""
    for id_ in copy.documents:
        winner = copy.winner(id_)
        if winner is not None and not winner.deleted:
            yield id_, winner


def _content(document: dict[str, Any]) -> dict[str, Any]:
    """What a document says, with its attachments."""
    return {key: value for key, value in document.items() if not key.startswith("_") or key == "_attachments"}


def _path(document: dict[str, Any]) -> tuple[str, ...]:
    """The revisions before the one of a replicated document, as far as it names them, the newest first."""
    revisions = document.get("_revisions", {"start": 0, "ids": []})
    return tuple(f"{revisions['start'] - number}-{digest}" for number, digest in enumerate(revisions["ids"]))[1:]
