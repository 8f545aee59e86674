"""Finds transports and backends by the scheme of a URL, among the installed entry points.

stevedore is imported where a URL is opened, and importlib.metadata where a scheme is looked up: they take 50 and 20 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ekiden.errors import ConfigurationError
from ekiden.results import Backend
from ekiden.transport import Transport
from ekiden.urls import BrokerURL, parse_url

if TYPE_CHECKING:
    import importlib.metadata
    from collections.abc import Iterable

TRANSPORTS = "ekiden.transports"
BACKENDS = "ekiden.backends"

RPC = "rpc"
"""The scheme of the one backend that stores nothing: results are sent to who sent the call."""

_DISTRIBUTIONS = {
    "redis": "ekiden-redis",
    "rediss": "ekiden-redis",
    "unix": "ekiden-redis",
    "amqp": "ekiden-rabbitmq",
    "amqps": "ekiden-rabbitmq",
    "mongodb": "ekiden-mongodb",
    "couchdb": "ekiden-couchdb",
    "couchdbs": "ekiden-couchdb",
}


def open_transport(url: str | BrokerURL) -> Transport:
    """The transport that ``url`` names. Raises ConfigurationError for an unknown scheme or a URL that cannot work."""
    parsed = parse_url(url) if isinstance(url, str) else url
    return transport_class(parsed)(parsed)


def open_backend(url: str | BrokerURL) -> Backend:
    """The backend that ``url`` names. Raises ConfigurationError for an unknown scheme or a URL that cannot work."""
    parsed = parse_url(url) if isinstance(url, str) else url
    return backend_class(parsed)(parsed)


def transport_class(url: BrokerURL) -> type[Transport]:
    """The class that carries URLs of this scheme."""
    found = load(TRANSPORTS, url.scheme, str(url))
    if isinstance(found, type) and issubclass(found, Transport):
        return found
    raise _not_a(Transport, found, url)


def backend_class(url: BrokerURL) -> type[Backend]:
    """The class that stores results at URLs of this scheme."""
    found = load(BACKENDS, url.scheme, str(url))
    if isinstance(found, type) and issubclass(found, Backend):
        return found
    raise _not_a(Backend, found, url)


def check_shared(*urls: BrokerURL) -> None:
    """Raise ConfigurationError for a URL whose messages or results no other process would see."""
    for url in urls:
        if url.scheme in installed(TRANSPORTS) and not transport_class(url).description.shared_between_processes:
            raise ConfigurationError(
                f"{url} lives inside one process, and no other one would see what is in it: run a worker in the same "
                "process with app.worker(), or use a broker that processes share, such as sqlite:///tasks.db."
            )


def installed(group: str) -> list[str]:
    """The names registered in an entry-point group, sorted."""
    return sorted({entry.name for entry in _entry_points(group)})


def is_installed(group: str, name: str) -> bool:
    """Whether a plugin of that name is installed."""
    return bool(_entry_points(group, name))


def check_installed(group: str, url: BrokerURL) -> None:
    """Raise ConfigurationError, saying what is installed and what to install, when nothing knows the URL's scheme."""
    if not is_installed(group, url.scheme):
        raise ConfigurationError(f"{url}: {_nothing_found(group, url.scheme)}")


def load(group: str, name: str, wanted_for: str) -> object:
    """The object registered under ``name``. ``wanted_for`` is shown when there is none, or more than one."""
    entries = _entry_points(group, name)
    if not entries:
        raise ConfigurationError(f"{wanted_for}: {_nothing_found(group, name)}")
    if len({entry.value for entry in entries}) > 1:
        places = ", ".join(sorted(_place(entry) for entry in entries))
        raise ConfigurationError(f"{wanted_for}: more than one plugin is installed for {name!r} ({places}); keep one.")
    return _load_with_stevedore(group, name, wanted_for)


def _entry_points(group: str, name: str | None = None) -> list[importlib.metadata.EntryPoint]:
    import importlib.metadata

    found = importlib.metadata.entry_points(group=group)
    return [entry for entry in found if name is None or entry.name == name]


def _load_with_stevedore(group: str, name: str, wanted_for: str) -> object:
    from stevedore import DriverManager, ExtensionManager
    from stevedore.exception import NoMatches

    def failed(_manager: ExtensionManager[object], entry: importlib.metadata.EntryPoint, error: BaseException) -> None:
        raise _cannot_load(entry, error, wanted_for) from error

    try:
        manager = DriverManager(group, name, invoke_on_load=False, on_load_failure_callback=failed)
    except NoMatches:
        # stevedore remembers entry points on disk; a plugin installed since then is found the direct way.
        (entry, *_) = _entry_points(group, name)
        try:
            return entry.load()
        except Exception as error:  # what a plugin may raise when it is imported, nobody knows
            raise _cannot_load(entry, error, wanted_for) from error
    return manager.driver


def _cannot_load(entry: importlib.metadata.EntryPoint, error: BaseException, wanted_for: str) -> ConfigurationError:
    return ConfigurationError(
        f"{wanted_for}: the plugin {entry.value} cannot be loaded: {type(error).__name__}: {error}"
    )


def _not_a(kind: type, found: object, url: BrokerURL) -> ConfigurationError:
    return ConfigurationError(
        f"{url}: the plugin registered for {url.scheme}:// is {found!r}, which is not an ekiden {kind.__name__}."
    )


def _place(entry: importlib.metadata.EntryPoint) -> str:
    return f"{entry.value} of {entry.dist.name}" if entry.dist is not None else entry.value


def _nothing_found(group: str, name: str) -> str:
    import difflib  # only to help with a mistake

    names: Iterable[str] = installed(group)
    shown = ", ".join(f"{known}://" for known in names) or "nothing"

    close = difflib.get_close_matches(name, [*names, *_DISTRIBUTIONS], n=1)
    advice = ""
    if name in _DISTRIBUTIONS:
        advice = f" Install it: pip install {_DISTRIBUTIONS[name]}."
    elif close and close[0] in _DISTRIBUTIONS and close[0] not in names:
        advice = f" Did you mean {close[0]}://? Then: pip install {_DISTRIBUTIONS[close[0]]}."
    elif close:
        advice = f" Did you mean {close[0]}://?"
    what = "transport" if group == TRANSPORTS else "result backend"
    return f"no {what} for {name}:// is installed; installed: {shown}.{advice}"
