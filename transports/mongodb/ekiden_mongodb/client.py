"""Asks whichever server is the primary, in bounded time, and says in one sentence what went wrong.

pymongo finds the servers, keeps the connections and repeats what may be repeated. What is asked inside one ``with
client.asking()`` has one deadline: finding the server, connecting, sending and answering in one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import msgspec
import pymongo
from bson.codec_options import CodecOptions, DatetimeConversion
from ekiden.errors import EkidenError
from ekiden.urls import BrokerURL
from pymongo import MongoClient, ReadPreference
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import InvalidOperation, OperationFailure
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from ekiden_mongodb.clock import ServerClock
from ekiden_mongodb.errors import AUTHENTICATION_FAILED, NETWORK_TROUBLE, TROUBLE, Errors
from ekiden_mongodb.options import options_in, place_in

OLDEST_WIRE_VERSION = 8
"""MongoDB 4.2, whose updates may be pipelines."""

LARGEST_DOCUMENT = 16 * 1024 * 1024
"""Bytes. It has been the same in every version of MongoDB; some that work alike take less, and say so."""

_LONGEST_SELECTION_SECONDS = 5.0
"""Who finds no primary for so long says so, where neither the URL nor our deadline is shorter."""

_SHORTEST_SECONDS = 0.001
"""What is left of a deadline that has passed: pymongo takes 0 for no deadline at all."""

_CODEC = CodecOptions[dict[str, Any]](
    document_class=dict,
    tz_aware=True,
    tzinfo=UTC,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="replace",  # a text of somebody else's must not make a whole batch unreadable
)
_LOCAL = ReadConcern("local")
_PRIMARY_ONLY = WriteConcern(w=1)


class Features(msgspec.Struct, frozen=True):
    """What the servers are and can do, as they say themselves; one that claims too much is found out in use.

    ``version`` as (8, 0, 4); ``product`` is "MongoDB", or the name of what works alike, where it says so.
    ``max_document_bytes``: the largest document that they take.
    """

    version: tuple[int, ...]
    product: str
    is_replica_set: bool
    is_sharded: bool
    change_streams: bool
    transactions: bool
    max_document_bytes: int


class Client:
    """What one URL leads to, for any number of threads.

    Raises ``unavailable`` for what may work when tried again, ``refused`` for what will not, and ``unstorable`` (if it
    is not given, ``refused``) for a value that no server takes, each with one sentence. The constructor raises
    ConfigurationError for what is wrong with the URL, and connects to nothing.
    """

    def __init__(
        self,
        url: BrokerURL,
        *,
        unavailable: type[EkidenError],
        refused: type[EkidenError],
        unstorable: type[EkidenError] | None = None,
    ) -> None:
        self.options = options_in(url)
        self.place = place_in(url)
        self.errors = Errors(self.place, self.options.timeout, unavailable, refused, unstorable)
        self._durable = WriteConcern(w=_at_least_majority(self.place.write_concern), j=True)
        self._mongo: MongoClient[dict[str, Any]] | None = None
        self._handles: dict[tuple[str, bool], Collection[dict[str, Any]]] = {}
        self._parents: list[MongoClient[dict[str, Any]]] = []
        self._features: Features | None = None
        self._making = threading.Lock()
        self.clock = ServerClock(self._ask_for_time, self._primary)

    def collection(self, name: str, *, durable: bool = False) -> Collection[dict[str, Any]]:
        """The collection ``<prefix>.<name>``, on the primary.

        ``durable``: a write is acknowledged when a majority of the members have it in their journals (or more, where
        the URL's ``w`` says so); otherwise when the primary has it.
        """
        handle = self._handles.get((name, durable))
        if handle is None:
            handle = self._handles[name, durable] = self.database.get_collection(
                f"{self.options.prefix}.{name}",
                codec_options=_CODEC,
                read_preference=ReadPreference.PRIMARY,
                write_concern=self._durable if durable else _PRIMARY_ONLY,
                read_concern=_LOCAL,
            )
        return handle

    @property
    def database(self) -> Database[dict[str, Any]]:
        """The database of the URL. Its own commands go to the primary as well."""
        return self.mongo.get_database(
            self.place.database, codec_options=_CODEC, read_preference=ReadPreference.PRIMARY, read_concern=_LOCAL
        )

    @property
    def mongo(self) -> MongoClient[dict[str, Any]]:
        """pymongo's client, made at first use. It is the same one until ``close`` or ``forget``."""
        mongo = self._mongo
        if mongo is None:
            with self._making:
                mongo = self._mongo
                if mongo is None:
                    mongo = self._mongo = self._make()
        return mongo

    def asking(self, seconds: float | None = None, *, by: float | None = None) -> AbstractContextManager[None]:
        """One deadline for what is asked inside; what pymongo raises there is raised as ours.

        ``seconds``, and ``by`` (on the monotonic clock): if it is to end sooner than other calls. One inside another
        does not end later than that.
        """
        if seconds is None:
            seconds = self.options.timeout
        if by is not None:
            seconds = min(seconds, max(_SHORTEST_SECONDS, by - time.monotonic()))
        return _Asking(self, seconds)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[ClientSession]:
        """A session with a transaction, committed durably at the end, or given up when something is raised inside.

        Raises what pymongo raises: it belongs inside ``asking``.
        """
        with self.mongo.start_session() as session:
            session.start_transaction(
                read_concern=_LOCAL, write_concern=self._durable, read_preference=ReadPreference.PRIMARY
            )
            yield session  # leaving by an error gives it up
            session.commit_transaction()

    def features(self) -> Features:
        """What the servers can do: asked at first use, and again after a connection broke."""
        features = self._features
        if features is None:
            with self.asking():
                features = self._features = self._ask_for_features()
        return features

    @property
    def max_document_bytes(self) -> int:
        """The largest document that the servers take, as far as they were asked."""
        features = self._features
        return LARGEST_DOCUMENT if features is None else features.max_document_bytes

    def server_time(self) -> float:
        """The time by the primary's clock at its lower bound, in seconds since the epoch."""
        return self.clock.now()

    def error(self, trouble: Exception) -> EkidenError:
        """What to raise for what pymongo raised outside of ``asking``."""
        if isinstance(trouble, NETWORK_TROUBLE):
            self.clock.doubt()
            self._features = None
        mongo = self._mongo
        servers = () if mongo is None else mongo.topology_description.server_descriptions().values()
        error = self.errors.of(trouble, servers)
        if isinstance(trouble, InvalidOperation):
            # Closed meanwhile. Who was making a handle at that moment has kept one that leads to what was closed.
            self._handles = {}
        if isinstance(trouble, OperationFailure) and trouble.code == AUTHENTICATION_FAILED:
            # To pymongo the server is unknown now until it answers the monitor, up to ten seconds later. Who asks again
            # would wait for that, and be told that nobody answered; a new client is refused as quickly as this one.
            self._close(mongo)
        return error

    def close(self) -> None:
        """Close every connection. May be called again; a call after it connects anew."""
        self._close(self._mongo)
        self.forget_answers()

    def _close(self, mongo: MongoClient[dict[str, Any]] | None) -> None:
        """Close this one; a call after it connects anew."""
        with self._making:
            if self._mongo is mongo:
                self._mongo = None
                self._handles = {}
        if mongo is not None:
            # Telling the servers that our sessions end is a courtesy, and not worth a long wait.
            with contextlib.suppress(*TROUBLE), pymongo.timeout(1.0):
                mongo.close()

    def forget(self) -> None:
        """In a forked child: drop every connection without touching the parent's."""
        if self._mongo is not None:
            self._parents.append(self._mongo)  # collected as garbage it would complain that nobody closed it
            self._mongo = None
        self._handles = {}
        self._features = None
        self._making = threading.Lock()
        self.clock = ServerClock(self._ask_for_time, self._primary)

    def forget_answers(self) -> None:
        """Ask again what the servers are, and for their time."""
        self.clock.doubt()
        self._features = None

    def _make(self) -> MongoClient[dict[str, Any]]:
        seconds = self.options.timeout
        selection, connect = self.place.selection_seconds, self.place.connect_seconds
        return MongoClient(
            self.place.text,
            connect=False,
            serverSelectionTimeoutMS=_milliseconds(min(selection or _LONGEST_SELECTION_SECONDS, seconds)),
            connectTimeoutMS=_milliseconds(min(connect or seconds, seconds)),
        )

    def _ask_for_features(self) -> Features:
        hello = self.mongo.admin.command("hello", read_preference=ReadPreference.PRIMARY)
        if hello.get("maxWireVersion", 0) < OLDEST_WIRE_VERSION:
            raise self.errors.refused(f"{self.place} is older than MongoDB 4.2, which is needed here.")
        build = self.mongo.admin.command("buildInfo", read_preference=ReadPreference.PRIMARY)
        is_replica_set, is_sharded = "setName" in hello, hello.get("msg") == "isdbgrid"
        has_sessions = hello.get("logicalSessionTimeoutMinutes") is not None
        return Features(
            version=tuple(build.get("versionArray", ())[:3]),
            product=_product(build),
            is_replica_set=is_replica_set,
            is_sharded=is_sharded,
            change_streams=is_replica_set or is_sharded,
            transactions=(is_replica_set or is_sharded) and has_sessions,
            max_document_bytes=int(hello.get("maxBsonObjectSize", LARGEST_DOCUMENT)),
        )

    def _ask_for_time(self) -> float:
        with self.asking():
            hello = self.mongo.admin.command("hello", read_preference=ReadPreference.PRIMARY)
        told = hello["localTime"]
        return told.replace(tzinfo=UTC).timestamp() if isinstance(told, datetime) else int(told) / 1000

    def _primary(self) -> object:
        """Which server is the primary as far as is known; None where nobody is called so."""
        return None if self._mongo is None else self._mongo.primary


class _Asking:
    """See ``Client.asking``. A class, because it is entered for every batch."""

    __slots__ = ("_client", "_deadline")

    def __init__(self, client: Client, seconds: float) -> None:
        self._client = client
        self._deadline = pymongo.timeout(seconds)

    def __enter__(self) -> None:
        self._deadline.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._deadline.__exit__(kind, error, traceback)
        if isinstance(error, TROUBLE):
            raise self._client.error(error) from error


def _at_least_majority(wanted: int | str | None) -> int | str:
    """The URL's ``w`` where it asks for something special or for more than one member, else the majority."""
    if isinstance(wanted, str):
        return wanted
    return "majority" if wanted is None or wanted < 2 else wanted


def _product(build: dict[str, Any]) -> str:
    """Work-alikes name themselves in a field of their own, as ``ferretdb``, or leave out what every mongod tells."""
    for name in build:
        if name.lower().startswith("ferret"):
            return "FerretDB"
    return "MongoDB" if "storageEngines" in build or "allocator" in build else "a work-alike of MongoDB"


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
