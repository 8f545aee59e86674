"""A lock between the processes of this host, which ends with its holder: ``flock`` on a file of its own.

Not on the database: closing any descriptor of that would drop SQLite's locks.
"""

from __future__ import annotations

import contextlib
import os
import time

from ekiden.private_files import open_private

try:
    import fcntl
except ImportError:  # Windows
    HAS_FLOCK = False
else:
    HAS_FLOCK = True

_LOOK_AGAIN_SECONDS = 0.005


class HostLock:
    """One thread at a time uses it. ``release`` may be called when it is not held, so an interrupted holder can."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self, patience: float = 0.0) -> bool:
        """Whether it was had within ``patience`` seconds. Never where its file can neither be made nor opened."""
        give_up = time.monotonic() + patience
        try:
            while HAS_FLOCK:
                if self._try():
                    return True
                if time.monotonic() >= give_up:
                    break
                time.sleep(_LOOK_AGAIN_SECONDS)
        except OSError:
            self.release()
        return False

    def release(self) -> None:
        """Let others have it. May be called again, also by somebody who was interrupted in the middle of this."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def seconds_since_use(self) -> float | None:
        """How long ago somebody last said ``note_use``; None when nobody has. Its holder asks."""
        assert self._descriptor is not None
        found = os.fstat(self._descriptor)
        return None if found.st_size == 0 else time.time() - found.st_mtime

    def note_use(self) -> None:
        """Say to later holders that it was used now."""
        assert self._descriptor is not None
        with contextlib.suppress(OSError):  # a full disk
            os.pwrite(self._descriptor, b"!", 0)

    def _try(self) -> bool:
        self.release()
        self._descriptor = open_private(self._path)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Somebody may have removed the file meanwhile: others lock another one then.
            is_the_file = os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except (BlockingIOError, FileNotFoundError):
            is_the_file = False
        if not is_the_file:
            self.release()
        return is_the_file
