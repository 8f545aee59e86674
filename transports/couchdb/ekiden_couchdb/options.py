"""What a CouchDB URL may say, and the servers that it names.

couchdb://[user:password@]host[:5984][,host...][/prefix]     one server, or nodes of one cluster; couchdbs:// with TLS

The path is what the names of all databases begin with.
"""

from __future__ import annotations

import re
import ssl
from typing import Any, Literal

import msgspec
from ekiden.errors import ConfigurationError
from ekiden.urls import BrokerURL, Host

PORT, TLS_PORT = 5984, 6984
DEFAULT_PREFIX = "ekiden"
LONGEST_PREFIX = 100

_TLS_OPTIONS = ("cafile", "certfile", "keyfile", "verify", "server_hostname")
_PREFIX = re.compile(r"[a-z][a-z0-9_$()+-]*")


class CouchDBOptions(msgspec.Struct, frozen=True):
    """What may stand behind the ``?`` of a CouchDB URL, for the transport and for the backend.

    ``prefix``: what the name of every database begins with, where the URL's path does not say it.
    ``timeout``: after so many seconds every call has ended, with an answer or an error.
    ``max_message_bytes``: the largest body that it takes. A body grows by a third on its way, and the server's
    ``max_document_size`` (8,000,000 bytes if not set) must be above that.
    ``auth``: ``basic`` sends the user and password with each request, ``session`` asks for a cookie with them.
    ``n``, ``q``: how many copies and shards the databases get that are created here; the server's choice and 1 if not
    given.
    ``cafile``, ``certfile``, ``keyfile``, ``verify`` and ``server_hostname`` are for ``couchdbs://``: who signed the
    server's certificate (the system's authorities if not given), this client's certificate and its key, whether the
    server's certificate is looked at, and the name that it must carry (the host's if not given).
    """

    prefix: str = ""
    timeout: float = 10.0
    max_message_bytes: int = 5 * 1024 * 1024
    auth: Literal["basic", "session"] = "basic"
    n: int | None = None
    q: int = 1
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    verify: bool = True
    server_hostname: str | None = None


class Place(msgspec.Struct, frozen=True):
    """Where the servers are and who we are for them, as a URL says it.

    ``str()`` of it holds no password; never show its fields.
    """

    hosts: tuple[Host, ...]
    username: str | None = None
    password: str | None = None
    tls: bool = False

    def __str__(self) -> str:
        return f"CouchDB at {','.join(map(address_of, self.hosts))}"

    def __repr__(self) -> str:
        return f"<{self}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("place", str(self))]  # msgspec's own names every field to rich


def address_of(host: Host) -> str:
    """``host:port``, with brackets around IPv6."""
    return f"[{host.name}]:{host.port}" if ":" in host.name else f"{host.name}:{host.port}"


def options_in(url: BrokerURL) -> CouchDBOptions:
    """The options of ``url``, with the prefix. Raises ConfigurationError for what is no option, or does not fit."""
    options = url.options_as(CouchDBOptions)
    options = msgspec.structs.replace(options, prefix=_prefix_in(url, options))
    if not 0.1 <= options.timeout <= 3600:  # NaN fails as well
        raise ConfigurationError(f"{url}: timeout is a number of seconds, 0.1 to 3600.")
    if options.max_message_bytes < 0:
        raise ConfigurationError(f"{url}: max_message_bytes is a number of bytes, 0 or more.")
    if options.q < 1 or (options.n is not None and options.n < 1):
        raise ConfigurationError(f"{url}: n and q are numbers of copies and shards, 1 or more.")
    if options.keyfile and not options.certfile:
        raise ConfigurationError(f"{url}: keyfile is the key of a certfile; give both.")
    given = [name for name in _TLS_OPTIONS if name in url.options]
    if given and url.scheme != "couchdbs":
        raise ConfigurationError(f"{url}: {', '.join(given)} is for TLS; write couchdbs://.")
    return options


def place_in(url: BrokerURL) -> Place:
    """The servers that ``url`` names. Raises ConfigurationError for what cannot be."""
    if url.variant is not None:
        raise ConfigurationError(
            f"{url}: there is no variant {url.variant!r} of {url.scheme}://; the nodes of a cluster are written one "
            f"after another, as in {url.scheme}://one,two,three/."
        )
    tls = url.scheme == "couchdbs"
    port = TLS_PORT if tls else PORT
    hosts = tuple(Host(host.name.lower(), host.port or port) for host in url.hosts or (Host("localhost"),))
    for host in hosts:
        _check_name(url, host.name)
    if url.password is not None and url.username is None:
        raise ConfigurationError(f"{url}: it has a password and no user name; write user:password@host.")
    if ":" in (url.username or ""):
        raise ConfigurationError(f"{url}: a CouchDB user name holds no colon.")
    return Place(hosts, url.username, url.password, tls)


def _check_name(url: BrokerURL, name: str) -> None:
    """Refuse what can be no host's name, which the resolver would refuse in words of its own."""
    try:
        name.encode("idna")
    except UnicodeError as error:
        raise ConfigurationError(f"{url}: {name!r} is no name of a host: {error}.") from error


def tls_context(url: BrokerURL, options: CouchDBOptions) -> ssl.SSLContext | None:
    """How the server is checked, and what we show it; None without TLS. Raises ConfigurationError."""
    if url.scheme != "couchdbs":
        return None
    if options.server_hostname is not None:
        if not options.server_hostname or options.server_hostname.startswith("."):
            raise ConfigurationError(f"{url}: server_hostname is the name in the server's certificate.")
        _check_name(url, options.server_hostname)
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


def _prefix_in(url: BrokerURL, options: CouchDBOptions) -> str:
    path = url.path.removesuffix("/")
    if path and options.prefix:
        raise ConfigurationError(f"{url}: the prefix is given twice, in the path and as prefix=; keep one.")
    prefix = path or options.prefix or DEFAULT_PREFIX
    if len(prefix) > LONGEST_PREFIX or not _PREFIX.fullmatch(prefix):
        raise ConfigurationError(
            f"{url}: databases cannot be called {prefix!r}: CouchDB's names begin with a lower-case letter and have "
            f"lower-case letters, digits and _$()+- only; a prefix has up to {LONGEST_PREFIX} of them."
        )
    return prefix
