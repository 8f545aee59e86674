"""Documents that nobody here can read: passed over, left where they are, and told once.

Whoever may write to a database may put anything into it. What is no document of ours, or of a later version, concerns
nobody but the one that it is about: it is as if it were not there, for what else is there is read past it. A document
that was changed is looked at again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from ekiden.loggers import safe_logger

logger = safe_logger(__name__)

MOST_KNOWN = 10_000


class SetAside:
    """Those that this process has come across. Used by any thread."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str, str], None] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, database: str, document_id: str, rev: str, why: object) -> None:
        """Set a document aside: what it is that cannot be read of it, is told the first time."""
        key = (database, document_id, rev)
        with self._lock:
            is_new = key not in self._known
            self._known[key] = None
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        if is_new:
            logger.error(
                "%s: the document %s is set aside, because this version of ekiden cannot read it: %s",
                database,
                document_id,
                why,
            )

    def has(self, database: str, document_id: str, rev: str) -> bool:
        """Whether this revision of the document was set aside here."""
        return (database, document_id, rev) in self._known
