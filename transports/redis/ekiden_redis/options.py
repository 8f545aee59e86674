"""What a Redis URL may say, and the servers that it names.

redis://[user[:password]@]host[:6379][/database]             one server; rediss:// with TLS
unix:///path/to/redis.sock[?db=0]                            one server, over a UNIX socket
redis+sentinel://[user:password@]host[:26379],.../service[/database]      whichever server is the master now
redis+cluster://[user:password@]host[:6379],...              a cluster; the hosts named are where to begin
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import msgspec
from ekiden.errors import ConfigurationError
from ekiden.urls import BrokerURL, Host

if TYPE_CHECKING:
    import ssl

SERVER_PORT, SENTINEL_PORT = 6379, 26379
LONGEST_PREFIX = 100

_TLS_OPTIONS = ("cafile", "certfile", "keyfile", "verify", "server_hostname")
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")


class RedisOptions(msgspec.Struct, frozen=True):
    """What may stand behind the ``?`` of a Redis URL, for the transport and for the backend.

    ``prefix``: what the name of every key begins with; two with different prefixes do not meet.
    ``timeout``: after so many seconds every call has ended, with an answer or an error.
    ``max_message_bytes``: the largest body that it takes.
    ``db``: the number of the database, where the URL's path does not say it (``unix://``).
    ``sentinel_username``, ``sentinel_password``: who we are for the Sentinels, where they ask; the URL's user and
    password are for the servers.
    ``cafile``, ``certfile``, ``keyfile``, ``verify`` and ``server_hostname`` are for ``rediss://``: who signed the
    server's certificate (the system's authorities if not given), this client's certificate and its key, whether the
    server's certificate is looked at, and the name that it must carry (the host's if not given).
    """

    prefix: str = "ekiden"
    timeout: float = 10.0
    max_message_bytes: int = 64 * 1024 * 1024
    db: int | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = None  # never show it: repr() does not
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    verify: bool = True
    server_hostname: str | None = None

    def __repr__(self) -> str:
        return f"<RedisOptions {self.prefix!r}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("prefix", self.prefix)]  # msgspec's own names every field to rich


class Arrangement(Enum):
    """What the hosts of a URL are."""

    ONE_SERVER = "one server"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class Place(msgspec.Struct, frozen=True):
    """Where the servers are and who we are for them, as a URL says it. ``path`` is a UNIX socket's.

    ``str()`` of it holds no password; never show its fields.
    """

    arrangement: Arrangement
    hosts: tuple[Host, ...] = ()
    path: str | None = None
    service: str = ""
    database: int = 0
    username: str | None = None
    password: str | None = None
    tls: bool = False

    def __str__(self) -> str:
        where = self.path or ",".join(f"{host.name}:{host.port}" for host in self.hosts)
        return f"Redis at {where}" if not self.service else f"the Redis service {self.service!r} of {where}"

    def __repr__(self) -> str:
        return f"<{self}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("place", str(self))]  # msgspec's own names every field to rich


def options_in(url: BrokerURL) -> RedisOptions:
    """The options of ``url``. Raises ConfigurationError for one that does not exist, or whose value does not fit."""
    options = url.options_as(RedisOptions)
    if not 0 < len(options.prefix) <= LONGEST_PREFIX or not options.prefix.isprintable():
        raise ConfigurationError(f"{url}: a prefix has 1 to {LONGEST_PREFIX} printable characters.")
    if not 0.1 <= options.timeout <= 3600:  # NaN fails as well
        raise ConfigurationError(f"{url}: timeout is a number of seconds, 0.1 to 3600.")
    if options.max_message_bytes < 0:
        raise ConfigurationError(f"{url}: max_message_bytes is a number of bytes, 0 or more.")
    if options.keyfile and not options.certfile:
        raise ConfigurationError(f"{url}: keyfile is the key of a certfile; give both.")
    _refuse_options(url, _TLS_OPTIONS, unless=url.scheme == "rediss", advice="is for TLS; write rediss://")
    _refuse_options(
        url, _SENTINEL_OPTIONS, unless=url.variant == "sentinel", advice="is for Sentinels; write redis+sentinel://"
    )
    return options


def place_in(url: BrokerURL, options: RedisOptions) -> Place:
    """The servers that ``url`` names. Raises ConfigurationError for what cannot be."""
    if url.scheme == "unix":
        return _socket_in(url, options)
    match url.variant:
        case None:
            arrangement, port = Arrangement.ONE_SERVER, SERVER_PORT
        case "sentinel":
            arrangement, port = Arrangement.SENTINEL, SENTINEL_PORT
        case "cluster":
            arrangement, port = Arrangement.CLUSTER, SERVER_PORT
        case _:
            raise ConfigurationError(
                f"{url}: there is no variant {url.variant!r} of {url.scheme}://; write {url.scheme}://, "
                f"{url.scheme}+sentinel:// or {url.scheme}+cluster://."
            )
    hosts = tuple(Host(host.name, host.port or port) for host in url.hosts or (Host("localhost"),))
    if arrangement is Arrangement.ONE_SERVER and len(hosts) > 1:
        raise ConfigurationError(
            f"{url}: several hosts are a cluster or its Sentinels: write {url.scheme}+cluster://... or "
            f"{url.scheme}+sentinel://.../service."
        )
    service, database = "", url.path
    if arrangement is Arrangement.SENTINEL:
        service, _, database = url.path.partition("/")
        if not service:
            raise ConfigurationError(
                f"{url}: say which service the Sentinels are to be asked for: {url.scheme}+sentinel://host:26379/mymaster."
            )
    return Place(
        arrangement=arrangement,
        hosts=hosts,
        service=service,
        database=_database(url, database, options, arrangement),
        username=url.username,
        password=url.password,
        tls=url.scheme == "rediss",
    )


def tls_context(url: BrokerURL, options: RedisOptions) -> ssl.SSLContext | None:
    """How the server is checked, and what we show it; None without TLS. Raises ConfigurationError."""
    if url.scheme != "rediss":
        return None
    import ssl  # see ekiden_redis.connection

    try:
        context = ssl.create_default_context(cafile=options.cafile)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"{url}: no certificates can be read from cafile={options.cafile}: {error}."
        ) from error
    if not options.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if options.certfile:
        try:
            # Without a password function, a key with a passphrase would ask for it on the terminal.
            context.load_cert_chain(options.certfile, options.keyfile, password=lambda: "")
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"{url}: the certificate and key of certfile={options.certfile}, keyfile={options.keyfile} cannot be "
                f"read: {error}; a key with a passphrase is not supported."
            ) from error
    return context


def _socket_in(url: BrokerURL, options: RedisOptions) -> Place:
    if url.hosts or url.variant:
        # unix://redis.sock instead of unix:///redis.sock
        raise ConfigurationError(f"{url}: write unix:///path/to/redis.sock, with three slashes.")
    if not url.path or "\0" in url.path:
        raise ConfigurationError(f"{url}: name the socket's path: unix:///var/run/redis.sock.")
    return Place(
        arrangement=Arrangement.ONE_SERVER,
        path="/" + url.path,
        database=_database(url, "", options, Arrangement.ONE_SERVER),
        username=url.username,
        password=url.password,
    )


def _database(url: BrokerURL, text: str, options: RedisOptions, arrangement: Arrangement) -> int:
    if text and options.db is not None:
        raise ConfigurationError(f"{url}: the database is named twice, in the path and as db=; keep one.")
    text = text or str(options.db or 0)
    if not (text.isascii() and text.isdigit()):
        raise ConfigurationError(
            f"{url}: {text!r} is not a database: Redis numbers them, as in {url.scheme}://localhost/0."
        )
    if arrangement is Arrangement.CLUSTER and int(text):
        raise ConfigurationError(f"{url}: a cluster has the database 0 only; use another prefix instead.")
    return int(text)


def _refuse_options(url: BrokerURL, names: tuple[str, ...], *, unless: bool, advice: str) -> None:
    given = [name for name in names if name in url.options]
    if given and not unless:
        raise ConfigurationError(f"{url}: {', '.join(given)} {advice}.")
