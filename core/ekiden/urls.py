"""Broker and backend URLs: what they hold, and how to show one without its password.

    scheme+variant://user:password@host1:port1,host2:port2/path?option=value

One form for every broker. ``urllib.parse.urlsplit`` refuses several hosts with IPv6 brackets among them, so the
authority is taken apart here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar
from urllib.parse import parse_qsl, unquote

import msgspec

from ekiden.errors import ConfigurationError
from ekiden.times import shown

Options = TypeVar("Options", bound=msgspec.Struct)

_PASSWORD_OPTION = re.compile(r"([?&][^=&]*password=)[^&]*", re.IGNORECASE)
_LARGEST = 2**53
"""Where every number that a URL may say can be told from the next one."""
_SAME_SCHEMES = {"pyamqp": "amqp", "valkey": "redis", "valkeys": "rediss"}
"""Other names for a scheme: Celery's for a client library, Valkey's for the protocol that it shares with Redis."""

_SOCKET_SCHEMES = {"redis+socket", "valkey+socket", "valkey+unix", "redis+unix"}
_HIDDEN = r"\1***"


class Host(msgspec.Struct, frozen=True):
    """One host of a URL; ``port`` is None where the URL names none."""

    name: str
    port: int | None = None


class BrokerURL(msgspec.Struct, frozen=True, repr_omit_defaults=True):
    """A parsed URL. ``path`` is percent-decoded, without its first slash. ``str()`` and ``repr()`` hide the password.

    ``text`` is the URL as it was given, for a client library that parses it again. It holds the password. Of an
    option that is given several times ``options`` has the last value, and ``repeated`` the name.
    """

    text: str
    scheme: str
    variant: str | None = None
    username: str | None = None
    password: str | None = None
    hosts: tuple[Host, ...] = ()
    path: str = ""
    options: Mapping[str, str] = {}
    repeated: tuple[str, ...] = ()

    def __str__(self) -> str:
        return without_password(self.text)

    def __repr__(self) -> str:
        return f"BrokerURL({str(self)!r})"

    def options_as(self, kind: type[Options]) -> Options:
        """The query options as a ``kind``, each converted to its field's type.

        Raises ConfigurationError that names an option the transport does not have, that is given twice, or whose
        value does not fit.
        """
        if self.repeated:
            raise ConfigurationError(f"{self}: the option {self.repeated[0]!r} is given twice; keep one.")
        known = {field.encode_name for field in msgspec.structs.fields(kind)}
        for name in self.options:
            if name not in known:
                raise ConfigurationError(
                    f"{self}: there is no option {name!r} for {self.scheme}://; it takes "
                    f"{', '.join(sorted(known)) or 'no options'}."
                )
        try:
            found = msgspec.convert(dict(self.options), kind, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigurationError(f"{self}: an option has a value that does not fit: {error}.") from error
        for name in self.options:
            value = getattr(found, name, None)
            if isinstance(value, float | int) and not -_LARGEST <= value <= _LARGEST:  # NaN is not within either
                unit = " of seconds" if "timeout" in name else ""
                raise ConfigurationError(f"{self}: {name} cannot be {shown(value)}; {name} is a number{unit}.")
        return found


def parse_url(text: str) -> BrokerURL:
    """Take ``text`` apart. Raises ConfigurationError for what is not a URL; says nothing about unknown schemes."""
    scheme_text, separator, rest = text.partition("://")
    if not separator or not scheme_text:
        raise ConfigurationError(
            f"{_shortened(text)!r} is not a broker URL: write it as scheme://..., for example sqlite:///tasks.db "
            "or redis://localhost:6379/0."
        )
    scheme_text = scheme_text.lower()
    scheme, _, variant = scheme_text.partition("+")
    scheme = _SAME_SCHEMES.get(scheme, scheme)
    if scheme_text in _SOCKET_SCHEMES:
        scheme, variant = "unix", ""
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    credentials, at, hosts_text = authority.rpartition("@")
    username, colon, password = credentials.partition(":")
    given = parse_qsl(query, keep_blank_values=True)
    options = dict(given)
    counts = Counter(name for name, _ in given)
    return BrokerURL(
        text=text,
        scheme=scheme,
        variant=variant or None,
        username=unquote(username) if at and username else None,
        password=unquote(password) if colon else None,
        hosts=_parse_hosts(hosts_text, text),
        path=unquote(path),
        options=options,
        repeated=tuple(name for name, count in counts.items() if count > 1),
    )


def without_password(text: str) -> str:
    """``text`` with the passwords of a URL in it replaced by ``***``; other text comes back as it is.

    That is what follows the user's name, and every option whose name ends with ``password``.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        return text
    end = min((rest.find(mark) for mark in "/?#" if mark in rest), default=len(rest))
    authority, tail = rest[:end], rest[end:]
    # A password that was not percent-encoded may hold a slash: the last @ in the whole text then ends it.
    if "@" in tail and ":" in authority:
        authority, tail = rest[: rest.rfind("@") + 1] + "", rest[rest.rfind("@") + 1 :]
        authority = authority + tail.partition("/")[0]
        tail = "".join(tail.partition("/")[1:])
    credentials, at, hosts = authority.rpartition("@")
    if not at or ":" not in credentials:
        return _PASSWORD_OPTION.sub(_HIDDEN, text)
    username = credentials.partition(":")[0]
    return f"{scheme}://{username}:***@{hosts}{_PASSWORD_OPTION.sub(_HIDDEN, tail)}"


def _parse_hosts(text: str, url: str) -> tuple[Host, ...]:
    return tuple(_parse_host(part, url) for part in text.split(",") if part)


def _parse_host(text: str, url: str) -> Host:
    if text.startswith("["):
        name, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ConfigurationError(f"{without_password(url)}: {text!r} is not a host; write [::1]:6379 for IPv6.")
        port = rest[1:]
    else:
        name, _, port = text.partition(":")
    if port and not (port.isascii() and port.isdigit() and int(port) <= 65535):
        # The "port" may be the beginning of a password that holds a slash, so it is not shown.
        raise ConfigurationError(
            f"{without_password(url)}: what follows the host's colon is not a port, a number up to 65535; / : @ ? # in "
            "a user name or password must be percent-encoded."
        )
    return Host(unquote(name), int(port) if port else None)


def _shortened(text: str, length: int = 60) -> str:
    shown = without_password(text)
    return shown if len(shown) <= length else shown[: length - 3] + "..."
