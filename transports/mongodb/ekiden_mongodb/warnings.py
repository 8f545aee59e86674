"""What an operator should change at a MongoDB server: what could lose what we keep there, or make it slow.

Much of it only those may ask who look after the server. What this user may not ask, or a work-alike cannot tell, is
passed over: the role readWrite is all that is needed otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from pymongo.database import Database
from pymongo.errors import OperationFailure

from ekiden_mongodb.client import Client, Features
from ekiden_mongodb.documents import CLAIM_INDEX, MESSAGES, REPLIES
from ekiden_mongodb.feeds import Feed
from ekiden_mongodb.watching import probe

_OLD = (4, 4)
_NEARLY_FULL = 0.9
_MOST_OFFSET_SECONDS = 1.0
_VANISHING = {"messages": (MESSAGES, REPLIES), "results": ("results", "joins", "outcomes", "records")}
_FEEDS = {"messages": "signals", "results": "ended"}
_ACTIONS = ("find", "insert", "update", "remove", "createCollection", "createIndex", "listCollections")

Answer = dict[str, Any]


def warnings_about(client: Client, holds: str) -> list[str]:
    """One sentence for each thing that should be different. Raises what the client raises.

    ``holds``: what we keep there, "messages" or "results".
    """
    features = client.features()
    offset = time.time() - client.server_time()
    with client.asking():
        found = [
            *_of_version(features),
            *_of_members(client, features, holds),
            *_of_rights(client),
            *_of_waking(client, features, holds),
            *_of_parameters(client, holds),
            *_of_collections(client, features, holds),
            *_of_disk(client, holds),
        ]
    if abs(offset) > _MOST_OFFSET_SECONDS:
        found.append(
            f"its clock and that of this machine differ by {abs(offset):.0f} s; what is due is due by its clock: "
            "have all machines synchronise theirs (NTP)"
        )
    return [f"{client.place}: {sentence}." for sentence in found]


def _of_version(features: Features) -> Iterator[str]:
    if features.product == "MongoDB" and features.version[:2] < _OLD:
        version = ".".join(map(str, features.version))
        yield f"MongoDB {version} gets no corrections any more: update it step by step, to 7.0 or newer"


def _of_members(client: Client, features: Features, holds: str) -> Iterator[str]:
    if not features.is_replica_set and not features.is_sharded:
        after = (
            ", and no transactions: what follows from a message is published before the message is deleted, so a crash "
            "between the two publishes it again"
            if holds == "messages"
            else ""
        )
        yield (
            f"it is one server alone, not a replica set: when its disk is lost all {holds} are, and it has no change "
            f"streams{after}; make it a replica set (--replSet), of three members best, of one at least"
        )
        return
    hello = _told(client.mongo.admin, hello=1)
    members = [*hello.get("hosts", ()), *hello.get("passives", ())]
    if hello.get("arbiters") and len(members) < 3:  # of three a majority survives one
        yield (
            f"it has {len(members)} members that hold data, and an arbiter: while one of them is away no {holds} are "
            "taken, because a majority cannot store them; put a third member in the arbiter's place"
        )


def _of_rights(client: Client) -> Iterator[str]:
    told = _told(client.mongo.admin, connectionStatus=1, showPrivileges=True).get("authInfo", {})
    privileges = told.get("authenticatedUserPrivileges")
    if not told.get("authenticatedUsers") or not privileges:
        return  # nobody is asked who they are, or a work-alike does not say what they may do
    missing = missing_rights(privileges, client.place.database, client.options.prefix)
    if missing:
        yield (
            f"the user {client.place.username!r} may not {', '.join(missing)} in the database "
            f"{client.place.database!r}: grant the role readWrite on it"
        )


def missing_rights(privileges: Sequence[Answer], database: str, prefix: str) -> list[str]:
    """What is needed here and not among ``privileges``, as connectionStatus tells them."""
    granted: set[str] = set()
    for privilege in privileges:
        resource = privilege.get("resource", {})
        name = resource.get("collection")
        is_ours = resource.get("db") in {"", database} and (name == "" or str(name).startswith(f"{prefix}."))
        if is_ours or resource.get("anyResource"):
            granted.update(privilege.get("actions", ()))
    return [action for action in _ACTIONS if action not in granted and "anyAction" not in granted]


def _of_waking(client: Client, features: Features, holds: str) -> Iterator[str]:
    reasons = probe(Feed(client, _FEEDS[holds], max_bytes=2**20))
    if features.change_streams and reasons:
        why = reasons[0].partition(": ")[2]
        yield (
            f"its change streams cannot be used ({why}), so who waits is woken later and asks more often: permit "
            "changeStream to this user, or enable them"
        )
    elif len(reasons) > 1:
        yield "it has neither change streams nor tailable cursors, so who waits asks it again and again"


def _of_parameters(client: Client, holds: str) -> Iterator[str]:
    parameters = _told(client.mongo.admin, getParameter=1, ttlMonitorEnabled=1)
    if parameters.get("ttlMonitorEnabled") is False:
        yield "it deletes nothing that has expired: set the parameter ttlMonitorEnabled to true"
    engine = _told(client.mongo.admin, serverStatus=1).get("storageEngine", {})
    if engine.get("persistent") is False:
        yield f"it keeps nothing on disk, so a restart loses all {holds}: use the storage engine wiredTiger"


def _of_collections(client: Client, features: Features, holds: str) -> Iterator[str]:
    for name in _VANISHING[holds]:
        collection = client.collection(name)
        try:
            indexes = collection.index_information()
        except OperationFailure:
            continue
        if not indexes:
            continue  # it is made when it is used first
        if not any(each.get("expireAfterSeconds") is not None for each in indexes.values()):
            yield (
                f"{collection.full_name} has no TTL index, so what has expired is never deleted: create the index "
                "{x: 1} with expireAfterSeconds 0"
            )
        if name == MESSAGES and not any(list(each.get("key", ())) == CLAIM_INDEX for each in indexes.values()):
            keys = ", ".join(f"{key}: {way}" for key, way in CLAIM_INDEX)
            yield f"{collection.full_name} has no index to claim by, so nothing can be received: create {{{keys}}}"
        if features.is_sharded and _told(client.database, collStats=collection.name).get("sharded"):
            yield (
                f"{collection.full_name} is sharded, so every shard is asked for what one of them has: leave it on "
                "one shard"
            )


def _of_disk(client: Client, holds: str) -> Iterator[str]:
    told = _told(client.database, dbStats=1)
    used, total = told.get("fsUsedSize", 0), told.get("fsTotalSize", 0)
    if total and used > _NEARLY_FULL * total:
        yield (
            f"its disk is nearly full: {used / 2**30:.0f} of {total / 2**30:.0f} GiB; when it is full it takes no "
            f"{holds}: make room"
        )


def _told(database: Database[Answer], **command: object) -> Answer:
    """The answer to a command; nothing where it may not be asked or is not known."""
    try:
        return database.command(command)
    except OperationFailure:
        return {}
