"""The consumer: claims messages in one transaction per batch, and ends them.

A delivery's tag is (seq, claim): the row of the message, and a number that is drawn afresh for each hand-out. It holds
as long as the row has that claim.

Leases end by the wall clock, which all processes of a host share. Where it is seen to jump against the monotonic
clock, a consumer takes back nothing for one lease, so that whoever is alive can extend first.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from sqlite3 import Connection

from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportClosed, TransportError
from ekiden.locks import release_if_held
from ekiden.message import LOST, REPLY_PREFIX, SETTLED, Delivery, Ending, Settled, SettleOutcome
from ekiden.sqlite import statements
from ekiden.sqlite.aside import Garbage, name_in_log, set_aside, set_aside_what_has_no_time
from ekiden.sqlite.bell import Bells, of_queue
from ekiden.sqlite.database import Database, fetch
from ekiden.sqlite.rows import MESSAGE_COLUMNS, NotAll, Row, Unreadable, existing_only, insert, message_in, row_of
from ekiden.transport import Consumer

LOOK_AGAIN_SECONDS = 0.5
"""How long a waiter trusts that it will be rung."""

TIDY_SECONDS = 5.0
JUMP_SECONDS = 1.0
TIMED_AT_ONCE = 1000
"""How many messages that are due, or whose lease ended, one claim makes ready."""

REPLY_QUEUE_KEPT_SECONDS = 60.0
"""How long a ``reply.*`` queue outlives its consumer; one that is open says so every fourth of this."""


class SQLiteConsumer(Consumer):
    """Claims messages and ends them.

    ``_leases`` is what it holds: row -> (claim, when that ends on the monotonic clock). ``receive`` adds to it, the
    thread that settles removes; each does so in single steps. Everything else belongs to the thread that receives.
    """

    def __init__(
        self,
        database: Database,
        bells: Bells,
        queues: Sequence[str],
        *,
        max_message_bytes: int,
        left: Callable[[SQLiteConsumer], None],
        lease: float,
        prefetch: int,
        name: str,
        strict: bool,
    ) -> None:
        self._database = database
        self._bells = bells
        self._max_message_bytes = max_message_bytes
        self._left = left
        self._queues = deque(dict.fromkeys(queues))
        self._queues_as_json = json.dumps(list(self._queues))
        self._reply_queues = json.dumps([queue for queue in self._queues if queue.startswith(REPLY_PREFIX)])
        self._lease = lease
        self._prefetch = prefetch
        self._name = name
        self._strict = strict
        self._leases: dict[int, tuple[int, float]] = {}
        self._clock = _WallClock()
        self._take_back_from = 0.0
        self._next_change = math.inf
        self._keep_reply_queues_at = 0.0
        self._tidy_at = 0.0
        self._waits_for_room = False
        self._receiving = threading.RLock()
        self._stopped = False
        self._closed = False
        self._reopened = database.reopened
        self._take_over()
        self._bell = bells.bell(map(of_queue, self._queues))

    def receive(self, limit: int, timeout: float) -> list[Delivery]:
        give_up = time.monotonic() + timeout
        try:
            with self._receiving:
                return self._receive(limit, give_up)
        except BaseException:
            release_if_held(self._receiving)
            raise

    def settle(self, endings: Sequence[Ending]) -> list[Settled]:
        self._check_open()
        answers: list[Settled] = [SETTLED] * len(endings)
        going: list[tuple[int, Ending, list[Row]]] = []
        now = time.time()
        for index, ending in enumerate(endings):
            rows = [row_of(message, now, max_body_bytes=self._max_message_bytes) for message in ending.publish]
            refused = next((row for row in rows if isinstance(row, BrokerRefused)), None)
            if refused is not None:
                answers[index] = Settled(SettleOutcome.FAILED, refused)
            else:
                going.append((index, ending, [row for row in rows if not isinstance(row, BrokerRefused)]))
        try:
            lost = self._settle([(ending.delivery, rows) for _, ending, rows in going], now)
        except TransportError as error:
            # The file is refused, not an ending: it can be put right, and then all of them are good.
            failed = Settled(SettleOutcome.FAILED, BrokerUnavailable(str(error)))
            for index, _, _ in going:
                answers[index] = failed
            return answers
        self._drop([ending.delivery for _, ending, _ in going])
        for index in lost:
            answers[going[index][0]] = LOST
        followed = {row[0] for _, _, rows in going for row in rows}
        if followed:
            self._ring(followed)
        return answers

    def release(self, deliveries: Sequence[Delivery], delay: float = 0.0, *, keep_attempt: bool = False) -> None:
        self._check_open()
        if not deliveries:
            return
        state, until = (statements.DELAYED, time.time() + delay) if delay > 0 else (statements.READY, None)
        released = _by_claim(deliveries)

        def release(connection: Connection) -> None:
            for claim, rows in released.items():
                connection.execute(statements.RELEASE, (state, until, int(not keep_attempt), str(rows), claim))

        self._database.write(release)
        self._drop(deliveries)
        self._ring({delivery.message.queue for delivery in deliveries})

    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        self._check_open()
        by_claim = _by_claim(deliveries)

        def extend(connection: Connection) -> set[tuple[int, int]]:
            held: set[tuple[int, int]] = set()
            until = time.time() + self._lease
            for claim, rows in by_claim.items():
                if connection.execute(statements.EXTEND, (until, str(rows), claim)).rowcount < len(rows):
                    rows = [row for (row,) in connection.execute(statements.STILL_HELD, (str(rows), claim)).fetchall()]
                held.update((row, claim) for row in rows)
            return held

        try:
            held = self._database.write(extend)
        except TransportError as error:
            return [Settled(SettleOutcome.FAILED, error)] * len(deliveries)
        ends = time.monotonic() + self._lease
        self._leases.update({row: (claim, ends) for row, claim in held})
        self._drop([delivery for delivery in deliveries if delivery.tag not in held])
        return [SETTLED if delivery.tag in held else LOST for delivery in deliveries]

    def stop(self) -> None:
        self._stopped = True
        self._bell.ring()

    def close(self) -> None:
        if not self._closed:
            self.stop()
        try:
            with self._receiving:
                closed_before, self._closed = self._closed, True
        except BaseException:
            release_if_held(self._receiving)
            raise
        if closed_before:
            return
        self._bell.close()
        self._left(self)
        with contextlib.suppress(TransportError):  # then the leases end by themselves
            self._give_everything_back()

    def abandon(self) -> None:
        """In a forked child: what this holds is the parent's."""
        self._closed = self._stopped = True
        self._bell.abandon()

    # Claiming.

    def _receive(self, limit: int, give_up: float) -> list[Delivery]:
        self._check_open()
        while not self._stopped:
            room = min(limit, self._room())
            if room > 0 and (found := self._claim(room)):
                return found
            remaining = give_up - time.monotonic()
            if remaining <= 0:
                break
            self._tidy()
            self._waits_for_room = room <= 0
            if room <= 0 and self._room() > 0:
                continue  # something was settled since room was looked for
            self._bell.wait(max(0.0, min(remaining, LOOK_AGAIN_SECONDS, self._next_change - time.time())))
        return []

    def _claim(self, room: int) -> list[Delivery]:
        now = time.time()
        if self._reopened != self._database.reopened:
            self._begin_anew()
        if self._clock.jumped():
            self._take_back_from = time.monotonic() + self._lease
        if time.monotonic() >= self._keep_reply_queues_at:
            self._keep_reply_queues(now)
        ready, timed = self._look(now)
        if not ready:
            return []
        claim = int.from_bytes(os.urandom(7))

        def hand_out(connection: Connection) -> tuple[list[Delivery], list[Garbage]]:
            for statement, queue in timed:
                connection.execute(statement, (queue, now, TIMED_AT_ONCE))
            deliveries, garbage = self._first_in_turn(connection, ready, room, claim)
            if deliveries:
                rows = [delivery.tag[0] for delivery in deliveries]
                connection.execute(statements.CLAIM, (time.time() + self._lease, claim, self._name, str(rows)))
            set_aside(connection, garbage)
            return deliveries, garbage

        deliveries, garbage = self._database.write(hand_out)
        ends = time.monotonic() + self._lease
        self._leases.update({delivery.tag[0]: (claim, ends) for delivery in deliveries})
        name_in_log(self._database, garbage)
        if garbage and not deliveries:
            return self._claim(room)  # there may be something readable behind it
        return deliveries

    def _first_in_turn(
        self, connection: Connection, ready: set[str], room: int, claim: int
    ) -> tuple[list[Delivery], list[Garbage]]:
        """The first messages of the queues that have some: of each its share, or of the first all there is room for.

        And what stands among them that is no message.
        """
        deliveries: list[Delivery] = []
        garbage: list[Garbage] = []
        waiting = [queue for queue in self._queues if queue in ready]
        for position, queue in enumerate(waiting):
            left = room - len(deliveries)
            share = left if self._strict else -(-left // (len(waiting) - position))
            for columns in fetch(connection, statements.FIRST_READY, (queue, share)):
                seq, attempt = columns[MESSAGE_COLUMNS:]
                try:
                    message = message_in(queue, columns)
                    if type(attempt) is not int or attempt < 1:
                        raise Unreadable(f"the count of its hand-outs is {attempt!r}")
                except Unreadable as error:
                    garbage.append(Garbage(seq, queue, columns[0], str(error)))
                else:
                    deliveries.append(Delivery(message, (seq, claim), attempt))
        if deliveries and not self._strict:
            # Whose turn it was goes to the back.
            self._queues.rotate(-1 - self._queues.index(deliveries[-1].message.queue))
        return deliveries, garbage

    def _look(self, now: float) -> tuple[set[str], list[tuple[str, str]]]:
        """The queues that have something to receive, and what must be made ready first. Takes no lock on the file."""
        ready: set[str] = set()
        timed: list[tuple[str, str]] = []
        self._next_change = math.inf
        patient = time.monotonic() < self._take_back_from
        for queue, has_ready, next_due, next_end in self._database.read(statements.LOOK, (self._queues_as_json,)):
            if has_ready:
                ready.add(queue)
            if next_due is not None and next_due <= now:
                ready.add(queue)
                timed.append((statements.MAKE_DUE_READY, queue))
            if next_end is not None and next_end <= now and not patient:
                ready.add(queue)
                timed.append((statements.TAKE_BACK_ENDED_LEASES, queue))
            later = [at for at in (next_due, next_end) if at is not None and at > now]
            self._next_change = min(self._next_change, *later, math.inf)
        return ready, timed

    def _begin_anew(self) -> None:
        """The file is another one than before: it knows nothing of our reply queues, and its bells may be elsewhere."""
        self._reopened = self._database.reopened
        self._keep_reply_queues_at = 0.0
        self._bells.path = self._database.path
        before, self._bell = self._bell, self._bells.bell(map(of_queue, self._queues))
        before.close()

    def _room(self) -> int:
        room = self._prefetch - len(self._leases)
        if room <= 0:
            now = time.monotonic()
            for row, (_, ends) in self._leases.copy().items():
                if ends <= now:
                    self._leases.pop(row, None)
            room = self._prefetch - len(self._leases)
        return room

    def _take_over(self) -> None:
        """Give back what an earlier consumer of this name held, and make the reply queues."""
        if self._database.write(lambda file: file.execute(statements.GIVE_BACK_ALL_OF, (self._name,)).rowcount):
            self._ring(self._queues)
        self._keep_reply_queues(time.time())

    def _keep_reply_queues(self, now: float) -> None:
        self._keep_reply_queues_at = math.inf
        if self._reply_queues != "[]":
            self._keep_reply_queues_at = time.monotonic() + REPLY_QUEUE_KEPT_SECONDS / 4
            kept = (self._reply_queues, now + REPLY_QUEUE_KEPT_SECONDS)
            self._database.write(lambda file: file.execute(statements.KEEP_REPLY_QUEUE, kept).rowcount)

    def _tidy(self) -> None:
        """What an idle consumer does now and then: drop reply queues that nobody returned to, and empty the WAL."""
        if time.monotonic() < self._tidy_at:
            return
        self._tidy_at = time.monotonic() + TIDY_SECONDS
        now = time.time()
        for (name,) in self._database.read(statements.ENDED_REPLY_QUEUES, (now,)):
            self._database.write(partial(_delete_ended_reply_queue, name, now))
        for queue in list(self._queues):
            if self._database.read(statements.WITHOUT_TIME, (queue,)):
                name_in_log(self._database, self._database.write(partial(set_aside_what_has_no_time, queue)))
        self._database.tidy()

    def _ring(self, queues: Iterable[str]) -> None:
        self._bells.ring(map(of_queue, queues))

    # Ending.

    def _settle(self, endings: list[tuple[Delivery, list[Row]]], now: float) -> list[int]:
        """Settle ``endings`` in one transaction; returns which of them are lost."""
        if not endings:
            return []
        follow_ups = [row for _, rows in endings for row in rows]

        def settle_all(connection: Connection) -> list[int]:
            for claim, held in _by_claim([delivery for delivery, _ in endings]).items():
                if connection.execute(statements.SETTLE, (str(held), claim)).rowcount != len(held):
                    raise NotAll
            if follow_ups:
                insert(connection, existing_only(connection, follow_ups, now))
            return []

        def settle_each(connection: Connection) -> list[int]:
            lost: list[int] = []
            for index, (delivery, rows) in enumerate(endings):
                row, claim = delivery.tag
                if connection.execute(statements.SETTLE, (str([row]), claim)).rowcount:
                    insert(connection, existing_only(connection, rows, now))
                else:
                    lost.append(index)
            return lost

        try:
            return self._database.write(settle_all)
        except NotAll:
            return self._database.write(settle_each)  # to learn which, and to publish nothing for those

    def _drop(self, deliveries: Iterable[Delivery]) -> None:
        """These are not held any more."""
        for delivery in deliveries:
            row, claim = delivery.tag
            lease = self._leases.get(row)
            if lease is not None and lease[0] == claim:
                self._leases.pop(row, None)
        if self._waits_for_room:
            self._waits_for_room = False
            self._bell.ring()

    def _give_everything_back(self) -> None:
        held: dict[int, list[int]] = {}
        for row, (claim, _) in self._leases.items():
            held.setdefault(claim, []).append(row)

        def give_back(connection: Connection) -> None:
            for claim, rows in held.items():
                connection.execute(statements.GIVE_BACK, (str(rows), claim))
            ends = time.time() + REPLY_QUEUE_KEPT_SECONDS
            connection.execute(statements.END_REPLY_QUEUE, (self._reply_queues, ends))

        self._database.write(give_back)
        if held:
            self._ring(self._queues)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"The consumer {self._name!r} was closed.")


class _WallClock:
    """Notices when the wall clock was set."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def jumped(self) -> bool:
        """Whether it was set since the last call."""
        offset = time.time() - time.monotonic()
        jumped = abs(offset - self._offset) > JUMP_SECONDS
        self._offset = offset
        return jumped


def _delete_ended_reply_queue(name: str | bytes, now: float, connection: Connection) -> None:
    if connection.execute(statements.DELETE_REPLY_QUEUE, (name, now)).rowcount:
        connection.execute(statements.DELETE_QUEUE, (name,))


def _by_claim(deliveries: Iterable[Delivery]) -> dict[int, list[int]]:
    """The rows of ``deliveries``, each once, by their claim."""
    found: dict[int, dict[int, None]] = {}
    for delivery in deliveries:
        row, claim = delivery.tag
        found.setdefault(claim, {})[row] = None
    return {claim: list(rows) for claim, rows in found.items()}
