"""A CouchDB cluster of three, played by threads of the tests' own process: what it answers when its copies differ.

What only several nodes answer cannot be seen on one. This has as much of the API as ekiden uses, and copies
(``couchdb_copies``) that a test takes apart. Its answers are those that CouchDB 3.5.0 was seen to give, as one node or
three (n=3), or, where it says "source", that its source gives; what is not listed is as its documentation says.

    request                                          answer, and where it was seen
    POST _bulk_docs, a copy or two have the write    201, the document's row has "accepted": true; three nodes, each
                                                     writing the same revision through another one
    POST _bulk_docs "new_edits": false               201 [], also with two of three nodes down; source: force_reply of
                                                     fabric_doc_update keeps the health of identical replies
    POST _bulk_docs, two of three nodes down         every row "accepted": true
    GET ID                                           the first two copies that agree on the visible revision; of their
                                                     ``_deleted_conflicts`` those of the first; source: fabric_doc_open,
                                                     fabric_util:make_key
    GET ID?open_revs=all                             what the copies hold together, until a further one adds nothing;
                                                     source: fabric_doc_open_revs
    GET _all_docs, _changes                          what one copy holds, which may be behind (r=1)
    POST _bulk_docs to a database of a moment ago    now and then 500 unknown_error, function_clause; three nodes, where
                                                     another one has not heard of it yet (a test asks for it: ``fail``)
    POST _purge                                      afterwards ``internal_replication_jobs`` is above 0 for a while
                                                     (``jobs_after_purge``); more than 100 ids: 400, 3.5.0
    GET _up, _node/_local                            source: chttpd_misc, chttpd_node
    a document or attachment that is too large       413 for the whole request; source: chttpd_db, chttpd
    POST or PUT without a session, a right, a database; TLS; Date      ``couchdb_http``

What a test does to it:

    divert("messages", {1})       the next write to such a database reaches this copy only: it is `accepted`
    replicate()                   the copies meet, and the losers' branches become visible
    down = {2}                    a node's copies are away; any other node coordinates
    stop(0), start_again(0)       a node does not answer any more, and its copies are away; it is there again
    read_from = 1                 which copy answers first
    advance(60)                   the servers' clock jumps
    date_phase[0] = 0.4           so much later than the second node 0 renews its Date
    fail("POST", "_bulk_docs", 503)      the next such request is answered with that, and not carried out
    after("POST", "_bulk_docs", act)     ``act`` is called between the next such request and its answer
    users, purges_permitted       who may do what
    end_sessions()                every session has ended
    validation                    whether databases that are created from now on run validation functions

One server with ``copies=1`` answers as a single node does.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

from tests.servers.couchdb_copies import DESIGN, ENFORCED, QUORUM, Database, Leaf, Unacceptable, living, visible
from tests.servers.couchdb_http import ADMIN, Answer, PlayedServer, Request
from tests.servers.processes import HOST

NOT_HEARD_OF = {"error": "unknown_error", "reason": "function_clause", "ref": 3_141_592_653}
"""With a status of 500: what 3.5.0 says where another node has not heard yet of a database."""

_ADMINS_ONLY = {"members": {"roles": [ADMIN]}, "admins": {"roles": [ADMIN]}}
_NAME = re.compile(r"[a-z][a-z0-9_$()+/-]*")
_ATTACHMENTS = "_attachments"


@dataclass
class _Failure:
    method: str
    pattern: re.Pattern[str]
    status: int
    body: Any
    skipped: int
    left: int
    carried_out: bool


class CouchDBCluster:
    """The cluster: its state, what a test does to it, and what it answers. ``changed`` guards everything in it."""

    def __init__(self, *, copies: int = 3, users: Mapping[str, tuple[str, Collection[str]]] | None = None) -> None:
        self.changed = threading.Condition()
        self.databases: dict[str, Database] = {}
        self.users = dict(users or {})
        self.down: set[int] = set()
        self.read_from = 0
        self.replication_jobs = 0
        self.jobs_after_purge = 0
        self.purges_permitted = True
        self.validation = ENFORCED
        self.largest_document_bytes = 8_000_000
        self.largest_attachment_bytes = 1 << 30
        self.date_phase = dict.fromkeys(range(copies), 0.0)
        self.stopping = False
        self.requests: list[tuple[str, str, int]] = []
        self.asked: list[int] = []
        self._copies = copies
        self._ahead = 0.0
        self._diversions: list[tuple[str, Collection[int]]] = []
        self._failures: list[_Failure] = []
        self._interruptions: list[tuple[str, re.Pattern[str], Callable[[], object]]] = []
        self._sessions: dict[str, str] = {}
        self._locals: dict[tuple[str, str], dict[str, Any]] = {}
        self._nodes = {number: PlayedServer(self, number) for number in range(copies)}
        self._ports = {number: node.server_address[1] for number, node in self._nodes.items()}
        self._threads: dict[int, threading.Thread] = {}

    # What a test does to it.

    def start(self) -> None:
        """Answer from now on."""
        for number, node in self._nodes.items():
            thread = threading.Thread(target=node.serve_forever, args=(0.05,), name=f"couchdb-cluster-{number}")
            self._threads[number] = thread
            thread.start()

    def kill(self) -> None:
        """Answer no more, and end all feeds."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        for number in list(self._nodes):
            self._close(number)

    def stop(self, number: int) -> None:
        """This node is killed: it answers nobody, and its copies are away."""
        with self.changed:
            self.down.add(number)
            self.changed.notify_all()
        self._close(number)

    def start_again(self, number: int) -> None:
        """This node is there again, on the same port, with what it held before."""
        self._nodes[number] = node = PlayedServer(self, number, self._ports[number])
        self._threads[number] = threading.Thread(
            target=node.serve_forever, args=(0.05,), name=f"couchdb-cluster-{number}"
        )
        with self.changed:
            self.down.discard(number)
        self._threads[number].start()

    def address(self, number: int = 0) -> str:
        """Where a node is, as URLs write it."""
        return f"{HOST}:{self._ports[number]}"

    def url(self, prefix: str, *, user: str | None = None, options: str = "", through: Sequence[int] = (0,)) -> str:
        """The URL of a place there. ``through``: the nodes that it names, in their order."""
        who = "" if user is None else f"{user}:{self.users[user][0]}@"
        return f"couchdb://{who}{','.join(map(self.address, through))}/{prefix}{options}"

    def advance(self, seconds: float) -> None:
        """The servers' clock jumps ahead."""
        self._ahead += seconds

    def end_sessions(self) -> None:
        """Every session ends, as after ten minutes without a request."""
        with self.changed:
            self._sessions.clear()

    def divert(self, part: str, reaches: Collection[int]) -> None:
        """The next write to a database whose name contains ``part`` reaches these copies only."""
        with self.changed:
            self._diversions.append((part, reaches))

    def fail(
        self,
        method: str,
        pattern: str,
        status: int,
        *,
        body: Any = None,
        skipping: int = 0,
        times: int = 1,
        carried_out: bool = False,
    ) -> None:
        """So many requests of this method, to paths with this in them, are answered so and not carried out.

        ``skipping``: so many are carried out before. ``carried_out``: they are carried out all the same.
        """
        said = body if body is not None else {"error": "trouble", "reason": f"a test asked for {status}"}
        with self.changed:
            self._failures.append(_Failure(method, re.compile(pattern), status, said, skipping, times, carried_out))

    def after(self, method: str, pattern: str, act: Callable[[], object]) -> None:
        """Call ``act`` once the next request of this method, to such a path, was carried out; then answer that."""
        with self.changed:
            self._interruptions.append((method, re.compile(pattern), act))

    def serve_again(self) -> None:
        """Nothing fails any more."""
        with self.changed:
            self._failures.clear()

    def replicate(self, part: str = "", *, source: int | None = None, target: int | None = None) -> None:
        """The nodes that are up exchange what they hold, in databases whose name contains ``part``.

        ``source`` and ``target``: one tells another what it holds, and nobody else hears of it yet.
        """
        with self.changed:
            for name, database in self.databases.items():
                if part not in name:
                    continue
                if source is None or target is None:
                    database.replicate(self.up())
                else:
                    database.tell(source, target)

    def plant(self, name: str, *documents: dict[str, Any]) -> None:
        """Put documents into a database, whatever they say, over those that are there."""
        with self.changed:
            if name not in self.databases:
                self.databases[name] = Database(self._copies, self.validation)
                self.databases[name].security = dict(_ADMINS_ONLY)
            database = self.databases[name]
            for document in documents:
                found = database.leaves(document["_id"], self.up())
                revision = {"_rev": found[0].rev} if found else {}
                said = database.write({**document, **revision}, self.up())
                assert "error" not in said, said
            self.changed.notify_all()

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

    def now(self) -> float:
        """What the servers' clocks show, in seconds since the epoch."""
        return time.time() + self._ahead

    def date(self, node: int) -> str:
        """The Date of an answer of this node: the second in which it was renewed last."""
        return formatdate(math.floor(self.now() - self.date_phase[node]), usegmt=True)

    def user_of(self, cookie: str) -> str | None:
        """Whose session this is; None for one that has ended."""
        with self.changed:
            return self._sessions.get(cookie)

    def refused_unread(self, request: Request) -> Answer | None:
        """What a request is answered before its body is read; None: read on."""
        name, *rest = request.path
        with self.changed:
            try:
                if not name.startswith("_") and rest:
                    self._database(name, request)
            except Answer as refusal:
                self._note(request, refusal)
                return refusal
        return None

    def answer(self, request: Request) -> Answer:
        """Carry ``request`` out."""
        path = "/" + "/".join(request.path)
        with self.changed:
            try:
                answer = self._failure(request, path) or self._carry_out(request)
            except Answer as answered:
                answer = answered
            self._note(request, answer)
            acts = [each for each in self._interruptions if each[0] == request.method and each[1].search(path)][:1]
            for each in acts:
                self._interruptions.remove(each)
            self.changed.notify_all()
        for _, _, act in acts:
            act()
        return answer

    def _note(self, request: Request, answer: Answer) -> None:
        self.requests.append((request.method, "/" + "/".join(request.path), answer.status))
        self.asked.append(request.node)

    def _close(self, number: int) -> None:
        node, thread = self._nodes[number], self._threads.pop(number, None)
        if thread is not None and thread.is_alive():
            node.shutdown()
            thread.join()
        node.cut_all()
        node.server_close()

    def _failure(self, request: Request, path: str) -> Answer | None:
        for failure in self._failures:
            if not failure.left or failure.method != request.method or not failure.pattern.search(path):
                continue
            if failure.skipped:
                failure.skipped -= 1
                continue
            failure.left -= 1
            if failure.carried_out:
                self._carry_out(request)
            return Answer(failure.status, failure.body)
        return None

    def _carry_out(self, request: Request) -> Answer:
        match request.path:
            case [""] | []:
                return Answer(200, {"couchdb": "Welcome", "version": "3.5.0", "vendor": {"name": "the tests"}})
            case ["_up"]:
                return Answer(200, {"status": "ok", "seeds": {}})
            case ["_session"]:
                return self._session(request)
            case ["_membership"]:
                nodes = [f"couchdb@{number}" for number in range(self._copies)]
                return Answer(200, {"all_nodes": [nodes[number] for number in self.up()], "cluster_nodes": nodes})
            case ["_all_dbs"]:
                _require_admin(request)
                first, last = (json.loads(request.query.get(key, text)) for key, text in _ALL_NAMES)
                return Answer(200, sorted(name for name in self.databases if first <= name <= last))
            case ["_node", "_local"]:
                _require_admin(request)
                return Answer(200, {"name": f"couchdb@{request.node}"})
            case ["_node", _, "_system"]:
                _require_admin(request)
                jobs = self.replication_jobs
                if self.jobs_after_purge and any(database.purges for database in self.databases.values()):
                    self.jobs_after_purge -= 1
                    jobs += 1
                return Answer(200, {"internal_replication_jobs": jobs})
            case ["_node", _, "_config", *_]:
                _require_admin(request)
                return Answer(404, {"error": "not_found", "reason": "unknown_config_value"})
            case [name]:
                return self._of_database(name, request)
            case [name, *rest]:
                database = self._database(name, request)
                return self._of_documents(name, database, rest, request)
        raise AssertionError(request.path)

    def _session(self, request: Request) -> Answer:
        if request.method != "POST":
            return Answer(200, {"ok": True, "userCtx": {"name": request.name, "roles": sorted(request.roles)}})
        name, password = request.body["name"], request.body["password"]
        known = self.users.get(name)
        if known is None or known[0] != password:
            return Answer(401, {"error": "unauthorized", "reason": "Name or password is incorrect."})
        cookie = os.urandom(16).hex()
        self._sessions[cookie] = name
        headers = {"Set-Cookie": f"AuthSession={cookie}; Version=1; Path=/; HttpOnly"}
        return Answer(200, {"ok": True, "name": name, "roles": sorted(known[1])}, headers)

    def _of_database(self, name: str, request: Request) -> Answer:
        if not _NAME.fullmatch(name):
            raise Answer(400, {"error": "illegal_database_name", "reason": f"Name: '{name}'. Only lowercase ..."})
        match request.method:
            case "PUT":
                _require_admin(request)
                if name in self.databases:
                    reason = "The database could not be created, the file already exists."
                    return Answer(412, {"error": "file_exists", "reason": reason})
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
            case ["_local", *local]:
                return self._of_local(name, "/".join(local), request)
            case ["_index"]:
                _require_database_admin(request, database)
                return self._index(name, database, request)
            case ["_find"]:
                return Answer(200, {"docs": list(self._ended(database, request.body)), "bookmark": "nil"})
            case [system] if system.startswith("_"):
                return Answer(404, {"error": "not_found", "reason": "missing"})
        return self._of_document(name, database, "/".join(rest), request)

    def _bulk_docs(self, name: str, database: Database, request: Request) -> Answer:
        documents = request.body["docs"]
        for document in documents:
            self._check_size(document)
        if request.body.get("new_edits", True):
            return Answer(201, [self._write(name, database, document, request) for document in documents])
        answers = [database.replicated(document, self._reached(name, request)) for document in documents]
        return Answer(201, [answer for answer in answers if answer is not None])

    def _check_size(self, document: dict[str, Any]) -> None:
        """A document that is too large, without its attachments, ends the request for all; source: chttpd_db."""
        attachments = document.get(_ATTACHMENTS, {})
        alone = {key: value for key, value in document.items() if key != _ATTACHMENTS}
        if len(json.dumps(alone)) > self.largest_document_bytes:
            raise Answer(413, {"error": "document_too_large", "reason": document["_id"]})
        for name, attachment in attachments.items():
            if len(attachment["data"]) * 3 // 4 > self.largest_attachment_bytes:
                raise Answer(413, {"error": "attachment_too_large", "reason": name})

    def _of_local(self, name: str, id_: str, request: Request) -> Answer:
        """Documents that are neither replicated nor told of; here all copies have the same."""
        known = self._locals.get((name, id_))
        if request.method == "GET":
            return Answer(404, {"error": "not_found", "reason": "missing"}) if known is None else Answer(200, known)
        if known is not None and request.body.get("_rev") != known["_rev"]:
            return Answer(409, {"error": "conflict", "reason": "Document update conflict."})
        number = 1 if known is None else int(known["_rev"].partition("-")[2]) + 1
        self._locals[name, id_] = request.body | {"_id": f"_local/{id_}", "_rev": f"0-{number}"}
        return Answer(201, {"ok": True, "id": f"_local/{id_}", "rev": f"0-{number}"})

    def _index(self, name: str, database: Database, request: Request) -> Answer:
        id_ = f"{DESIGN}{request.body['ddoc']}"
        is_new = visible(database.leaves(id_, self.up())) is None
        if is_new:
            self._write(name, database, {"_id": id_, "language": "query"}, request)
        said = {"result": "created" if is_new else "exists", "id": id_, "name": request.body["name"]}
        return Answer(200, said)

    def _ended(self, database: Database, wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What the one selector that ekiden uses finds, in one copy."""
        bounds = wanted["selector"]["ends"]
        copy = database.copies[self._reader()]
        found = (
            {"_id": id_, "_rev": leaf.rev}
            for id_, leaf in living(copy)
            if type(end := leaf.body.get("ends")) in {int, float} and bounds["$gt"] < end < bounds["$lt"]
        )
        return itertools.islice(found, wanted["limit"])

    def _revs_diff(self, database: Database, asked: dict[str, list[str]]) -> dict[str, Any]:
        missing: dict[str, Any] = {}
        for id_, revisions in asked.items():
            leaves = database.leaves(id_, self._replies()[:1])
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

    def _replies(self) -> list[int]:
        """The copies in the order in which they answer a coordinator."""
        first = self._reader()
        return [first, *[number for number in self.up() if number != first]]

    def _leaves_of_one(self, database: Database, id_: str) -> list[Leaf]:
        """What one document is read as (r=2): as the first copy has it that agrees with another on what is visible."""
        enough = min(QUORUM, self._copies)
        replies: list[list[Leaf]] = []
        for number in self._replies():
            replies.append(database.leaves(id_, [number]))
            same = [each for each in replies if each[:1] == replies[-1][:1]]
            if len(same) >= enough:
                return same[0]
        return database.leaves(id_, self.up())

    def _open_leaves(self, database: Database, id_: str) -> list[Leaf]:
        """All leaves that the copies hold together, until one adds nothing to those before (r=2)."""
        enough = min(QUORUM, self._copies)
        asked: list[int] = []
        before: list[Leaf] | None = None
        for number in self._replies():
            asked.append(number)
            found = database.leaves(id_, asked)
            alone = database.leaves(id_, [number])
            if len(asked) >= enough and found == before and len(alone) == len(found):
                break
            before = found
        return database.leaves(id_, asked)

    def _rows(self, database: Database, request: Request) -> Iterator[dict[str, Any]]:
        query, body = request.query, request.body or {}
        copy = database.copies[self._reader()]
        with_documents = query.get("include_docs") == "true" or body.get("include_docs") is True
        conflicts = query.get("conflicts") == "true"
        row_of = functools.partial(_row, with_document=with_documents, conflicts=conflicts, whole=_whole(query))
        if "keys" in body:
            for id_ in body["keys"]:
                winner = copy.winner(id_)
                if winner is None:
                    yield {"key": id_, "error": "not_found"}
                elif winner.deleted:
                    row = {"id": id_, "key": id_, "value": {"rev": winner.rev, "deleted": True}}
                    yield row | ({"doc": None} if with_documents else {})
                else:
                    yield row_of(id_, copy.documents[id_])
            return
        first = json.loads(query.get("startkey", query.get("start_key", '""')))
        last = json.loads(query.get("endkey", query.get("end_key", '"\uffff"')))
        exclusive = query.get("inclusive_end") == "false"
        ids = sorted(id_ for id_, _ in living(copy) if first <= id_ <= last and not (exclusive and id_ == last))
        if query.get("descending") == "true":
            ids.reverse()
        skipped = int(query.get("skip", "0"))
        for id_ in ids[skipped : skipped + int(query.get("limit", len(ids)))]:
            yield row_of(id_, copy.documents[id_])

    def _bulk_get(self, database: Database, wanted: dict[str, str]) -> dict[str, Any]:
        leaves = self._open_leaves(database, wanted["id"])
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
        if query.get("open_revs") == "all":
            leaves = self._open_leaves(database, id_)
            if not leaves:
                return Answer(404, {"error": "not_found", "reason": "missing"})
            path = _revisions if query.get("revs") == "true" else lambda _leaf: {}
            return Answer(200, [{"ok": _document(id_, leaf, whole=_whole(query)) | path(leaf)} for leaf in leaves])
        leaves = self._leaves_of_one(database, id_)
        if "rev" in query:
            leaves = [leaf for leaf in self._open_leaves(database, id_) if leaf.rev == query["rev"]]
        if not leaves or (leaves[0].deleted and "rev" not in query):
            return Answer(404, {"error": "not_found", "reason": "deleted" if leaves else "missing"})
        document = _document(id_, leaves[0], whole=_whole(query))
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


def _whole(query: Mapping[str, str]) -> bool:
    return query.get("attachments") == "true"


def _document(id_: str, leaf: Leaf, *, whole: bool = False) -> dict[str, Any]:
    """``whole``: with the data of its attachments."""
    document = {"_id": id_, "_rev": leaf.rev} | leaf.body | ({"_deleted": True} if leaf.deleted else {})
    if _ATTACHMENTS in document and not whole:
        stubs = {
            name: {"content_type": each["content_type"], "stub": True} for name, each in document[_ATTACHMENTS].items()
        }
        document[_ATTACHMENTS] = stubs
    return document


def _revisions(leaf: Leaf) -> dict[str, Any]:
    """How a revision came about, as a document tells it."""
    start = int(leaf.rev.partition("-")[0])
    return {"_revisions": {"start": start, "ids": [rev.partition("-")[2] for rev in (leaf.rev, *leaf.path)]}}


def _row(id_: str, leaves: Mapping[str, Leaf], *, with_document: bool, conflicts: bool, whole: bool) -> dict[str, Any]:
    winner = visible(leaves.values())
    assert winner is not None
    row: dict[str, Any] = {"id": id_, "key": id_, "value": {"rev": winner.rev}}
    if with_document:
        others = [leaf.rev for leaf in leaves.values() if leaf is not winner and not leaf.deleted]
        row["doc"] = _document(id_, winner, whole=whole) | ({"_conflicts": others} if conflicts and others else {})
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
