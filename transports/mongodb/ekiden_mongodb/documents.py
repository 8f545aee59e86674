"""A message as a document, and the collection that holds all of them.

    _id   <queue> NUL <id of the message>, so that an id is taken once in a queue
    q     queue
    s     0 waiting, 1 leased
    p     9 - priority: 0 is the most urgent
    v     date: when it may be handed out (s 0), or when its lease ends (s 1); by the server's clock
    w     date: what v was before it was leased, and is again when it is given back
    o     when it was published, in nanoseconds, made unique in its batch: the order among those of one v
    n     how often it was handed out and not released
    t     the claim that holds it: <consumer's name> NUL <random>; only while it is leased
    b     body          h  headers as JSON, if there are any          d  due, as it was given, if it was
    x     date: when it vanishes; only in queues named reply.*

What somebody else has written there is looked at where it could do harm: an update takes a field that is of another
type for one that is not there, and ``message_of`` says of a document that it is no message.

Two indexes: {q, s, p, v, o, _id}, by which everything is found, and {x}, by which the server lets things vanish. All
that is asked by the first one is bounded on q, s, p and v, so what is delayed, leased or dead costs a claim nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeGuard, TypeVar

import msgspec
from bson.datetime_ms import DatetimeMS
from ekiden.errors import BrokerRefused
from ekiden.message import HIGHEST_PRIORITY, HeaderValue, Message, unsendable
from pymongo import IndexModel
from pymongo.collection import Collection
from pymongo.errors import OperationFailure

from ekiden_mongodb.client import LARGEST_DOCUMENT, Client
from ekiden_mongodb.errors import UNAUTHORIZED

MESSAGES, REPLIES = "messages", "replies"
"""The names of the collections, behind the prefix. ``replies`` says which queues named reply.* there are."""

WAITING, LEASED = 0, 1
CLAIM_INDEX = [("q", 1), ("s", 1), ("p", 1), ("v", 1), ("o", 1), ("_id", 1)]
ALL_PRIORITIES = {"$gte": 0, "$lte": HIGHEST_PRIORITY}

Document = dict[str, Any]

ATTEMPTS: Document = {"$cond": [{"$in": [{"$type": "$n"}, ["int", "long"]]}, "$n", 0]}
"""How often a message was handed out, in a pipeline."""

_OLD_PLACE: Document = {"$cond": [{"$eq": [{"$type": "$w"}, "date"]}, "$w", "$$NOW"]}

GIVEN_BACK: list[Document] = [{"$set": {"s": WAITING, "v": _OLD_PLACE}}, {"$unset": ["t"]}]
"""The update that gives a leased message back, to its old place."""

Found = TypeVar("Found")

_ENVELOPE_BYTES = 512
"""More than what a document has besides its texts and its body."""

LATEST_MS = 253_402_300_799_000
"""The end of the year 9999: what is due later is due then."""

_SAME_KEYS_OTHER_OPTIONS = frozenset({85, 86})
_BAD_VALUE = 2
"""What servers answer to a hint for an index that is not there, among much else."""

_headers_encoder = msgspec.json.Encoder()
_headers_decoder = msgspec.json.Decoder(dict[str, HeaderValue])


def document_id(queue: str, message_id: str) -> str:
    """What identifies a message among those of all queues."""
    return f"{queue}\0{message_id}"


class Unreadable(Exception):
    """A document is no message; the text says why not."""


def document_of(
    message: Message, *, max_message_bytes: int, max_document_bytes: int = LARGEST_DOCUMENT
) -> Document | BrokerRefused:
    """What is stored of ``message``, but for ``v`` and ``o``, which say when; or why it cannot be stored."""
    reason = unsendable(message)
    if reason is None:
        reason = _too_large(message, max_message_bytes) or _unwritable(message)
    if reason is None:
        try:
            headers = _headers_encoder.encode(message.headers).decode() if message.headers else None
            return _document(message, headers, max_document_bytes)
        except (msgspec.MsgspecError, UnicodeEncodeError, ValueError) as error:
            reason = f"its id or a header cannot be written: {error}"
        except _TooLarge:
            largest = f"{max_document_bytes / 2**20:g} MiB"
            reason = f"MongoDB takes no document above {largest}, and this one would be"
    return BrokerRefused(f"message {message.id!r} for queue {message.queue!r}: {reason}.")


def message_of(document: Document) -> Message:
    """The message that ``document`` was made of: its fields _id, p, b, h and d are needed. Raises Unreadable."""
    queue, zero, message_id = str(document["_id"]).partition("\0")
    body, urgency, headers, due = document.get("b"), document.get("p"), document.get("h"), document.get("d")
    if not zero or not message_id or type(document["_id"]) is not str:
        raise Unreadable("its _id is not that of a message")
    if not isinstance(body, bytes):
        raise Unreadable(f"its body is {type(body).__name__}, not binary data")
    if not _is_whole(urgency) or not 0 <= urgency <= HIGHEST_PRIORITY:
        raise Unreadable(f"its priority is {urgency!r}")
    if due is not None and (type(due) is not float or not math.isfinite(due)):
        raise Unreadable(f"it is due at {due!r}, which is no time")
    if headers is not None:
        try:
            headers = _headers_decoder.decode(headers)
        except (msgspec.DecodeError, TypeError) as error:
            raise Unreadable(f"its headers cannot be read: {error}") from error
    return Message(
        message_id, queue, body if type(body) is bytes else bytes(body), headers or {}, HIGHEST_PRIORITY - urgency, due
    )


def attempts_of(document: Document) -> int:
    """How often a message was handed out, as ``ATTEMPTS`` has it."""
    found = document.get("n")
    return int(found) if _is_whole(found) else 0


def _is_whole(number: Any) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool)


def seconds(when: datetime | DatetimeMS) -> float:
    """A date as MongoDB gives it, in seconds since the epoch."""
    return int(when) / 1000 if isinstance(when, DatetimeMS) else when.timestamp()


def date(time: float) -> DatetimeMS:
    """A time (seconds since the epoch) as MongoDB stores it: rounded down to a millisecond."""
    return DatetimeMS(max(0, min(math.floor(time * 1000), LATEST_MS)))


def date_not_before(time: float) -> DatetimeMS:
    """The same, rounded up: nothing is handed out before it is due."""
    return DatetimeMS(max(0, min(math.ceil(min(time, LATEST_MS) * 1000), LATEST_MS)))


class Messages:
    """The collection of the messages, whose indexes are made once in a process. For any number of threads.

    Its methods belong inside ``client.asking()``, and raise what pymongo raises.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._has_indexes = False

    def collection(self, *, durable: bool = False) -> Collection[Document]:
        """The collection, with its indexes. Makes them at first use, and asks whether the server is new enough."""
        if not self._has_indexes:
            self._make_indexes()
        return self._client.collection(MESSAGES, durable=durable)

    def by_index(self, ask: Callable[[], Found]) -> Found:
        """What ``ask``, which names the index, returns; where somebody dropped the collection, it is made anew."""
        try:
            return ask()
        except OperationFailure as error:
            if error.code != _BAD_VALUE or self._has_index():
                raise
            self._make_indexes()
            return ask()

    def _has_index(self) -> bool:
        try:
            there = self._client.collection(MESSAGES).index_information()
        except OperationFailure:  # it may not be asked, or there is no collection
            return False
        return any(list(index["key"]) == CLAIM_INDEX for index in there.values())

    def _make_indexes(self) -> None:
        self._client.features()
        messages = self._client.collection(MESSAGES)
        replies = self._client.collection(REPLIES)
        vanishing = IndexModel([("x", 1)], name="vanishing", sparse=True, expireAfterSeconds=0)
        _make(messages, [IndexModel(CLAIM_INDEX, name="claim"), vanishing])
        _make(replies, [vanishing])
        self._has_indexes = True


def _make(collection: Collection[Document], indexes: list[IndexModel]) -> None:
    """Make ``indexes``, or be content with those that are there on the same fields."""
    try:
        collection.create_indexes(indexes)
    except OperationFailure as error:
        if error.code != UNAUTHORIZED and error.code not in _SAME_KEYS_OTHER_OPTIONS:
            raise
        there = [list(index["key"].items()) for index in collection.list_indexes()]
        if not all(list(index.document["key"].items()) in there for index in indexes):
            raise


class _TooLarge(Exception):
    """The document would be larger than MongoDB takes."""


def _too_large(message: Message, max_message_bytes: int) -> str | None:
    if len(message.body) > max_message_bytes:
        return f"its body has {len(message.body)} bytes and max_message_bytes is {max_message_bytes}"
    return None


def _unwritable(message: Message) -> str | None:
    """JSON knows no infinity, and dates know none either."""
    if message.due is not None and not _is_time(message.due):
        return f"it is due at {message.due!r}, which is no time"
    for name, value in message.headers.items():
        if type(value) is float and not math.isfinite(value):
            return f"its header {name!r} is {value}, which is no number"
    return None


def _is_time(due: object) -> bool:
    try:
        return isinstance(due, (int, float)) and math.isfinite(due)
    except OverflowError:  # an integer that is larger than any float
        return False


def _document(message: Message, headers: str | None, max_document_bytes: int) -> Document:
    message_id = document_id(message.queue, message.id)
    texts = len(message_id.encode()) + (len(headers.encode()) if headers else 0)
    if texts + 4 * len(message.queue) + len(message.body) + _ENVELOPE_BYTES > max_document_bytes:
        raise _TooLarge
    document: Document = {
        "_id": message_id,
        "q": message.queue,
        "s": WAITING,
        "p": HIGHEST_PRIORITY - message.priority,
        "n": 0,
        "b": message.body,
    }
    if headers is not None:
        document["h"] = headers
    if message.due is not None:
        document["d"] = float(message.due)
    return document
