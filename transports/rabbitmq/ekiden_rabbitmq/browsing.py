"""Looking at the messages of a queue, as far as AMQP can: fetch them, and give them back. On the I/O thread.

There is no other way to see a message than to be handed it, so each look counts as a hand-out, and consumers do not get
what is being looked at meanwhile. Everything goes back when the channel closes, in its order.

A look always begins at the front. A cursor says how many messages were seen before it and, in the process that made
it, which: so a page is right although some of them are gone. Elsewhere it skips that many.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from ekiden.message import Condition, Seen, new_id

from ekiden_rabbitmq import encoding
from ekiden_rabbitmq.connection import Channel, Connection, Got
from ekiden_rabbitmq.io_thread import Reply

GETS_AT_ONCE = 100
CURSORS_KEPT = 100

_LONGEST_POSITION = 18
"""More digits no cursor of ours has."""


class Cursors:
    """What recent looks have shown: by look, the ids in their order."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, list[str]] = OrderedDict()

    def seen_before(self, cursor: str | None) -> tuple[str, list[str], int]:
        """The look that ``cursor`` continues, the ids it has shown, and how many messages those were."""
        look, _, position = (cursor or "").partition(".")
        count = int(position[:_LONGEST_POSITION]) if position.isdecimal() else 0
        return look or new_id(), self._seen.get(look, [])[:count], count

    def keep(self, look: str, ids: list[str]) -> None:
        """Remember what was shown."""
        self._seen[look] = ids
        self._seen.move_to_end(look)
        while len(self._seen) > CURSORS_KEPT:
            self._seen.popitem(last=False)


async def browse(
    connection: Connection,
    cursors: Cursors,
    queue: str,
    names: Mapping[str, int],
    *,
    after: str | None,
    limit: int,
) -> list[Seen]:
    """Up to ``limit`` messages behind ``after`` of the queues ``names``, each with the priority that it holds."""
    server = await connection.opened()
    look, shown, count = cursors.seen_before(after)
    shown_ids = set(shown)
    skip = 0 if shown else count
    seen: list[Seen] = []
    channel = await connection.channel()
    try:
        for name, priority in names.items():
            while len(seen) < limit:
                wanted = min(GETS_AT_ONCE, max(1, skip + limit - len(seen)))
                batch = await _get(channel, name, wanted)
                for got in batch:
                    arrived = encoding.decode(
                        got.properties,
                        got.body,
                        queue,
                        priority=priority,
                        counters=server.differences.hand_out_counters,
                    )
                    if arrived.message.id in shown_ids:
                        shown_ids.discard(arrived.message.id)
                    elif skip:
                        skip -= 1
                    elif len(seen) < limit:
                        count += 1
                        shown.append(arrived.message.id)
                        seen.append(Seen(arrived.message, Condition.READY, arrived.earlier, f"{look}.{count}"))
                if len(batch) < wanted:
                    break
    finally:
        await channel.close()
    cursors.keep(look, shown)
    return seen


async def _get(channel: Channel, name: str, count: int) -> list[Got]:
    """Up to ``count`` messages; fewer when the queue has no more."""
    replies: list[Reply[Got | None]] = [channel.get(name) for _ in range(count)]
    found = [await reply for reply in replies]
    return [got for got in found if got is not None]
