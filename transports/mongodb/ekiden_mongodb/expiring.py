"""Collections whose documents vanish: the server deletes them by a TTL index some time after the date in ``x``.

That takes up to a minute and more, so every document also says in milliseconds until when it counts, and who reads it
looks there. ``FOREVER`` is a date like any other, and never comes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard, TypeVar

from bson.datetime_ms import DatetimeMS
from pymongo.collection import Collection
from pymongo.errors import OperationFailure

from ekiden_mongodb.client import Client
from ekiden_mongodb.errors import UNAUTHORIZED

Document = dict[str, Any]
Expression = dict[str, Any]

FOREVER = 253_402_214_400_000
"""31 December 9999, in milliseconds."""

NOW: Expression = {"$toLong": "$$NOW"}
"""The server's time in milliseconds, in a pipeline."""

AT_ONCE = 100
"""So many documents are asked for at once: about what a server sends in its first answer."""

Item = TypeVar("Item")

_HAS_ANOTHER = frozenset({85, 86})


class ExpiringCollection:
    """The collection ``<prefix>.<name>``, whose index is made once in a process. For any number of threads."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._name = name
        self._making = threading.Lock()
        self._is_made = False

    def __call__(self) -> Collection[Document]:
        """The collection, durable. To be called inside ``asking``."""
        collection = self._client.collection(self._name, durable=True)
        if not self._is_made:
            with self._making:
                if not self._is_made:
                    _make_index(collection)
                    self._is_made = True
        return collection

    def forget(self) -> None:
        """In a forked child: another thread of the parent's may have held the lock."""
        self._making = threading.Lock()


def _make_index(collection: Collection[Document]) -> None:
    try:
        collection.create_index("x", expireAfterSeconds=0)
    except OperationFailure as error:
        if error.code != UNAUTHORIZED and error.code not in _HAS_ANOTHER:
            raise  # otherwise it is somebody else's to make, and doctor tells


def until(expires: float | None) -> Expression | int:
    """The millisecond ``expires`` seconds from the server's now, in a pipeline; None is for ever."""
    return FOREVER if expires is None else {"$min": [FOREVER, {"$add": [NOW, _milliseconds(expires)]}]}


def end(expires: float | None, now: int) -> int:
    """The same, where ``now`` is known."""
    return FOREVER if expires is None else min(FOREVER, now + _milliseconds(expires))


WHOLE = ["int", "long"]
"""The types of whole numbers, as ``$type`` calls them."""


def is_whole(number: object) -> TypeGuard[int]:
    """Whether a field holds a whole number."""
    return isinstance(number, int) and not isinstance(number, bool)


def date(milliseconds: int) -> DatetimeMS:
    """A date for the TTL index."""
    return DatetimeMS(milliseconds)


def _milliseconds(expires: float) -> int:
    return max(1, int(expires * 1000)) if expires < FOREVER / 1000 else FOREVER


def slices(items: Sequence[Item], most: int) -> Iterator[Sequence[Item]]:
    """``items`` in parts of ``most``."""
    return (items[start : start + most] for start in range(0, len(items), most))
