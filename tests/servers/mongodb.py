"""MongoDB servers of a test's own: mongod where it is installed, else SecantusDB, which speaks the same protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from ekiden.urls import parse_url
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from tests.servers.certificates import Certificates
from tests.servers.install import SECANTUS_PROGRAM
from tests.servers.processes import HOST, CannotStart, ServerProcess, answers, find_program, free_port

DATABASE = "ekiden-tests"
"""All that tests make is in this database."""

ADVICE = "install it, or what stands in for it: python3 tests/servers/install.py"

_PORT = 27_017
_REPLICA_SET = "tests"


def mongod_program() -> str | None:
    """MongoDB itself, if it is installed here."""
    return find_program("mongod")


def secantus_program() -> str | None:
    """What stands in for it, if it is installed here."""
    return str(SECANTUS_PROGRAM) if SECANTUS_PROGRAM.exists() else None


def mongodb_program() -> str | None:
    """The server that ``MongoDBServer`` starts."""
    return mongod_program() or secantus_program()


class MongoDBServer(ServerProcess):
    """One server on a port of its own, a replica set of one member; what it has written is kept in ``directory``.

    ``standalone``: no replica set, so no change streams and no transactions. ``username``: it asks everybody who they
    are, and this is a user who may do everything. ``certificates``: it speaks TLS, and nothing else.
    """

    def __init__(
        self,
        directory: Path,
        *,
        standalone: bool = False,
        username: str | None = None,
        password: str | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        program = mongodb_program()
        if program is None:
            raise CannotStart(f"MongoDB is not installed: {ADVICE}")
        self.port = free_port()
        self.is_mongod = mongod_program() is not None
        self.standalone = standalone
        self.username = username
        self.password = password
        self.certificates = certificates
        self._settings = _mongod_settings if self.is_mongod else _secantus_settings
        directory.mkdir(parents=True, exist_ok=True)
        command = [program, *self._settings(self, directory, with_users=username is not None)]
        super().__init__(f"mongodb-{self.port}", command, directory, is_ready=self._answers)

    @property
    def url(self) -> str:
        """Where it is; for its user, if it has one."""
        return self.url_as(self.username, self.password)

    @property
    def direct_url(self) -> str:
        """The same, for a client that believes this address and not the one that the server names: through a proxy."""
        return self.url_as(self.username, self.password, direct=True)

    def url_as(self, username: str | None, password: str | None, *, direct: bool = False) -> str:
        """The same, for another user. ``direct``: see ``direct_url``."""
        credentials = f"{quote(username, safe='')}:{quote(password or '', safe='')}@" if username else ""
        options = {
            **({"directConnection": "true"} if direct else {}),
            **({"authSource": "admin"} if username else {}),
            **({"tls": "true", "tlsCAFile": str(self.certificates.authority)} if self.certificates else {}),
        }
        query = f"?{urlencode(options)}" if options else ""
        return f"mongodb://{credentials}{HOST}:{self.port}/{DATABASE}{query}"

    def client(self) -> MongoClient[dict[str, Any]]:
        """A connection for the test itself; close it, or use it in a ``with`` block."""
        return a_client(self.direct_url)

    def launch(self) -> None:
        """Start it, without waiting until it answers. The first time its user is made before."""
        if self.username is not None and not (self.directory / "users-are-made").exists():
            self._make_user()
        super().launch()

    def add_user(self, username: str, password: str, *roles: str) -> None:
        """Make a user who has these roles in the tests' database."""
        with self.client() as client:
            client.admin.command(
                "createUser", username, pwd=password, roles=[{"role": role, "db": DATABASE} for role in roles]
            )

    def _make_user(self) -> None:
        """The first user is made while nobody is asked who they are."""
        asking = self.command
        self.command = [asking[0], *self._settings(self, self.directory, with_users=False)]
        super().launch()
        self.wait_until_ready()
        with a_client(self.url_as(None, None, direct=True)) as client:
            client.admin.command("createUser", self.username, pwd=self.password, roles=["root"])
        self.stop()
        self.command = asking
        (self.directory / "users-are-made").touch()

    def _answers(self) -> bool:
        if not answers(HOST, self.port):
            return False
        with a_client(self.url_as(None, None, direct=True)) as client:
            try:
                said = client.admin.command("hello")
                if said.get("isreplicaset"):  # one that does not know yet of what set it is
                    member = {"_id": 0, "host": f"{HOST}:{self.port}"}
                    client.admin.command("replSetInitiate", {"_id": _REPLICA_SET, "members": [member]})
            except PyMongoError:
                return False
            return bool(said.get("isWritablePrimary"))


def _mongod_settings(server: MongoDBServer, directory: Path, *, with_users: bool) -> list[str]:
    settings = ["--dbpath", str(directory), "--bind_ip", HOST, "--port", str(server.port), "--quiet"]
    if not server.standalone:
        settings += ["--replSet", _REPLICA_SET]
    if with_users:
        key = directory / "members.key"  # by which members of a replica set know each other
        if not key.exists():
            key.write_text("ekidentests")
            key.chmod(0o400)
        settings += ["--auth", "--keyFile", str(key)] if not server.standalone else ["--auth"]
    if server.certificates:
        both = directory / "server.pem"
        both.write_text(server.certificates.server.read_text() + server.certificates.server_key.read_text())
        settings += ["--tlsMode", "requireTLS", "--tlsCertificateKeyFile", str(both)]
        settings += ["--tlsCAFile", str(server.certificates.authority), "--tlsAllowConnectionsWithoutCertificates"]
    return settings


def _secantus_settings(server: MongoDBServer, directory: Path, *, with_users: bool) -> list[str]:
    configuration = directory / "secantusd.toml"  # else it looks for one of its own accord
    configuration.touch()
    settings = ["--config", str(configuration), "--host", HOST, "--port", str(server.port)]
    settings += ["--storage-path", str(directory / "data"), "--log-level", "WARNING"]
    if server.standalone:
        settings += ["--standalone"]
    if with_users:
        settings += ["--auth"]
    if server.certificates:
        settings += ["--tls-cert-file", str(server.certificates.server)]
        settings += ["--tls-key-file", str(server.certificates.server_key)]
        settings += ["--tls-ca-file", str(server.certificates.authority)]
    return settings


def a_client(url: str, *, patience: float = 30.0) -> MongoClient[dict[str, Any]]:
    """A client that waits ``patience`` seconds for an answer, but not long for a server that is not there."""
    patience_ms = round(patience * 1000)
    return MongoClient(url, serverSelectionTimeoutMS=3000, connectTimeoutMS=3000, socketTimeoutMS=patience_ms)


def mongodb_answers(url: str) -> bool:
    """Whether a MongoDB is there that lets the user of ``url`` into the database of ``url``."""
    parsed = parse_url(url)
    if parsed.variant != "srv" and not any(answers(host.name, host.port or _PORT) for host in parsed.hosts):
        return False  # at once: the client would try again and again
    try:
        with a_client(url) as client:
            client.get_default_database(DATABASE).list_collection_names()
    except PyMongoError:
        return False
    return True


def remove_collections(url: str, prefix: str, *, alone: bool) -> None:
    """Drop every collection in the database of ``url`` whose name begins with ``prefix``.

    What has died in a transaction keeps documents locked until the server gives that up, after a minute: it is waited
    for, or ended now where we are ``alone``. SecantusDB, told to drop a collection before, does nothing else any more.
    """
    with a_client(url, patience=90.0) as client:
        if alone:
            client.admin.command("killAllSessions", [])
        database = client.get_default_database(DATABASE)
        for name in database.list_collection_names():
            if name.startswith(prefix):
                if not alone:
                    database[name].delete_many({})
                database.drop_collection(name)
