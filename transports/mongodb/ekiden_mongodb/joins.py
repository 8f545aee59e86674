"""Joins: members of a group arrive, each once, and everybody is told when they are complete.

    <prefix>.joins
    _id  the join's id
    m    the members that have arrived              n    how many they are
    r    until when all their outcomes count at least
    u    until when it counts, in milliseconds      x    the same as a date

    <prefix>.outcomes
    _id  "LENGTH:JOIN:MEMBER"; LENGTH is that of the join's id      b    the outcome
    u    until when it counts                                       x    the same as a date

The outcomes are apart because together they may be larger than a document. An outcome is stored before its member has
arrived, so whoever completes the join finds all of them. They live twice as long as a member asks for, and where
members go on arriving for longer than that they are given more time. So the id of a join is not to be used again soon.
A join, or an outcome, that somebody else has written in another form counts as none, and is replaced.
"""

from __future__ import annotations

from typing import NamedTuple

from bson import Binary
from ekiden.errors import BackendError, BackendRefused
from ekiden.results import Joined
from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from ekiden_mongodb.client import Client
from ekiden_mongodb.expiring import FOREVER, WHOLE, Document, ExpiringCollection, date, end


class Joins:
    """The joins of one backend."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._joins = ExpiringCollection(client, "joins")
        self._outcomes = ExpiringCollection(client, "outcomes")

    def join(self, join_id: str, member: str, outcome: bytes, *, size: int, expires: float | None) -> Joined:
        """A member arrives, as ``Backend.join`` says. Raises what the client raises."""
        with self._client.asking():
            now = int(self._client.server_time() * 1000)
            times = _Times(now, end(expires, now), end(None if expires is None else expires * 2, now))
            self._store(join_id, member, outcome, times)
            join = None
            while join is None:  # it may come to be, or end, between two of these
                join = (
                    self._arrive(join_id, member, times)
                    or self._come_again(join_id, member, times)
                    or self._create(join_id, member, times)
                )
            if join["r"] < join["u"]:
                self._keep_longer(join_id, times)
            if join["n"] < size:
                return Joined(join["n"], complete=False)
            return Joined(join["n"], complete=True, outcomes=self._all(join_id, join["n"]))

    def forget(self) -> None:
        """In a forked child: drop what is the parent's."""
        self._joins.forget()
        self._outcomes.forget()

    def _store(self, join_id: str, member: str, outcome: bytes, times: _Times) -> None:
        """Store an outcome, unless there is one already; in any case it is kept from now on."""
        outcome_id, stored = f"{_start(join_id)}{member}", Binary(outcome)
        fields: Document = {"b": stored, "u": times.longer, "x": date(times.longer)}
        try:
            self._outcomes().insert_one({"_id": outcome_id, **fields})
        except DuplicateKeyError:
            ends = {"$cond": [{"$in": [{"$type": "$u"}, WHOLE]}, "$u", 0]}
            is_outcome = {"$and": [{"$gt": [ends, times.now]}, {"$eq": [{"$type": "$b"}, "binData"]}]}
            kept = {"$cond": [is_outcome, "$b", stored]}
            latest = {"$min": [FOREVER, {"$max": [ends, times.longer]}]}
            fields = {"b": kept, "u": latest, "x": {"$toDate": latest}}
            self._outcomes().update_one({"_id": outcome_id}, [{"$set": fields}], upsert=True)

    def _arrive(self, join_id: str, member: str, times: _Times) -> Document | None:
        """The join once this member has arrived; None when it had before, or there is no join."""
        return self._joins().find_one_and_update(
            {"_id": join_id, **_counting(times), "m": {"$type": "array", "$ne": member}},
            {"$push": {"m": member}, "$inc": {"n": 1}, **_kept(times)},
            projection=_COUNTED,
            return_document=ReturnDocument.AFTER,
        )

    def _come_again(self, join_id: str, member: str, times: _Times) -> Document | None:
        """The join, in which this member has arrived before; None when it has not."""
        return self._joins().find_one_and_update(
            {"_id": join_id, **_counting(times), "m": {"$type": "array", "$eq": member}},
            _kept(times),
            projection=_COUNTED,
            return_document=ReturnDocument.AFTER,
        )

    def _create(self, join_id: str, member: str, times: _Times) -> Document | None:
        """The join with its first member; None when somebody else has just made it."""
        join = {"m": [member], "n": 1, "r": times.longer, "u": times.end, "x": date(times.end)}
        try:
            other = {"$nor": [{**_counting(times), "m": {"$type": "array"}}]}
            self._joins().update_one({"_id": join_id, **other}, {"$set": join}, upsert=True)
        except DuplicateKeyError:
            return None
        return join

    def _keep_longer(self, join_id: str, times: _Times) -> None:
        """Some outcomes would not count as long as the join: give all of them more time."""
        longer = {"u": times.longer, "x": date(times.longer)}
        self._outcomes().update_many(_outcomes_of(join_id), {"$max": longer})
        self._joins().update_one({"_id": join_id}, {"$set": {"r": times.longer}})

    def _all(self, join_id: str, count: int) -> dict[str, bytes]:
        skipped = len(_start(join_id))
        found: dict[str, bytes] = {}
        for each in self._outcomes().find(_outcomes_of(join_id)):
            if not isinstance(each.get("b"), bytes):
                raise BackendRefused(f"The join {join_id!r} cannot be completed: the outcome {each['_id']!r} is none.")
            found[str(each["_id"])[skipped:]] = bytes(each["b"])
        if len(found) < count:
            raise BackendError(
                f"The join {join_id!r} is complete, but only {len(found)} of {count} outcomes are there."
            )
        return found


class _Times(NamedTuple):
    """In milliseconds: the server's now, and until when a join and an outcome count that are stored now."""

    now: int
    end: int
    longer: int


_COUNTED = {"n": 1, "r": 1, "u": 1}


def _counting(times: _Times) -> Document:
    """The condition for a join that counts, but for its members."""
    whole = {"$type": WHOLE}
    return {"u": {"$gt": times.now, **whole}, "n": whole, "r": whole}


def _kept(times: _Times) -> Document:
    return {"$min": {"r": times.longer}, "$set": {"u": times.end, "x": date(times.end)}}


def _start(join_id: str) -> str:
    """How the ids of all outcomes of a join begin, and of no other's."""
    return f"{len(join_id)}:{join_id}:"


def _outcomes_of(join_id: str) -> Document:
    start = _start(join_id)
    return {"_id": {"$gte": start, "$lt": f"{start[:-1]};"}}
