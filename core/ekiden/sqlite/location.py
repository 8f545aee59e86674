"""Which file a ``sqlite://`` URL names, and how it is to be used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ekiden.errors import ConfigurationError
from ekiden.urls import BrokerURL

_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "glusterfs", "lustre", "fuse.sshfs")


class SQLiteOptions(msgspec.Struct, frozen=True):
    """What may stand behind the ``?`` of a ``sqlite://`` URL.

    ``synchronous``: what is answered as stored survives kill -9 of any process (``normal``), and power loss as well
    (``full``: each commit waits for the disk). ``busy_timeout``: seconds to wait for other writers. ``wake``: how who
    waits learns of news: ``socket``, or ``poll`` where processes cannot reach each other's UNIX sockets.
    ``max_message_bytes``: the largest body it takes.
    """

    synchronous: Literal["normal", "full"] = "normal"
    busy_timeout: float = 10.0
    wake: Literal["socket", "poll"] = "socket"
    max_message_bytes: Annotated[int, Meta(ge=0)] = 64 * 1024 * 1024


def options_in(url: BrokerURL) -> SQLiteOptions:
    """The options of ``url``. Raises ConfigurationError for one that does not exist, or whose value does not fit."""
    options = url.options_as(SQLiteOptions)
    if not 0 <= options.busy_timeout <= 3600:  # NaN fails as well
        raise ConfigurationError(f"{url}: busy_timeout is a number of seconds, 0 to 3600.")
    return options


def path_in(url: BrokerURL) -> str:
    """The absolute path of the file that ``url`` names. Raises ConfigurationError when no database can be there."""
    if url.hosts or url.username or url.variant:
        # sqlite://tasks.db instead of sqlite:///tasks.db
        raise ConfigurationError(
            f"{url}: a file has no host: write sqlite:///tasks.db with three slashes, or sqlite:////var/tasks.db "
            "with four for a path from the root."
        )
    if not url.path or url.path == ":memory:":
        raise ConfigurationError(
            f"{url}: this needs a file, which several processes can open: write sqlite:///tasks.db, or memory:// for "
            "a broker inside one process."
        )
    if "\0" in url.path:
        raise ConfigurationError(f"{url}: a path has no zero bytes.")
    path = Path(url.path).absolute()
    if path.is_dir():
        raise ConfigurationError(f"{url}: {path} is a directory; name a file in it.")
    if not path.parent.is_dir():
        raise ConfigurationError(f"{url}: there is no directory {path.parent}; make it first.")
    real = os.path.realpath(path)
    kind = _file_system(os.path.dirname(real))
    if kind.startswith(_NETWORK_FILE_SYSTEMS):
        raise ConfigurationError(
            f"{url}: {path.parent} is on a network file system ({kind}), where SQLite's locks do not work; use a "
            "local disk, or a broker that serves several machines."
        )
    return real


def _file_system(directory: str) -> str:
    """The type of the file system that ``directory`` is on, as Linux tells it; empty elsewhere."""
    try:
        mounts = Path("/proc/self/mounts").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    found, found_kind = "", ""
    for mount in mounts:
        _, point, kind, *_ = mount.split(" ")
        point = point.replace("\\040", " ")
        inside = directory == point or directory.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(found):
            found, found_kind = point, kind
    return found_kind
