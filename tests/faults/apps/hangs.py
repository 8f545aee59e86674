"""An app whose worker's settling hangs until the test opens the gate. A second of that counts as stuck here."""

from __future__ import annotations

from collections.abc import Sequence

from ekiden import worker
from ekiden.message import Ending, Settled
from ekiden.sqlite.consumer import SQLiteConsumer
from ledger import wait_for
from tasks import app

__all__ = ["app"]

worker._STALLED_SECONDS = 3.0
settle = SQLiteConsumer.settle


def hanging_settle(self: SQLiteConsumer, endings: Sequence[Ending]) -> list[Settled]:
    """What the consumer does, later."""
    wait_for("gate")
    return settle(self, endings)


SQLiteConsumer.settle = hanging_settle
