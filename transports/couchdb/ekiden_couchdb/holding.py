"""What one consumer holds: each message with the revision that is ours, and until when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from ekiden.message import Delivery, Message

from ekiden_couchdb.documents import Document, attempts_of


class Tag(msgspec.Struct, frozen=True):
    """Of one hand-out: the document, and the token that was written into it."""

    database: str
    id: str
    token: str


class Held(msgspec.Struct):
    """A message that this consumer holds.

    ``document`` is as it was written, without its revision ``rev``; ``ends``: when the lease ends on the monotonic
    clock. ``may_be_deleted``: we have tried to delete it, and how that ended is not known.
    """

    database: str
    document: Document
    rev: str
    message: Message
    ends: float
    may_be_deleted: bool = False

    @property
    def id(self) -> str:
        """The document's id."""
        return str(self.document["_id"])

    @property
    def tag(self) -> Tag:
        """Of this hand-out."""
        return Tag(self.database, self.id, str(self.document["token"]))


class Holdings:
    """Of one consumer. ``receive`` adds, the thread that settles removes; each in single steps."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Held] = {}

    def add(self, won: Iterable[Held]) -> list[Delivery]:
        """These are held from now on. Returns them as deliveries."""
        deliveries: list[Delivery] = []
        for held in won:
            self._held[held.database, held.id] = held
            deliveries.append(Delivery(held.message, held.tag, attempts_of(held.document)))
        return deliveries

    def find(self, delivery: Delivery) -> Held | None:
        """What is held of ``delivery``; None where it is not, or not in this hand-out."""
        tag: Tag = delivery.tag
        held = self._held.get((tag.database, tag.id))
        return held if held is not None and held.tag == tag else None

    def drop(self, held: Held) -> None:
        """This one is not held any more."""
        self._held.pop((held.database, held.id), None)

    def all(self) -> Sequence[Held]:
        """All of them."""
        return list(self._held.values())

    def in_force(self, now: float) -> list[Held]:
        """Those whose leases have not ended at ``now`` (monotonic)."""
        return [held for held in self.all() if held.ends > now]
