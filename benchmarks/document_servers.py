"""MongoDB and CouchDB, at a URL that is given, or started for the run: the real one or what stands in for it.

What is started is what tests/servers knows: mongod where it is installed, else SecantusDB, which speaks its protocol;
and pouchdb-server, which speaks CouchDB's. Both keep what they are given in a directory that goes with them.
"""

from __future__ import annotations

import itertools
import secrets
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from servers import refuse_other_machines

sys.path.append(str(Path(__file__).parent.parent))  # where tests/ is

from tests.servers.couchdb import CouchDBClient, remove_databases
from tests.servers.couchdb import CouchDBServer as StartedCouchDB
from tests.servers.mongodb import MongoDBServer as StartedMongoDB
from tests.servers.mongodb import a_client
from tests.servers.processes import CannotStart


class MongoDBServer:
    """A run has a database of its own, which is dropped after it; each measurement has collections of its own there."""

    broker = "mongodb"

    def __init__(self, url: str | None) -> None:
        self._started = None if url else _Started(StartedMongoDB)
        self._token = f"bench-{secrets.token_hex(4)}"
        self._url = _with_path(url or self._started.url, self._token)
        self._client = a_client(self._url)
        self._numbers = itertools.count(1)

    def environment(self, *, results: bool) -> dict[str, str]:
        name = f"q{next(self._numbers)}"
        found = {
            "BENCH_BROKER": self.broker,
            "BENCH_NAME": name,
            "BENCH_URL": self._url,
            "BENCH_EKIDEN_URL": f"{self._url}{'&' if '?' in self._url else '?'}prefix={name}",
        }
        return {**found, "BENCH_CELERY_RESULTS_URL": self._url} if results else found

    def described(self) -> str:
        version = self._client.server_info()["version"]
        set_name = self._client.admin.command("hello").get("setName")
        if set_name == "secantus":
            return f"SecantusDB, standing in for MongoDB {version}: its ratios say something, its figures do not"
        kind = f"replica set {set_name}" if set_name else "standalone"
        return f"MongoDB {version} at {urlsplit(self._url).hostname}, {kind}"

    def close(self) -> None:
        self._client.drop_database(self._token)
        self._client.close()
        if self._started is not None:
            self._started.close()


class CouchDBServer:
    """The names of a run's databases begin with its token; they are deleted after it."""

    broker = "couchdb"

    def __init__(self, url: str | None) -> None:
        self._started = None if url else _Started(StartedCouchDB)
        self._base = _with_path(url or self._started.url, "")
        self._token = f"bench-{secrets.token_hex(4)}"
        self._numbers = itertools.count(1)

    def environment(self, *, results: bool) -> dict[str, str]:
        name = f"{self._token}-q{next(self._numbers)}"
        return {
            "BENCH_BROKER": self.broker,
            "BENCH_NAME": name,
            "BENCH_URL": self._base,
            "BENCH_EKIDEN_URL": _with_path(self._base, name),
        }

    def described(self) -> str:
        with CouchDBClient(self._base) as client:
            _, said = client.request("GET", "/")
        if "couchdb" not in said:
            version = said.get("version")
            return f"pouchdb-server {version}, standing in for CouchDB: its ratios say something, its figures do not"
        return f"CouchDB {said['version']} at {urlsplit(self._base).hostname}"

    def close(self) -> None:
        remove_databases(self._base, self._token)
        if self._started is not None:
            self._started.close()


class _Started:
    """A server of the run's own, with what it keeps on disk."""

    def __init__(self, kind: type[StartedMongoDB] | type[StartedCouchDB]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)
        try:
            self._server = kind(Path(self._directory.name))
            self._server.start()
        except CannotStart as error:
            self._directory.cleanup()
            raise SystemExit(f"{error}; or name a server on this machine with --url") from error

    @property
    def url(self) -> str:
        return self._server.url

    def close(self) -> None:
        self._server.kill()
        self._directory.cleanup()


def _with_path(url: str, path: str) -> str:
    """``url`` with this path, and its options. Refuses what is on other machines."""
    refuse_other_machines(url)
    return urlsplit(url)._replace(path=f"/{path}").geturl()
