"""What an operator should change at a CouchDB: what could lose what we keep there, stop it, or let it grow for ever."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from ekiden_couchdb.client import Client
from ekiden_couchdb.coordinators import Coordinators
from ekiden_couchdb.events import lasting_database
from ekiden_couchdb.purging import may_purge
from ekiden_couchdb.tidying import make_index

_OLDEST = (3, 0)
_ENCODED, _OVERHEAD_BYTES = 4 / 3, 64 * 1024
"""A body's size in a document, and what there is besides."""

_SAFE_COPIES = 3
_CONNECTIONS = 8
"""So many are made to find out whether they all lead to the same node."""
_FORBIDDEN = range(400, 500)


def warnings_about(client: Client, holds: str, coordinators: Coordinators) -> list[str]:
    """One sentence for each thing that should be different. Raises what the client raises.

    ``holds``: "messages" or "results". That the databases of messages grow is for ``generations`` to tell.
    """
    found = [*_of_version(client), *_of_rights(client), *_of_nodes(client, holds), *coordinators.differences()]
    if holds == "results":
        found += _of_results(client)
    else:
        found += [*_of_sizes(client), *_of_events(client)]
    return [f"{client.place}: {sentence}." for sentence in found]


def _of_version(client: Client) -> Iterator[str]:
    said = client.ask("GET", "/").body
    if not isinstance(said, dict) or "couchdb" not in said:
        welcome = (
            (name for name, text in said.items() if str(text).startswith("Welcome")) if isinstance(said, dict) else ()
        )
        name = next(iter(welcome), "something else")  # {"express-pouchdb": "Welcome!", ...}
        yield f"it is {name}, not CouchDB: what ekiden promises of CouchDB is not known of it, so use it for tests only"
        return
    version = str(said.get("version", ""))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers and numbers < _OLDEST:
        yield f"CouchDB {version} is too old: use 3.0 or newer"


def _of_rights(client: Client) -> Iterator[str]:
    if client.options.auth == "session" or client.place.username is not None:
        return
    session = client.ask("GET", "/_session", accept=_FORBIDDEN).body
    who = session.get("userCtx", {}) if isinstance(session, dict) else {}
    if "_admin" in who.get("roles", ()):
        yield "everybody is an administrator there, without a password: set one for the user admin"


def _of_nodes(client: Client, holds: str) -> Iterator[str]:
    answer = client.ask("GET", "/_membership", accept=_FORBIDDEN)
    if answer.status != HTTPStatus.OK:
        return
    members, present = set(answer.body["cluster_nodes"]), set(answer.body["all_nodes"])
    if away := sorted(members - present):
        yield f"{len(away)} of {len(members)} nodes of the cluster are away ({', '.join(away)}): bring them back"
    if len(members) == 1:
        if len(client.addresses()) > 1:
            yield (
                f"it is no node of a cluster, and the URL names {len(client.addresses())} servers: what is stored at "
                "one is not at the others, so name one of them"
            )
        return
    if len(client.addresses()) == 1 and len(reached := client.nodes_reached(_CONNECTIONS)) > 1:
        yield (
            f"behind this address are several nodes of the cluster ({', '.join(sorted(reached))}), and only one node "
            "can tell exactly who of several was first: name the nodes themselves in the URL, one after another"
        )
    copies = client.options.n or _copies(client)
    if copies is not None and copies < _SAFE_COPIES:
        yield (
            f"new databases get {copies} copies, and only with 3 a quorum bears the loss of a node, so {holds} may be "
            "lost or out of reach with one node: set n=3 in the URL, or in the section [cluster]"
        )


def _copies(client: Client) -> int | None:
    """How many copies the cluster gives to new databases; None where we may not ask."""
    said = client.ask("GET", "/_node/_local/_config/cluster/n", accept=_FORBIDDEN)
    return int(said.body) if said.status == HTTPStatus.OK and str(said.body).isdigit() else None


def _of_sizes(client: Client) -> Iterator[str]:
    said = client.ask("GET", "/_node/_local/_config/couchdb/max_document_size", accept=_FORBIDDEN)
    needed = int(client.options.max_message_bytes * _ENCODED) + _OVERHEAD_BYTES
    if said.status == HTTPStatus.OK and str(said.body).isdigit() and int(said.body) < needed:
        yield (
            f"max_document_size is {said.body} bytes, and a message of max_message_bytes "
            f"({client.options.max_message_bytes}) takes {needed}: raise the one in the section [couchdb], or lower "
            "the other in the URL"
        )


def _of_events(client: Client) -> Iterator[str]:
    database = lasting_database(client)
    found = client.ask("GET", f"/{database}", accept=_FORBIDDEN)
    if found.status == HTTPStatus.OK:
        yield (
            f"all broadcasts are kept in {database}, which has {found.body.get('doc_count')} now: delete it and make "
            "it anew now and then while nobody works, or delete it and permit our user to make one for each day"
        )


def _of_results(client: Client) -> Iterator[str]:
    for database in map(client.database, ("results", "records")):
        if not _is_there(client, database):
            continue
        if not make_index(client, database):
            yield (
                f"what has expired in {database} is never deleted, because our user may not make an index there: make "
                "him an administrator of that database in its _security"
            )
        if not may_purge(client, database):
            yield (
                f"our user may not purge {database}, or the server cannot, so what is deleted there leaves a tombstone "
                "for ever: permit it, or let it be deleted as a whole now and then while nobody works"
            )


def _is_there(client: Client, database: str) -> bool:
    answer: Any = client.ask("GET", f"/{database}", accept=_FORBIDDEN)
    return bool(answer.status == HTTPStatus.OK)
