"""Which node of a cluster is asked: clients whose URLs name the same nodes in another order agree on one order.

    {prefix}-signals, {prefix}-results / order:HASH    {"hosts": [HOST:PORT, ...], "since", "until", "ends"}

Every client asks the first node of its order that answers, and only clients that ask the same one are told exactly who
won (see ``connections``). So each client of a cluster keeps a document here of the order in which its URL names the
nodes: ``since`` when there is such a client, and that there was one ``until`` a moment that is put off while it works.
Of several orders of the same nodes the one counts that is there longest. Clients whose URLs name other nodes, or by
other names, cannot agree; they and ``ekiden doctor`` say so.

All times are the server's, in milliseconds. ``ends``: when ``tidying`` may delete it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import msgspec
from ekiden.errors import EkidenError
from ekiden.locks import call_holding
from ekiden.loggers import safe_logger

from ekiden_couchdb.client import Client
from ekiden_couchdb.documents import Rows
from ekiden_couchdb.errors import refusal_in
from ekiden_couchdb.reading import Row, read_rows

logger = safe_logger(__name__)

KEPT_SECONDS = 120.0
"""So long after a client was seen last its order counts."""
_LOOK_AFTER_SECONDS = (1.0, 2.0, 5.0, 10.0)
_LOOK_EVERY_SECONDS = 30.0
_AFTER_REFUSAL_SECONDS = 600.0
_MOST_ORDERS = 100
_ORDERS = Rows("order:", "order;")
_DAY_MILLISECONDS = 86_400_000


class Order(msgspec.Struct, frozen=True):
    """In which order some clients ask the nodes of a cluster, and since and until when there are such clients."""

    hosts: tuple[str, ...]
    since: int
    until: int

    @property
    def id(self) -> str:
        """The document of this order."""
        return "order:" + blake2b(",".join(self.hosts).encode(), digest_size=12).hexdigest()


def agreed(own: Sequence[str], orders: Iterable[Order]) -> tuple[str, ...]:
    """The order in which a client asks whose URL has ``own``, if others have these ``orders``."""
    same = [order for order in orders if set(order.hosts) == set(own)]
    oldest = min(same, key=lambda order: (order.since, order.hosts), default=None)
    return tuple(own) if oldest is None else oldest.hosts


class Coordinators:
    """What one client knows of the orders of all. ``look`` may be called by any thread, often."""

    def __init__(self, client: Client, kind: str) -> None:
        self._client = client
        self._database = client.database(kind)
        self._own = client.addresses()
        self.forget()

    def forget(self) -> None:
        """In a forked child: make a new lock."""
        self._looking = threading.RLock()
        self._look_at = 0.0
        self._looks = 0
        self._told: set[str] = set()

    def look(self) -> None:
        """Agree with the others, when it is time; a second time soon after the first.

        What a server refuses is looked at again: until then the order of the URL counts, or what was agreed on. Raises
        what the client raises where none answers, or none as CouchDB does.
        """
        if time.monotonic() >= self._look_at:
            call_holding(self._looking, self._look)

    def _look(self) -> None:
        try:
            self._looks += 1
            pause = _LOOK_EVERY_SECONDS
            if self._looks <= len(_LOOK_AFTER_SECONDS):
                pause = _LOOK_AFTER_SECONDS[self._looks - 1]
            self._look_at = time.monotonic() + pause
            with self._client.one_deadline():
                if not self._client.is_cluster():
                    self._look_at = float("inf")
                    return
                differences = self._agree()
            for sentence in differences:
                if sentence not in self._told:
                    self._told.add(sentence)
                    logger.warning("%s: %s", self._client.place, sentence)
        except EkidenError as error:
            if refusal_in(error) is None:
                raise
            if isinstance(error, self._client.errors.refused):
                self._look_at = time.monotonic() + _AFTER_REFUSAL_SECONDS
        except Exception:
            logger.exception("it could not be agreed which node of the cluster is asked")

    def differences(self) -> list[str]:
        """What should be different in the URLs of those who work here now, as sentences without their beginnings.

        Raises what the client raises.
        """
        if not self._client.is_cluster():
            return []
        try:
            orders = [order for order, _ in self._read()]
        except self._client.errors.refused as error:
            if not self._client.is_missing(error):
                raise
            return []
        now = self._now()
        return _differences(self._own, [order for order in orders if order.until > now])

    def _agree(self) -> list[str]:
        """Say which order the URL has, and ask in the one that counts. Returns what should be different."""
        self._client.ensure_database(self._database)
        now = self._now()
        known = {order.id: (order, row) for order, row in self._read()}
        own = Order(self._own, now, now + round(KEPT_SECONDS * 1000))
        before, row = known.get(own.id, (own, None))
        if before.until > now and row is not None:
            own = msgspec.structs.replace(own, since=min(before.since, now))
        if row is None or before.until - now < KEPT_SECONDS * 500:
            self._write(own, row)
        self._delete([row for order, row in known.values() if order.until < now - _DAY_MILLISECONDS])
        others = [order for order, _ in known.values() if order.until > now and order.id != own.id]
        self._client.ask_in_order(agreed(self._own, [own, *others]))
        return _differences(self._own, [own, *others])

    def _now(self) -> int:
        return int(self._client.server_time() * 1000)

    def _read(self) -> list[tuple[Order, Row]]:
        """The orders that are there, each with its document; what cannot be one is passed over."""
        latest = self._now() + _DAY_MILLISECONDS
        found: list[tuple[Order, Row]] = []
        for row in read_rows(self._client, self._database, _ORDERS, limit=_MOST_ORDERS):
            try:
                order = msgspec.convert(row.document, Order)
            except msgspec.ValidationError:
                continue
            if order.hosts and order.id == row.id and order.until < latest:
                found.append((order, row))
        return found

    def _write(self, order: Order, row: Row | None) -> None:
        """Write it, over ``row``; a client that was quicker has written the same."""
        document: dict[str, Any] = {"_id": order.id, "ends": order.until + _DAY_MILLISECONDS}
        document |= msgspec.to_builtins(order)
        if row is not None:
            document["_rev"] = row.rev
        self._client.bulk(self._database, [document])

    def _delete(self, rows: Sequence[Row]) -> None:
        if rows:
            self._client.bulk(self._database, [{"_id": row.id, "_rev": row.rev, "_deleted": True} for row in rows])


def _differences(own: Sequence[str], orders: Sequence[Order]) -> list[str]:
    """One sentence for each thing that should be different in the URLs of clients that have these orders."""
    found: list[str] = []
    others = [order for order in orders if order.hosts != tuple(own)]
    first = agreed(own, [Order(tuple(own), 2**62, 0), *orders])[0]
    if any(set(order.hosts) == set(own) for order in others):
        found.append(
            "URLs name the same nodes of the cluster in different orders, so it is agreed for now that all ask "
            f"{first} first: write them in one order"
        )
    strangers = sorted({order.hosts[0] for order in others if set(order.hosts) != set(own)} - {first})
    if strangers:
        found.append(
            f"some clients ask the node {first} first, and others {', '.join(strangers)}; only one node can tell "
            "exactly who of several was first, so let every URL name the same nodes, by the same names and in the same "
            "order"
        )
    return found
