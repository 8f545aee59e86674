"""What a consumer holds, as far as it knows without asking: which claim, and until when at least."""

from __future__ import annotations

import time
from collections.abc import Iterable
from enum import Enum


class Hold(Enum):
    """Whether a delivery is held: SURE while its lease cannot have ended; LOST when a later claim of ours has it."""

    SURE = "sure"
    UNSURE = "unsure"
    LOST = "lost"


class Holdings:
    """Documents by their ids, each with the token of the claim and the end of its lease on the monotonic clock.

    A lease is counted from before it was asked for, so it ends here no later than at the server. The thread that
    receives adds, the thread that settles extends and drops; each does so in single steps.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[str, float]] = {}
        self._doubted: set[str] = set()

    def __len__(self) -> int:
        return len(self._held)

    def add(self, ids: Iterable[str], token: str, until: float) -> None:
        """These were claimed until then."""
        self._held.update(dict.fromkeys(ids, (token, until)))

    def extend(self, document_id: str, token: str, until: float) -> None:
        """Its lease ends then, if it is still held by that claim."""
        held = self._held.get(document_id)
        if held is not None and held[0] == token:
            self._held[document_id] = (token, until)

    def of(self, document_id: str, token: str, *, at: float | None = None) -> Hold:
        """How sure it is that ``token`` holds it now, or ``at`` that time."""
        held = self._held.get(document_id)
        if held is None:
            return Hold.UNSURE
        if held[0] != token:
            return Hold.LOST
        if held[1] <= (time.monotonic() if at is None else at) or document_id in self._doubted:
            return Hold.UNSURE
        return Hold.SURE

    def doubt(self, document_id: str, token: str) -> None:
        """It may have been ended: a call that was to end it has not been answered yet."""
        held = self._held.get(document_id)
        if held is not None and held[0] == token:
            self._doubted.add(document_id)

    def drop(self, document_id: str, token: str) -> None:
        """It is not held by that claim any more."""
        held = self._held.get(document_id)
        if held is not None and held[0] == token:
            self._held.pop(document_id, None)
            self._doubted.discard(document_id)

    def drop_expired(self) -> None:
        """What was not extended is somebody else's, or will be."""
        now = time.monotonic()
        for document_id, (_, until) in self._held.copy().items():
            if until <= now:
                self._held.pop(document_id, None)
                self._doubted.discard(document_id)

    def first_end(self) -> float | None:
        """When the first of the leases ends; None where nothing is held."""
        return min((until for _, until in list(self._held.values())), default=None)

    def by_token(self) -> dict[str, list[str]]:
        """The ids of all that is held, by the claims that hold them."""
        tokens: dict[str, list[str]] = {}
        for document_id, (token, _) in self._held.copy().items():
            tokens.setdefault(token, []).append(document_id)
        return tokens
