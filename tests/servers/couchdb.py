"""CouchDB servers of a test's own, and databases of a test's own at one that it shares.

What is started is pouchdb-server, which speaks the same protocol. A CouchDB itself is named in TESTS_COUCHDB_URL,
or runs in a container: to install and start one takes more than a test should.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import urllib3
from ekiden.urls import parse_url
from urllib3.exceptions import HTTPError

from tests.servers.install import POUCHDB_PROGRAM
from tests.servers.processes import HOST, CannotStart, ServerProcess, answers, find_program, free_port

ADVICE = "what stands in for it is installed by python3 tests/servers/install.py (needs npm)"


def pouchdb_command() -> list[str] | None:
    """What starts the server that stands in for CouchDB, if it is installed here."""
    node = find_program("node", "nodejs")
    return [node, str(POUCHDB_PROGRAM)] if node and POUCHDB_PROGRAM.exists() else None


class CouchDBServer(ServerProcess):
    """One server on a port of its own. ``in_memory``: nothing is kept, and all is quicker.

    ``username``: an administrator; then nobody else is one. Without, everybody is.
    """

    def __init__(
        self, directory: Path, *, in_memory: bool = False, username: str | None = None, password: str | None = None
    ) -> None:
        command = pouchdb_command()
        if command is None:
            raise CannotStart(f"no CouchDB is installed: {ADVICE}")
        self.port = free_port()
        self.username = username
        self.password = password
        databases, configuration = directory / "databases", directory / "config.json"
        databases.mkdir(parents=True, exist_ok=True)
        if not configuration.exists():
            configuration.write_text(json.dumps({"admins": {username: password}} if username else {}))
        command += ["--host", HOST, "--port", str(self.port), "--config", str(configuration), "--no-stdout-logs"]
        command += ["--in-memory"] if in_memory else ["--dir", str(databases)]
        super().__init__(f"couchdb-{self.port}", command, directory, is_ready=self._answers)

    @property
    def url(self) -> str:
        """Where it is; for its administrator, if it has one. Whoever uses it adds the prefix of its databases."""
        return self.url_as(self.username, self.password)

    def url_as(self, username: str | None, password: str | None) -> str:
        """The same, for another user."""
        credentials = f"{quote(username, safe='')}:{quote(password or '', safe='')}@" if username else ""
        return f"couchdb://{credentials}{HOST}:{self.port}/"

    def client(self) -> CouchDBClient:
        """What the test itself asks; close it, or use it in a ``with`` block."""
        return CouchDBClient(self.url)

    def _answers(self) -> bool:
        return answers(HOST, self.port) and couchdb_answers(self.url)


class GivenCouchDB:
    """A server that is there, of this host, as its administrator, whose name and password the URL holds."""

    def __init__(self, url: str) -> None:
        parsed = parse_url(url)
        assert parsed.username, f"{parsed} names no administrator; these tests need one"
        self.url = url
        self.username = parsed.username
        self.password = parsed.password or ""
        self.host = parsed.hosts[0].name
        self.port = parsed.hosts[0].port or 5984

    def url_as(self, username: str | None, password: str | None) -> str:
        """The same, for another user."""
        credentials = f"{quote(username, safe='')}:{quote(password or '', safe='')}@" if username else ""
        return f"couchdb://{credentials}{self.host}:{self.port}/"

    def client(self) -> CouchDBClient:
        """What the test itself asks; close it, or use it in a ``with`` block."""
        return CouchDBClient(self.url)

    @contextmanager
    def with_user(self, username: str, password: str, *, session_seconds: int) -> Iterator[None]:
        """There is a user who is nothing but a user, and sessions end after so long."""
        setting = "/_node/_local/_config/chttpd_auth/timeout"
        with self.client() as client:
            status, before = client.request("GET", setting)
            client.request("PUT", setting, str(session_seconds))
            client.add_user(username, password)
        try:
            yield
        finally:
            with self.client() as client:
                if status == 200:
                    client.request("PUT", setting, before)
                else:
                    client.request("DELETE", setting)
                client.remove_user(username)


class CouchDBClient:
    """Requests to the CouchDB of a URL, as its user."""

    def __init__(self, url: str) -> None:
        parsed = parse_url(url)
        host = parsed.hosts[0]
        secure = parsed.scheme == "couchdbs"
        self._origin = f"{'https' if secure else 'http'}://{host.name}:{host.port or (6984 if secure else 5984)}"
        user = f"{parsed.username}:{parsed.password or ''}" if parsed.username else None
        self._pool = urllib3.PoolManager(
            headers=urllib3.make_headers(basic_auth=user),
            timeout=urllib3.Timeout(connect=3.0, read=30.0),
            retries=False,
            ca_certs=parsed.options.get("cafile"),
        )

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """The status and the decoded answer. Raises urllib3's HTTPError when there is none."""
        answer = self._pool.request(method, f"{self._origin}{path}", json=body)
        return answer.status, json.loads(answer.data or b"null")

    def databases(self, prefix: str = "") -> list[str]:
        """The names of the databases there that begin with ``prefix``."""
        status, names = self.request("GET", "/_all_dbs")
        assert status == 200, names
        return [name for name in names if name.startswith(prefix)]

    def add_user(self, username: str, password: str) -> None:
        """Make a user who is nothing but a user."""
        user = {"name": username, "password": password, "roles": [], "type": "user"}
        status, said = self.request("PUT", f"/_users/org.couchdb.user:{quote(username, safe='')}", user)
        assert status == 201, said

    def remove_user(self, username: str) -> None:
        """Have there be no such user."""
        path = f"/_users/org.couchdb.user:{quote(username, safe='')}"
        status, said = self.request("GET", path)
        if status == 200:
            self.request("DELETE", f"{path}?rev={said['_rev']}")

    def permit(self, username: str, prefix: str) -> None:
        """Make somebody a member of every database whose name begins with ``prefix``."""
        for name in self.databases(prefix):
            security = {"members": {"names": [username], "roles": []}, "admins": {"names": [], "roles": ["_admin"]}}
            status, said = self.request("PUT", f"/{quote(name, safe='')}/_security", security)
            assert status == 200, said

    def close(self) -> None:
        """Close its connections."""
        self._pool.clear()

    def __enter__(self) -> CouchDBClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def couchdb_answers(url: str) -> bool:
    """Whether a CouchDB is there for which the user of ``url`` is an administrator."""
    with CouchDBClient(url) as client:
        try:
            status, said = client.request("GET", "/_session")
        except (HTTPError, ValueError):  # nobody, or somebody who speaks otherwise
            return False
    return status == 200 and isinstance(said, dict) and "_admin" in said.get("userCtx", {}).get("roles", [])


def remove_databases(url: str, prefix: str) -> None:
    """Delete every database whose name begins with ``prefix``."""
    with CouchDBClient(url) as client:
        for name in client.databases(prefix):
            status, said = client.request("DELETE", f"/{quote(name, safe='')}")
            assert status in {200, 202, 404}, said


def spoil_document(url: str, part: str, end: str, changes: dict[str, object]) -> None:
    """Change the one document, no note, whose id ends so in a database at ``url`` whose name contains ``part``."""
    with CouchDBClient(url) as client:
        for name in client.databases(parse_url(url).path):
            if part not in name:
                continue
            status, said = client.request("GET", f"/{quote(name, safe='')}/_all_docs?include_docs=true")
            assert status == 200, said
            found = [row["doc"] for row in said["rows"] if row["id"].endswith(end) and not row["id"].startswith("~")]
            if found:
                (document,) = found
                path = f"/{quote(name, safe='')}/{quote(document['_id'], safe='')}"
                status, said = client.request("PUT", path, {**document, **changes})
                assert status == 201, said
                return
    raise AssertionError(f"there is no document {end} in {part}")
