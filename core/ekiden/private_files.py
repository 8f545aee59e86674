"""Files and directories that ekiden makes beside the user's, so that nobody else can put a link in their place."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
"""``O_NONBLOCK``: opening a pipe that somebody has put there must not wait for its other end."""


def open_private(path: str | Path, flags: int = os.O_RDWR) -> int:
    """Open the file ``path``, made if there is none, for its owner alone; returns the descriptor.

    Raises OSError, also for a link, for what is no regular file, and for a file that has a second name: somebody else
    may have put it there so that we change a file of his choice.
    """
    descriptor = os.open(path, flags | os.O_CREAT | _NO_LINKS, 0o600)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if found.st_nlink > 1:
            raise OSError(errno.EMLINK, "the file has a second name", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def touch(path: str | Path) -> None:
    """Set the time of the file ``path`` to now; made if there is none. Raises OSError like ``open_private``."""
    descriptor = open_private(path, os.O_WRONLY)
    try:
        os.utime(descriptor if os.utime in os.supports_fd else path)
    finally:
        os.close(descriptor)


def make_private_directory(path: str | Path, *, group_may_write: bool = False) -> None:
    """Make the directory ``path`` for this user alone, or use it where it is there.

    Raises PermissionError when it belongs to another user, or others may write in it: they could exchange what is in
    it. Raises NotADirectoryError for a file, and other OSErrors where it cannot be made. A link of this user's own is
    followed.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)  # a umask such as 0177, meant for files, takes the right to enter it
    for found in (os.lstat(path), os.stat(path)):
        if hasattr(os, "getuid") and found.st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it belongs to another user", str(path))
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "it is not a directory", str(path))
    if found.st_mode & (stat.S_IWOTH if group_may_write else stat.S_IWOTH | stat.S_IWGRP) and hasattr(os, "getuid"):
        raise PermissionError(errno.EPERM, "other users may write in it", str(path))
