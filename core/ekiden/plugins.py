"""Finds transports and backends by the scheme of a URL, among the installed entry points.

Where all that can be imported lies in plain directories, the entry points are read from there. Else they are asked for
in the general way, of importlib.metadata and stevedore, which take 20 and 50 ms to import: zip files, importers of a
program's own.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import time
from collections.abc import Iterator
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

import msgspec

from ekiden.errors import ConfigurationError
from ekiden.results import Backend
from ekiden.transport import Transport
from ekiden.urls import BrokerURL, parse_url

if TYPE_CHECKING:
    import importlib.metadata

TRANSPORTS = "ekiden.transports"
BACKENDS = "ekiden.backends"

RPC = "rpc"
"""The scheme of the one backend that stores nothing: results are sent to who sent the call."""

_INSTALLING_SECONDS = 60.0
"""For so long after a directory of distributions has changed, files in those may still be missing."""

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


class _Entry(msgspec.Struct, frozen=True):
    """An entry point: its name, ``MODULE:ATTRIBUTE``, and the distribution that it is of, if that is known."""

    name: str
    value: str
    distribution: str | None


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
    if not _are_plain_directories():
        return _load_with_stevedore(group, name, wanted_for)
    try:
        return _loaded(entries[0])
    except Exception as error:  # what a plugin may raise when it is imported, nobody knows
        raise _cannot_load(entries[0].value, error, wanted_for) from error


def _loaded(entry: _Entry) -> object:
    module, _, attributes = entry.value.partition(":")
    return functools.reduce(getattr, filter(None, attributes.split(".")), importlib.import_module(module))


def _entry_points(group: str, name: str | None = None) -> list[_Entry]:
    found = _in_directories(group) if _are_plain_directories() else _asked_for(group)
    return [entry for entry in found if name is None or entry.name == name]


def _asked_for(group: str) -> list[_Entry]:
    import importlib.metadata

    return [
        _Entry(entry.name, entry.value, None if entry.dist is None else entry.dist.name)
        for entry in importlib.metadata.entry_points(group=group)
    ]


def _are_plain_directories() -> bool:
    """Whether nothing but directories tells what is installed."""
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_distributions")]
    return finders == [PathFinder] and not any(path.endswith(".egg") or os.path.isfile(path) for path in sys.path)


def _in_directories(group: str) -> list[_Entry]:
    """The entry points of every distribution; of those that are there twice, the one that is imported."""
    found: dict[str, tuple[_Entry, ...]] = {}
    for directory in sys.path:
        try:
            changed = os.stat(directory or os.curdir).st_mtime_ns
        except OSError:
            continue
        is_installing = time.time() - changed / 1e9 < _INSTALLING_SECONDS
        read = _entries_of.__wrapped__ if is_installing else _entries_of
        for distribution, entries in read(directory or os.curdir, changed, group):
            found.setdefault(distribution.lower().replace("-", "_").replace(".", "_"), entries)
    return [entry for entries in found.values() for entry in entries]


@functools.lru_cache(maxsize=128)
def _entries_of(directory: str, changed: int, group: str) -> tuple[tuple[str, tuple[_Entry, ...]], ...]:
    """Each distribution in a directory, with its entry points; ``changed``: when one was installed there last."""
    found = []
    for path in sorted(os.listdir(directory)):
        name, dot, kind = path.rpartition(".")
        if dot and kind in {"dist-info", "egg-info"}:
            distribution = name.partition("-")[0]
            found.append((distribution, tuple(_read(os.path.join(directory, path), group, distribution))))
    return tuple(found)


def _read(metadata: str, group: str, distribution: str) -> Iterator[_Entry]:
    try:
        with open(os.path.join(metadata, "entry_points.txt"), encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError):
        return  # it has none, or is just being installed or removed
    section = ""
    for line in map(str.strip, lines):
        if line.startswith("["):
            section = line.strip("[] ")
        elif section == group and "=" in line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            yield _Entry(name.strip(), value.partition("[")[0].strip(), distribution)


def _load_with_stevedore(group: str, name: str, wanted_for: str) -> object:
    from stevedore import DriverManager, ExtensionManager
    from stevedore.exception import NoMatches

    def failed(_manager: ExtensionManager[object], entry: importlib.metadata.EntryPoint, error: BaseException) -> None:
        raise _cannot_load(entry.value, error, wanted_for) from error

    try:
        manager = DriverManager(group, name, invoke_on_load=False, on_load_failure_callback=failed)
    except NoMatches:
        # stevedore remembers entry points on disk; a plugin installed since then is found the direct way.
        (entry, *_) = _entry_points(group, name)
        try:
            return _loaded(entry)
        except Exception as error:  # what a plugin may raise when it is imported, nobody knows
            raise _cannot_load(entry.value, error, wanted_for) from error
    return manager.driver


def _cannot_load(value: str, error: BaseException, wanted_for: str) -> ConfigurationError:
    return ConfigurationError(f"{wanted_for}: the plugin {value} cannot be loaded: {type(error).__name__}: {error}")


def _not_a(kind: type, found: object, url: BrokerURL) -> ConfigurationError:
    return ConfigurationError(
        f"{url}: the plugin registered for {url.scheme}:// is {found!r}, which is not an ekiden {kind.__name__}."
    )


def _place(entry: _Entry) -> str:
    return entry.value if entry.distribution is None else f"{entry.value} of {entry.distribution}"


def _nothing_found(group: str, name: str) -> str:
    import difflib  # only to help with a mistake

    names = installed(group)
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
