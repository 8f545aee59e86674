"""What a MongoDB URL may say, and how it is handed on to pymongo.

mongodb://[user:password@]host[:27017][,host...]/[database][?option=value&...]
mongodb+srv://[user:password@]name/[database][?...]                  the hosts are looked up by DNS; TLS

All options but ours (``MongoDBOptions``) are pymongo's and reach it as they were written.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote_plus

import msgspec
from ekiden.errors import ConfigurationError
from ekiden.urls import BrokerURL
from pymongo import common, uri_parser
from pymongo.errors import PyMongoError

DEFAULT_DATABASE = "ekiden"
LONGEST_PREFIX = 100
LONGEST_DATABASE_BYTES = 63

_NOT_IN_A_DATABASE = frozenset('/\\. "$\0*<>:|?')
_MAY_BE_REPEATED = "readpreferencetags"
_SRV_OPTIONS = frozenset({"srvservicename", "srvmaxhosts", "srvallowedhostssuffix"})


class MongoDBOptions(msgspec.Struct, frozen=True):
    """What may stand behind the ``?`` of a MongoDB URL besides pymongo's own, for the transport and the backend.

    ``prefix``: what the name of every collection begins with; two with different prefixes do not meet.
    ``timeout``: after so many seconds every call has ended, with an answer or an error.
    ``max_message_bytes``: the largest body that it takes; MongoDB takes no document above 16 MiB.
    """

    prefix: str = "ekiden"
    timeout: float = 10.0
    max_message_bytes: int = 15 * 1024 * 1024


_OURS = sorted(MongoDBOptions.__struct_fields__)

_THEIRS = frozenset(getattr(common, "URI_OPTIONS_VALIDATOR_MAP", ()))
"""The options that pymongo has, in lower case. A pymongo that lists them elsewhere names the unknown ones itself."""


class Place(msgspec.Struct, frozen=True):
    """Where the servers are, as a URL says it: ``text`` is the URL for pymongo. ``str()`` holds no password.

    ``write_concern`` is the URL's ``w``, or None; ``selection_seconds`` its ``serverSelectionTimeoutMS``, or None.
    """

    text: str
    hosts: str
    database: str
    username: str | None
    names_authentication_database: bool
    write_concern: int | str | None
    selection_seconds: float | None
    connect_seconds: float | None

    def __str__(self) -> str:
        return f"MongoDB at {self.hosts}"

    def __repr__(self) -> str:
        return f"<{self}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("place", str(self))]  # msgspec's own names every field to rich


def options_in(url: BrokerURL) -> MongoDBOptions:
    """Our options in ``url``. Raises ConfigurationError for one whose value does not fit."""
    ours = {name: value for name, value in url.options.items() if name in MongoDBOptions.__struct_fields__}
    repeated = tuple(name for name in url.repeated if name.lower() != _MAY_BE_REPEATED)
    options = msgspec.structs.replace(url, options=ours, repeated=repeated).options_as(MongoDBOptions)
    prefix = options.prefix
    if not 0 < len(prefix) <= LONGEST_PREFIX or not prefix.isprintable():
        raise ConfigurationError(f"{url}: a prefix has 1 to {LONGEST_PREFIX} printable characters.")
    if "$" in prefix or ".." in f"{prefix}." or prefix.startswith((".", "system.")):
        raise ConfigurationError(
            f"{url}: {prefix!r} cannot begin the name of a collection: no $, no two dots in a row, none at the ends, "
            "and not 'system.'."
        )
    if not 0.1 <= options.timeout <= 3600:  # NaN fails as well
        raise ConfigurationError(f"{url}: timeout is a number of seconds, 0.1 to 3600.")
    if options.max_message_bytes < 0:
        raise ConfigurationError(f"{url}: max_message_bytes is a number of bytes, 0 or more.")
    return options


def place_in(url: BrokerURL) -> Place:
    """The servers that ``url`` names. Raises ConfigurationError for what cannot be; looks nothing up by DNS."""
    if url.variant not in (None, "srv"):
        raise ConfigurationError(
            f"{url}: there is no variant {url.variant!r} of mongodb://; write mongodb:// or mongodb+srv://."
        )
    _check_names(url)
    text, database = _text_for_pymongo(url), _database_in(url)
    theirs = _checked_by_pymongo(url, text)
    selection, connect = theirs.get("serverselectiontimeoutms"), theirs.get("connecttimeoutms")
    return Place(
        text=text,
        hosts=",".join(f"{host.name}:{host.port}" if host.port else host.name for host in url.hosts) or "localhost",
        database=database,
        username=url.username,
        names_authentication_database=bool(url.path) or "authsource" in theirs,
        write_concern=theirs.get("w"),
        selection_seconds=selection,
        connect_seconds=connect,
    )


def _check_names(url: BrokerURL) -> None:
    """Refuse an option that neither we nor pymongo have. pymongo's names may be written in any case."""
    for name in url.options:
        if _THEIRS and name not in MongoDBOptions.__struct_fields__ and name.lower() not in _THEIRS:
            raise ConfigurationError(
                f"{url}: there is no option {url.shown_option(name)} for mongodb://; it takes {', '.join(_OURS)} "
                "and pymongo's own."
            )


def _text_for_pymongo(url: BrokerURL) -> str:
    """``url`` without our own options, and with a host."""
    rest, mark, query = url.text.partition("://")[2].partition("?")
    authority, slash, path = rest.partition("/")
    if not url.hosts:
        authority += "localhost"
    # pymongo wants the options behind a slash in its older versions.
    kept = [part for part in query.split("&") if part and _name(part) not in MongoDBOptions.__struct_fields__]
    scheme = "mongodb+srv" if url.variant else "mongodb"
    return f"{scheme}://{authority}{slash or '/'}{path}" + (f"{mark}{'&'.join(kept)}" if kept else "")


def _name(part: str) -> str:
    return unquote_plus(part.partition("=")[0])


def _checked_by_pymongo(url: BrokerURL, text: str) -> dict[str, Any]:
    """pymongo's options in ``text``, their names in lower case. Raises ConfigurationError for what it refuses."""
    if url.variant:
        if len(url.hosts) != 1 or url.hosts[0].port is not None:
            raise ConfigurationError(f"{url}: mongodb+srv:// names one host without a port; DNS names the servers.")
        # What is left to check needs no DNS: all but the options for it.
        head, mark, query = text.partition("?")
        kept = [part for part in query.split("&") if _name(part).lower() not in _SRV_OPTIONS]
        text = f"mongodb{head.removeprefix('mongodb+srv')}" + (f"{mark}{'&'.join(kept)}" if any(kept) else "")
    try:
        parsed = uri_parser.parse_uri(text, validate=True, warn=False)
    except (PyMongoError, ValueError, TypeError, OSError) as error:
        if url.holds_secret_of(str(error)):
            raise ConfigurationError(f"{url}: pymongo refuses an option, or the user name and password.") from None
        raise ConfigurationError(f"{url}: {str(error).rstrip('.')}.") from error
    return {str(name).lower(): value for name, value in parsed["options"].items()}


def _database_in(url: BrokerURL) -> str:
    database = url.path or DEFAULT_DATABASE
    wrong = sorted(_NOT_IN_A_DATABASE.intersection(database))
    if wrong:
        raise ConfigurationError(
            f"{url}: {database!r} is not the name of a database: it may not hold {' '.join(map(repr, wrong))}."
        )
    if len(database.encode("utf-8", "surrogateescape")) > LONGEST_DATABASE_BYTES:
        raise ConfigurationError(f"{url}: the name of a database has at most {LONGEST_DATABASE_BYTES} bytes.")
    return database
