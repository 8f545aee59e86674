"""Locks that an exception out of a signal handler must not leave taken.

Such an exception may come at any moment. Python calls handlers between its own instructions, so ``with lock:`` is safe
as CPython is built: nothing can come between the lock's own ``__enter__`` and the block, nor between the block's last
call and ``__exit__``. That is not promised anywhere, and a debugger or a tracer does come in between. So a method that
may be interrupted holds a reentrant lock, which only the thread that holds it can release, and does this around it:

    try:
        return self._act()      # in which is ``with self._lock:``
    except BaseException:
        release_if_held(self._lock)
        raise

The call between the two is needed: no handler covers the line of a ``try`` or ``with`` that stands in another ``try``.
"""

from __future__ import annotations

import contextlib
import threading


def release_if_held(lock: threading.RLock) -> None:
    """Release ``lock`` if this thread holds it, as nearly never."""
    with contextlib.suppress(RuntimeError):  # it does not
        lock.release()
