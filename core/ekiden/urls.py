"""Broker and backend URLs: what they hold, and how to show one without its password.

    scheme+variant://user:password@host1:port1,host2:port2/path?option=value

One form for every broker. ``urllib.parse.urlsplit`` refuses several hosts with IPv6 brackets among them, so the
authority is taken apart here.

A password may have been typed as it is, with ``/``, ``@``, ``?`` or ``#`` in it, and the URL without its ``//``. Such a
URL is refused, and no part of it is shown that could belong to the password: ``without_password`` hides too much rather
than too little.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, unquote_plus

import msgspec

from ekiden.errors import ConfigurationError
from ekiden.times import shown

Options = TypeVar("Options", bound=msgspec.Struct)

_SCHEME = re.compile(r"[A-Za-z][\w+.-]*://")
_OPTION = re.compile(r"[?&]([^?&=]*)=")
_SECRET_OPTION = re.compile(
    r"pass|pwd|secret|token|credential|(api|access|private)_?key$|authmechanismproperties", re.IGNORECASE
)
_HOSTS = re.compile(r"((\[[^\]]*\]|[^:,\[\]]*)(:\d{0,5})?(,|$))*")
_LARGEST = 2**53
"""Where every number that a URL may say can be told from the next one."""
_SAME_SCHEMES = {"pyamqp": "amqp", "valkey": "redis", "valkeys": "rediss"}
"""Other names for a scheme: Celery's for a client library, Valkey's for the protocol that it shares with Redis."""

_SOCKET_SCHEMES = {"redis+socket", "valkey+socket", "valkey+unix", "redis+unix"}
_HIDDEN = "***"


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

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("text", str(self))]  # msgspec's own names every field to rich

    def options_as(self, kind: type[Options]) -> Options:
        """The query options as a ``kind``, each converted to its field's type.

        Raises ConfigurationError that names an option the transport does not have, that is given twice, or whose
        value does not fit.
        """
        if self.repeated:
            raise ConfigurationError(
                f"{self}: the option {self.shown_option(self.repeated[0])} is given twice; keep one."
            )
        known = {field.encode_name for field in msgspec.structs.fields(kind)}
        for name in self.options:
            if name not in known:
                raise ConfigurationError(
                    f"{self}: there is no option {self.shown_option(name)} for {self.scheme}://; it takes "
                    f"{', '.join(sorted(known)) or 'no options'}."
                )
        try:
            found = msgspec.convert(dict(self.options), kind, strict=False)
        except msgspec.ValidationError as error:
            if self._options_with_secrets():
                # The value may be the end of a password that has an & in it, and the error quotes it.
                place = str(error).rpartition("$.")[2].rstrip("`")
                raise ConfigurationError(f"{self}: the option {place} has a value that does not fit.") from None
            raise ConfigurationError(f"{self}: an option has a value that does not fit: {error}.") from error
        for name in self.options:
            value = getattr(found, name, None)
            if isinstance(value, float | int) and not -_LARGEST <= value <= _LARGEST:  # NaN is not within either
                unit = " of seconds" if "timeout" in name else ""
                raise ConfigurationError(f"{self}: {name} cannot be {shown(value)}; {name} is a number{unit}.")
        return found

    def shown_option(self, name: str) -> str:
        """``name`` of an option, for an error message.

        Not as it is behind an option that holds a secret: it may be what follows an ``&`` in that.
        """
        secrets, names = self._options_with_secrets(), list(self.options)
        if secrets and name in names and names.index(name) > names.index(secrets[0]):
            return f"behind {secrets[0]}= (an & in its value is written %26)"
        return repr(name)

    def holds_secret_of(self, text: str) -> bool:
        """Whether ``text``, such as a client library's error, quotes a password of this URL."""
        quoted = [part.partition("=") for part in self.text.partition("?")[2].split("&")]
        secrets = {value for name, _, value in quoted if _SECRET_OPTION.search(unquote_plus(name))}
        secrets |= {self.options[name] for name in self._options_with_secrets()}
        credentials = self.text.partition("://")[2].rpartition("@")[0]
        secrets |= {credentials.partition(":")[2], self.password or ""}
        return any(secret and (secret in text or repr(secret)[1:-1] in text) for secret in secrets)

    def _options_with_secrets(self) -> list[str]:
        return [name for name in self.options if _SECRET_OPTION.search(name)]


def parse_url(text: str) -> BrokerURL:
    """Take ``text`` apart. Raises ConfigurationError for what is not a URL; says nothing about unknown schemes."""
    scheme_text, _, rest = text.partition("://")
    if not _SCHEME.match(text):
        raise ConfigurationError(
            f"{_shortened(text)!r} is not a broker URL: write it as scheme://..., for example sqlite:///tasks.db "
            "or redis://localhost:6379/0."
        )
    scheme_text = scheme_text.lower()
    scheme, _, variant = scheme_text.partition("+")
    scheme = _SAME_SCHEMES.get(scheme, scheme)
    if scheme_text in _SOCKET_SCHEMES:
        scheme, variant = "unix", ""
    _check_at_signs(rest, text)
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
    """``text``, which is or was meant to be a URL, with what may be a secret in it replaced by ``***``.

    That is: what is between the user's name and the last ``@``; what follows a colon where no port can be; everything
    from the first option on whose name is that of a secret (``password``, ``token``, ...). A user's name stays.
    """
    found = _SCHEME.match(text)
    scheme, rest = (found[0], text[found.end() :]) if found else ("", text)
    before, at, behind = rest.rpartition("@")
    if at and (":" in before or not found):
        name, colon, _ = before.partition(":")
        shown = f"{scheme}{_without_secret_options(name)}:{_HIDDEN}" if colon else _HIDDEN
        if _without_secret_options(before) != before:
            return shown  # the @ is in an option's value, or in a password with what looks like an option
        return f"{shown}@{_without_secret_options(behind)}"
    shown = _without_secret_options(rest)
    if not at and not _HOSTS.fullmatch(re.split("[/?]", rest, maxsplit=1)[0] if found else rest):
        shown = f"{shown.partition(':')[0]}:{_HIDDEN}"  # user:password, and the host was forgotten
    return scheme + shown


def _without_secret_options(text: str) -> str:
    for option in _OPTION.finditer(text):
        if _SECRET_OPTION.search(unquote_plus(option[1])):
            return text[: option.end()] + _HIDDEN
    return text


def _check_at_signs(rest: str, url: str) -> None:
    """Refuse a URL in which a password may go on behind what looks like the host."""
    authority = re.split("[/?]", rest, maxsplit=1)[0]
    at = rest.rfind("@")
    if at > len(authority) and ":" in rest[:at]:
        raise ConfigurationError(
            f"{without_password(url)}: there is an @ behind the host; write %40 for it, and percent-encode / : @ ? # "
            "in a user name or password as well."
        )


def _parse_hosts(text: str, url: str) -> tuple[Host, ...]:
    return tuple(_parse_host(part, url) for part in text.split(",") if part)


def _parse_host(text: str, url: str) -> Host:
    if text.startswith("["):
        name, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ConfigurationError(f"{without_password(url)}: [ begins no host; write [::1]:6379 for IPv6.")
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
