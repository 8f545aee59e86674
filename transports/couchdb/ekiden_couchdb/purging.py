"""Purging: deleted documents that nobody needs any more are removed for good, where the server permits it.

A deletion leaves a tombstone, which compaction keeps; ``_purge`` removes it, and is for server administrators. All
leaves of a document must be named, else the one that was left out becomes visible again. So what is purged comes from
the database's own feed of changes, which names them all, whoever deleted the documents, also one that died since.

On a single node a tombstone can go at once. In a cluster it is the evidence that a message was settled, needed as long
as a losing branch of it may still turn up. There a tombstone goes when it has been the same, with the same leaves, for
``delay`` seconds in which all nodes were there, and these had nothing left to tell each other at some moment since. To
purge makes something to tell, and so does all other work; therefore the moments count, and not what lies between.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from ekiden_couchdb.client import Client

PURGED_AT_ONCE = 100
"""So many documents a server before 3.5.1 takes in one request; and ten times as many revisions."""

_MOST_REVISIONS = 1000
_PAGE = 1000
_MOST_PAGES = 200
_READ_AGAIN_SECONDS = 3600.0
_BEGINNING = "0"

Leaves = tuple[str, ...]


class _Page(msgspec.Struct, frozen=True):
    """Tombstones that were seen between two points of the feed. ``seen_at`` is of the monotonic clock."""

    seen_at: float
    since: str
    rows: int
    tombstones: Mapping[str, Leaves]


class Purger:
    """Purges what is deleted in one database, a little at a time. Used by one thread at a time.

    It reads the feed once, and again from its beginning every hour, for what may have been passed over.
    """

    def __init__(self, client: Client, database: str) -> None:
        self._client = client
        self._database = database
        self._is_interrupted = False
        self._quiet_at = -math.inf
        self._begin()

    @property
    def is_waiting(self) -> bool:
        """Whether it has seen tombstones whose time has not come."""
        return bool(self._pages) or self._is_interrupted

    def step(self, *, delay: float, deadline: float) -> bool:
        """Purge until ``deadline`` (monotonic) at the latest. Whether there was more than could be done.

        ``delay``: as above, 0 on a single node. Raises what the client raises.
        """
        if time.monotonic() - self._began_at > _READ_AGAIN_SECONDS and not self._pages:
            self._begin()
        if delay and not self._may_go_on():
            return False
        more = True
        while more and time.monotonic() < deadline:
            more = self._purge_ripe(delay) if delay else self._purge_next()
        return more

    def _begin(self) -> None:
        self._since = _BEGINNING
        self._pages: deque[_Page] = deque()
        self._began_at = time.monotonic()

    def _may_go_on(self) -> bool:
        """In a cluster: whether all nodes are there. Notes when they have told each other everything."""
        now = time.monotonic()
        members = _members(self._client)
        self._is_interrupted = members is None
        if members is None:
            # A node that was away may come back with branches that nobody has seen: all waiting begins anew.
            self._forget_pages()
            return False
        if _have_told_everything(self._client, members):
            self._quiet_at = now
        return True

    def _forget_pages(self) -> None:
        if self._pages:
            self._since = self._pages[0].since
            self._pages.clear()

    def _purge_next(self) -> bool:
        """On a single node: read a page and purge it. Whether there is more."""
        rows, last = self._read(self._since, _PAGE)
        self._purge(dict(_tombstones(rows)))
        self._since = last
        return len(rows) == _PAGE

    def _purge_ripe(self, delay: float) -> bool:
        """In a cluster: note a page, and purge the oldest when its time has come. Whether there is more now."""
        more = False
        if len(self._pages) < _MOST_PAGES:
            rows, last = self._read(self._since, _PAGE)
            self._note(self._since, rows)
            self._since = last
            more = len(rows) == _PAGE
        if self._pages and self._is_ripe(self._pages[0], delay):
            page = self._pages[0]
            rows, _ = self._read(page.since, page.rows)
            now = dict(_tombstones(rows))
            self._purge({id_: leaves for id_, leaves in page.tombstones.items() if now.get(id_) == leaves})
            self._pages.popleft()
            self._note(
                page.since, [row for row in rows if page.tombstones.get(row["id"]) not in {None, now.get(row["id"])}]
            )
            more = True
        return more

    def _is_ripe(self, page: _Page, delay: float) -> bool:
        return time.monotonic() - page.seen_at >= delay and page.seen_at < self._quiet_at

    def _note(self, since: str, rows: list[dict[str, Any]]) -> None:
        tombstones = dict(_tombstones(rows))
        if tombstones:
            self._pages.append(_Page(time.monotonic(), since, _PAGE, tombstones))

    def _read(self, since: str, limit: int) -> tuple[list[dict[str, Any]], str]:
        query = {"since": since, "limit": str(limit), "style": "all_docs"}
        answer = self._client.ask("GET", f"/{self._database}/_changes", query=query)
        return answer.body["results"], str(answer.body["last_seq"])

    def _purge(self, tombstones: Mapping[str, Leaves]) -> None:
        for batch in _batches(tombstones):
            self._client.ask("POST", f"/{self._database}/_purge", batch, harmless=True)


def may_purge(client: Client, database: str) -> bool:
    """Whether this server lets us purge there; purges nothing. Raises ``unavailable`` when it cannot say that now."""
    refusals = range(HTTPStatus.BAD_REQUEST, 600)
    answer = client.ask("POST", f"/{database}/_purge", {}, accept=refusals, harmless=True)
    later = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.INTERNAL_SERVER_ERROR}
    if answer.status in later or answer.status in {HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE}:
        raise client.errors.unavailable(f"{client.place} could not say whether it purges: it answered {answer.status}.")
    return answer.status < HTTPStatus.MULTIPLE_CHOICES


def is_whole(client: Client) -> bool:
    """Whether all nodes of the cluster are there, and have told each other everything. Raises what the client does."""
    members = _members(client)
    return members is not None and _have_told_everything(client, members)


def _members(client: Client) -> list[str] | None:
    """The nodes of the cluster; None while one is away."""
    membership = client.ask("GET", "/_membership").body
    members: list[str] = membership["cluster_nodes"]
    return members if set(members) <= set(membership["all_nodes"]) else None


def _have_told_everything(client: Client, nodes: Sequence[str]) -> bool:
    return all(_jobs(client, node) == 0 for node in nodes)


def _jobs(client: Client, node: str) -> int:
    """How many parts of databases this node has yet to tell others of."""
    system = client.ask("GET", f"/_node/{node}/_system").body
    return int(system.get("internal_replication_jobs", 0))


def _tombstones(rows: list[dict[str, Any]]) -> Iterator[tuple[str, Leaves]]:
    """Every document whose leaves are all deleted (else a living one would be the visible one), and its leaves."""
    for row in rows:
        if row.get("deleted") and not row["id"].startswith("_"):
            yield row["id"], tuple(sorted(change["rev"] for change in row["changes"]))


def _batches(tombstones: Mapping[str, Leaves]) -> Iterator[dict[str, Leaves]]:
    batch: dict[str, Leaves] = {}
    revisions = 0
    for id_, leaves in tombstones.items():
        if batch and (len(batch) == PURGED_AT_ONCE or revisions + len(leaves) > _MOST_REVISIONS):
            yield batch
            batch, revisions = {}, 0
        batch[id_] = leaves
        revisions += len(leaves)
    if batch:
        yield batch
