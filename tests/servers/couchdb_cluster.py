"""A CouchDB cluster of three, played by a thread of the tests' own process: what it answers when its copies differ.

It is not a CouchDB: it has as much of the API as ekiden uses, and copies (``couchdb_copies``) that a test takes apart:

    divert("messages", {1})       the next write to such a database reaches this copy only: it is `accepted`
    replicate()                   the copies meet, and the losers' branches become visible
    down = {2}                    a node is away
    advance(60)                   the servers' clock jumps
    fail("POST", "_bulk_docs", 503)      the next such request is answered with that, and not carried out
    users, purges_permitted       who may do what
    validation                    whether databases that are created from now on run validation functions

One server with ``copies=1`` answers as a single node does.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

from tests.servers.couchdb_copies import DESIGN, ENFORCED, QUORUM, Database, Leaf, Unacceptable, living, visible
from tests.servers.couchdb_http import ADMIN, Answer, PlayedServer, Request
from tests.servers.processes import HOST

_ADMINS_ONLY = {"members": {"roles": [ADMIN]}, "admins": {"roles": [ADMIN]}}
_NAME = re.compile(r"[a-z][a-z0-9_$()+/-]*")


@dataclass
class _Failure:
    method: str
    pattern: re.Pattern[str]
    status: int
    body: Any
    skipped: int
    left: int


class CouchDBCluster:
    """The cluster: its state, what a test does to it, and what it answers. ``changed`` guards everything in it."""

    def __init__(self, *, copies: int = 3, users: Mapping[str, tuple[str, Collection[str]]] | None = None) -> None:
        self.changed = threading.Condition()
        self.databases: dict[str, Database] = {}
        self.users = dict(users or {})
        self.down: set[int] = set()
        self.read_from = 0
        self.replication_jobs = 0
        self.purges_permitted = True
        self.validation = ENFORCED
        self.stopping = False
        self.requests: list[tuple[str, str, int]] = []
        self._copies = copies
        self._ahead = 0.0
        self._diversions: list[tuple[str, Collection[int]]] = []
        self._failures: list[_Failure] = []
        self._http = PlayedServer(self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="couchdb-cluster")

    # What a test does to it.

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def kill(self) -> None:
        """Answer no more, and end all feeds."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()

    def url(self, prefix: str, *, user: str | None = None, options: str = "") -> str:
        """The URL of a place there."""
        who = "" if user is None else f"{user}:{self.users[user][0]}@"
        return f"couchdb://{who}{HOST}:{self._http.server_address[1]}/{prefix}{options}"

    def advance(self, seconds: float) -> None:
        """The servers' clock jumps ahead."""
        self._ahead += seconds

    def divert(self, part: str, reaches: Collection[int]) -> None:
        """The next write to a database whose name contains ``part`` reaches these copies only."""
        with self.changed:
            self._diversions.append((part, reaches))

    def fail(
        self, method: str, pattern: str, status: int, *, body: Any = None, skipping: int = 0, times: int = 1
    ) -> None:
        """So many requests of this method, to paths with this in them, are answered so and not carried out.

        ``skipping``: so many are carried out before.
        """
        said = body if body is not None else {"error": "trouble", "reason": f"a test asked for {status}"}
        with self.changed:
            self._failures.append(_Failure(method, re.compile(pattern), status, said, skipping, times))

    def serve_again(self) -> None:
        """Nothing fails any more."""
        with self.changed:
            self._failures.clear()

    def replicate(self, part: str = "") -> None:
        """The nodes that are up exchange what they hold, in databases whose name contains ``part``."""
        with self.changed:
            for name, database in self.databases.items():
                if part in name:
                    database.replicate(self.up())

    def up(self) -> list[int]:
        """The numbers of the nodes that are not down."""
        return [number for number in range(self._copies) if number not in self.down]

    def leaves(self, part: str) -> dict[str, list[Leaf]]:
        """What all copies together hold in the databases whose name contains ``part``, but for design documents."""
        with self.changed:
            return {
                id_: found
                for name, database in self.databases.items()
                if part in name
                for id_ in {id_ for copy in database.copies for id_ in copy.documents}
                if not id_.startswith(DESIGN) and (found := database.leaves(id_, range(self._copies)))
            }

    # What it answers.

    def date(self) -> str:
        """The Date of an answer."""
        return formatdate(time.time() + self._ahead, usegmt=True)

    def answer(self, request: Request) -> Answer:
        """Carry ``request`` out."""
        path = "/" + "/".join(request.path)
        with self.changed:
            try:
                answer = self._failure(request.method, path) or self._carry_out(request)
            except Answer as answered:
                answer = answered
            self.requests.append((request.method, path, answer.status))
            self.changed.notify_all()
        return answer

    def _failure(self, method: str, path: str) -> Answer | None:
        for failure in self._failures:
            if not failure.left or failure.method != method or not failure.pattern.search(path):
                continue
            if failure.skipped:
                failure.skipped -= 1
            else:
                failure.left -= 1
                return Answer(failure.status, failure.body)
        return None

    def _carry_out(self, request: Request) -> Answer:
        match request.path:
            case [""] | []:
                return Answer(200, {"couchdb": "Welcome", "version": "3.5.0", "vendor": {"name": "the tests"}})
            case ["_up"]:
                return Answer(200, {"status": "ok", "seeds": {}})
            case ["_session"]:
                return Answer(200, {"ok": True, "userCtx": {"name": request.name, "roles": sorted(request.roles)}})
            case ["_membership"]:
                nodes = [f"couchdb@{number}" for number in range(self._copies)]
                return Answer(200, {"all_nodes": [nodes[number] for number in self.up()], "cluster_nodes": nodes})
            case ["_all_dbs"]:
                _require_admin(request)
                first, last = (json.loads(request.query.get(key, text)) for key, text in _ALL_NAMES)
                return Answer(200, sorted(name for name in self.databases if first <= name <= last))
            case ["_node", _, "_system"]:
                _require_admin(request)
                return Answer(200, {"internal_replication_jobs": self.replication_jobs})
            case [name]:
                return self._of_database(name, request)
            case [name, *rest]:
                database = self._database(name, request)
                return self._of_documents(name, database, rest, request)
        raise AssertionError(request.path)

    def _of_database(self, name: str, request: Request) -> Answer:
        if not _NAME.fullmatch(name):
            raise Answer(400, {"error": "illegal_database_name", "reason": f"Name: '{name}'. Only lowercase ..."})
        match request.method:
            case "PUT":
                _require_admin(request)
                if name in self.databases:
                    return Answer(412, {"error": "file_exists", "reason": "The database already exists."})
                self.databases[name] = Database(self._copies, self.validation)
                self.databases[name].security = dict(_ADMINS_ONLY)
                return Answer(201, {"ok": True})
            case "DELETE":
                _require_admin(request)
                self._database(name, request)
                del self.databases[name]
                return Answer(200, {"ok": True})
        database = self._database(name, request)
        copy = database.copies[self._reader()]
        alive = sum(1 for _ in living(copy))
        cluster = {"n": self._copies, "q": 1, "w": 2, "r": 2}
        return Answer(
            200,
            {
                "db_name": name,
                "doc_count": alive,
                "doc_del_count": len(copy.documents) - alive,
                "update_seq": f"{copy.sequence}-g1",
                "cluster": cluster,
            },
        )

    def _database(self, name: str, request: Request) -> Database:
        if name not in self.databases:
            raise Answer(404, {"error": "not_found", "reason": "Database does not exist."})
        database = self.databases[name]
        if not (_is_among(request, database.security, "members") or _is_among(request, database.security, "admins")):
            if request.name is None:
                raise Answer(401, {"error": "unauthorized", "reason": "You are not authorized to access this db."})
            raise Answer(403, {"error": "forbidden", "reason": "You are not allowed to access this db."})
        return database

    def _of_documents(self, name: str, database: Database, rest: list[str], request: Request) -> Answer:
        match rest:
            case ["_security"]:
                if request.method == "PUT":
                    _require_database_admin(request, database)
                    database.security = request.body
                    return Answer(200, {"ok": True})
                return Answer(200, database.security)
            case ["_revs_limit"]:
                _require_database_admin(request, database)
                return Answer(200, {"ok": True})
            case ["_bulk_docs"]:
                return self._bulk_docs(name, database, request)
            case ["_revs_diff"]:
                return Answer(200, self._revs_diff(database, request.body))
            case ["_all_docs"]:
                return Answer(200, {"total_rows": 0, "offset": 0, "rows": list(self._rows(database, request))})
            case ["_bulk_get"]:
                results = [self._bulk_get(database, wanted) for wanted in request.body["docs"]]
                return Answer(200, {"results": results})
            case ["_changes"]:
                return Answer(200, self.changes(name, request.query))
            case ["_purge"]:
                return self._purge(database, request)
            case [system] if system.startswith("_"):
                return Answer(404, {"error": "not_found", "reason": "missing"})
        return self._of_document(name, database, "/".join(rest), request)

    def _bulk_docs(self, name: str, database: Database, request: Request) -> Answer:
        documents = request.body["docs"]
        if request.body.get("new_edits", True):
            return Answer(201, [self._write(name, database, document, request) for document in documents])
        reached = self._reached(name, request)
        answers = [database.replicated(document, reached) for document in documents]
        is_safe = len(reached) >= min(QUORUM, self._copies)
        return Answer(201 if is_safe else 202, [answer for answer in answers if answer is not None])

    def _revs_diff(self, database: Database, asked: dict[str, list[str]]) -> dict[str, Any]:
        missing: dict[str, Any] = {}
        for id_, revisions in asked.items():
            leaves = database.leaves(id_, self._readers())
            known = {rev for leaf in leaves for rev in (leaf.rev, *leaf.path)}
            if unknown := [rev for rev in revisions if rev not in known]:
                missing[id_] = {"missing": unknown}
        return missing

    def _write(self, name: str, database: Database, document: dict[str, Any], request: Request) -> dict[str, Any]:
        if document["_id"].startswith(DESIGN) and not _is_among(request, database.security, "admins"):
            return {"id": document["_id"], "error": "forbidden", "reason": "You are not a db or server admin."}
        return database.write(document, self._reached(name, request))

    def _reached(self, name: str, request: Request) -> Collection[int]:
        """The copies that a write arrives at: all of one request's documents at the same ones."""
        if getattr(self, "_diverted", (None, ()))[0] is request:
            return self._diverted[1]
        reached: Collection[int] = self.up()
        for diversion in self._diversions:
            if diversion[0] in name:
                self._diversions.remove(diversion)
                reached = [number for number in reached if number in diversion[1]]
                break
        self._diverted = (request, reached)
        return reached

    def _reader(self) -> int:
        return self.read_from if self.read_from not in self.down else self.up()[0]

    def _readers(self) -> list[int]:
        """Those that are asked for one document (r=2)."""
        first = self._reader()
        return [first, *[number for number in self.up() if number != first][:1]]

    def _rows(self, database: Database, request: Request) -> Iterator[dict[str, Any]]:
        query, body = request.query, request.body or {}
        copy = database.copies[self._reader()]
        with_documents = query.get("include_docs") == "true" or body.get("include_docs") is True
        conflicts = query.get("conflicts") == "true"
        if "keys" in body:
            for id_ in body["keys"]:
                winner = copy.winner(id_)
                if winner is None:
                    yield {"key": id_, "error": "not_found"}
                elif winner.deleted:
                    row = {"id": id_, "key": id_, "value": {"rev": winner.rev, "deleted": True}}
                    yield row | ({"doc": None} if with_documents else {})
                else:
                    yield _row(id_, copy.documents[id_], with_documents, conflicts)
            return
        first = json.loads(query.get("startkey", query.get("start_key", '""')))
        last = json.loads(query.get("endkey", query.get("end_key", '"\uffff"')))
        exclusive = query.get("inclusive_end") == "false"
        ids = sorted(id_ for id_, _ in living(copy) if first <= id_ <= last and not (exclusive and id_ == last))
        if query.get("descending") == "true":
            ids.reverse()
        skipped = int(query.get("skip", "0"))
        for id_ in ids[skipped : skipped + int(query.get("limit", len(ids)))]:
            yield _row(id_, copy.documents[id_], with_documents, conflicts)

    def _bulk_get(self, database: Database, wanted: dict[str, str]) -> dict[str, Any]:
        leaves = database.leaves(wanted["id"], self._readers())
        if "rev" in wanted:
            leaves = [leaf for leaf in leaves if leaf.rev == wanted["rev"]]
        found = [{"ok": _document(wanted["id"], leaf)} for leaf in leaves]
        missing = {"id": wanted["id"], "rev": wanted.get("rev", "undefined"), "error": "not_found", "reason": "missing"}
        return {"id": wanted["id"], "docs": found or [{"error": missing}]}

    def awaited_changes(self, name: str, query: Mapping[str, str], seconds: float) -> list[Any] | None:
        """What has changed, waited for; none after so many seconds, None where the database or the cluster ends."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while not self.stopping and name in self.databases:
                found: list[Any] = self.changes(name, query)["results"]
                if found or time.monotonic() >= deadline:
                    return found
                self.changed.wait(deadline - time.monotonic())
        return None

    def changes(self, name: str, query: Mapping[str, str]) -> dict[str, Any]:
        """What has changed behind ``since``, up to ``limit`` documents, in the order of their last changes."""
        copy = self.databases[name].copies[self._reader()]
        since = query.get("since", "0")
        number = copy.sequence if since == "now" else int(since.strip('"').partition("-")[0])
        every = query.get("style") == "all_docs"
        results = []
        for id_, sequence in copy.changed.items():
            if sequence <= number:
                continue
            if len(results) >= int(query.get("limit", len(copy.changed))):
                break
            leaves = sorted(copy.documents[id_].values(), key=Leaf.rank, reverse=True)
            row: dict[str, Any] = {"seq": f"{sequence}-g1", "id": id_}
            row["changes"] = [{"rev": leaf.rev} for leaf in (leaves if every else leaves[:1])]
            if leaves[0].deleted:
                row["deleted"] = True
            if query.get("include_docs") == "true":
                row["doc"] = _document(id_, leaves[0])
            results.append(row)
        last = results[-1]["seq"] if results else f"{max(number, 0)}-g1"
        return {"results": results, "last_seq": last, "pending": 0}

    def _purge(self, database: Database, request: Request) -> Answer:
        _require_admin(request)
        if not self.purges_permitted:
            return Answer(501, {"error": "not_implemented", "reason": "this server does not purge"})
        try:
            purged = database.purge(request.body, self.up())
        except Unacceptable as unacceptable:
            return Answer(400, {"error": "bad_request", "reason": str(unacceptable)})
        return Answer(201 if len(self.up()) == self._copies else 202, {"purge_seq": None, "purged": purged})

    def _of_document(self, name: str, database: Database, id_: str, request: Request) -> Answer:
        if request.method == "GET":
            return self._read(database, id_, request.query)
        document = dict(request.body or {}) | {"_id": id_}
        if request.method == "DELETE":
            document |= {"_deleted": True}
        if "rev" in request.query:
            document["_rev"] = request.query["rev"]
        result = self._write(name, database, document, request)
        if "error" in result:
            del result["id"]
            return Answer(409 if result["error"] == "conflict" else 403, result)
        return Answer(202 if result.pop("accepted", False) else 201, result)

    def _read(self, database: Database, id_: str, query: Mapping[str, str]) -> Answer:
        leaves = database.leaves(id_, self._readers())
        if query.get("open_revs") == "all":
            if not leaves:
                return Answer(404, {"error": "not_found", "reason": "missing"})
            path = _revisions if query.get("revs") == "true" else lambda _leaf: {}
            return Answer(200, [{"ok": _document(id_, leaf) | path(leaf)} for leaf in leaves])
        if "rev" in query:
            leaves = [leaf for leaf in leaves if leaf.rev == query["rev"]]
        if not leaves or (leaves[0].deleted and "rev" not in query):
            return Answer(404, {"error": "not_found", "reason": "deleted" if leaves else "missing"})
        document = _document(id_, leaves[0])
        for key, wanted in (("conflicts", False), ("deleted_conflicts", True)):
            others = [leaf.rev for leaf in leaves[1:] if leaf.deleted is wanted]
            if query.get(key) == "true" and others:
                document[f"_{key}"] = others
        return Answer(200, document)


_ALL_NAMES = (("startkey", '""'), ("endkey", '"\uffff"'))


def _is_among(request: Request, security: dict[str, Any], kind: str) -> bool:
    group = security.get(kind, {})
    named, roles = group.get("names", []), group.get("roles", [])
    everybody = kind == "members" and not named and not roles
    return everybody or ADMIN in request.roles or request.name in named or bool(request.roles.intersection(roles))


def _require_admin(request: Request) -> None:
    if ADMIN not in request.roles:
        raise Answer(401, {"error": "unauthorized", "reason": "You are not a server admin."})


def _require_database_admin(request: Request, database: Database) -> None:
    if not _is_among(request, database.security, "admins"):
        raise Answer(401, {"error": "unauthorized", "reason": "You are not a db or server admin."})


def _document(id_: str, leaf: Leaf) -> dict[str, Any]:
    return {"_id": id_, "_rev": leaf.rev} | leaf.body | ({"_deleted": True} if leaf.deleted else {})


def _revisions(leaf: Leaf) -> dict[str, Any]:
    """How a revision came about, as a document tells it."""
    start = int(leaf.rev.partition("-")[0])
    return {"_revisions": {"start": start, "ids": [rev.partition("-")[2] for rev in (leaf.rev, *leaf.path)]}}


def _row(id_: str, leaves: Mapping[str, Leaf], with_document: bool, conflicts: bool) -> dict[str, Any]:
    winner = visible(leaves.values())
    assert winner is not None
    row: dict[str, Any] = {"id": id_, "key": id_, "value": {"rev": winner.rev}}
    if with_document:
        others = [leaf.rev for leaf in leaves.values() if leaf is not winner and not leaf.deleted]
        row["doc"] = _document(id_, winner) | ({"_conflicts": others} if conflicts and others else {})
    return row


@contextmanager
def playing(
    *, copies: int = 3, users: Mapping[str, tuple[str, Collection[str]]] | None = None
) -> Iterator[CouchDBCluster]:
    """A cluster that answers as long as this lasts."""
    cluster = CouchDBCluster(copies=copies, users=users)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.kill()
