"""Which file a ``sqlite://`` URL names, and how it is to be used."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ekiden.errors import ConfigurationError
from ekiden.urls import BrokerURL

_NETWORK_FILE_SYSTEMS = re.compile(
    # Servers of files
    r"nfs\d?|cifs|smb\w*|9p|afs|auristorfs|coda|ncp(fs)?|webdav|davfs|"
    # Clusters, some of whose machines share a disk
    r"ceph|glusterfs|lustre\w*|beegfs|fhgfs|orangefs|pvfs2|panfs|wekafs|quobyte|moosefs|juicefs|gpfs|mmfs|ocfs2|gfs2?|"
    r"acfs|cvfs|snfs|"
    # What a virtual machine shares with its host; programs that serve files from anywhere
    r"virtiofs|vboxsf|vmhgfs|prl_fs|fakeowner|osxfs|grpcfuse|drvfs|fuse(\..+)?"
)
_LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.gocryptfs", "fuse.encfs", "fuse.ntfs-3g", "fuse.exfat"})
"""Programs that serve a local disk. What other ones serve (sshfs, s3fs, rclone, ...) is somewhere else."""


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
    """The file that ``url`` names, behind all links. Raises ConfigurationError when no database can be there."""
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
    try:
        if path.is_dir():
            raise ConfigurationError(f"{url}: {path} is a directory; name a file in it.")
        if not path.parent.is_dir():
            raise ConfigurationError(f"{url}: there is no directory {path.parent}; make it first.")
    except OSError as error:  # a name that is too long, a directory that must not be entered
        raise ConfigurationError(f"{url}: {path} cannot be looked at: {error.strerror}.") from error
    real = os.path.realpath(path)
    kind = _file_system(os.path.dirname(real))
    if is_network_file_system(kind):
        raise ConfigurationError(
            f"{url}: {path.parent} is on a network file system ({kind}), where SQLite's locks do not work; use a "
            "local disk, or a broker that serves several machines."
        )
    return real


def name_in(url: BrokerURL) -> str:
    """The absolute path as ``url`` says it, links and all: later they may lead to another file."""
    return str(Path(url.path).absolute())


def is_network_file_system(kind: str) -> bool:
    """Whether files of this type, as the table of mounts calls it, are or may be kept by another machine."""
    return kind not in _LOCAL_FUSE and _NETWORK_FILE_SYSTEMS.fullmatch(kind) is not None


def _file_system(directory: str) -> str:
    """The type of the file system that ``directory`` is on, as Linux tells it; empty elsewhere."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
    except OSError:
        return ""
    return file_system_in(mounts, directory)


class _Mount(msgspec.Struct, frozen=True):
    """A line of the table: ``parent`` is the mount in which it hides what was at ``point`` before."""

    id: str
    parent: str
    point: str
    kind: str

    def holds(self, directory: str) -> bool:
        return directory == self.point or directory.startswith(self.point.rstrip("/") + "/")


def file_system_in(mountinfo: str, directory: str) -> str:
    """The same, by a table of mounts as /proc/self/mountinfo has it (proc(5)); empty where it does not tell.

    The path is walked as the kernel does it, from mount to mount: a mount may be hidden by a later one above it.
    """
    mounts = [mount for mount in map(_mount_in, mountinfo.splitlines()) if mount is not None]
    holding = [mount for mount in mounts if mount.holds(directory)]
    ids = {mount.id for mount in mounts}
    outermost = [mount for mount in holding if mount.parent not in ids or mount.parent == mount.id]
    if not outermost:
        return ""
    current = max(outermost, key=lambda mount: len(mount.point))
    passed = {current.id}
    while met := [mount for mount in holding if mount.parent == current.id and mount.id not in passed]:
        current = min(met, key=lambda mount: len(mount.point))
        passed.add(current.id)
    return current.kind


def _mount_in(line: str) -> _Mount | None:
    """``ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG ...] - KIND SOURCE OPTIONS``; None for what is none."""
    before, _, behind = line.partition(" - ")
    fields, kind = before.split(" "), behind.partition(" ")[0]
    if len(fields) < 6 or not kind:
        return None
    point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])
    return _Mount(fields[0], fields[1], point, kind.lower())
