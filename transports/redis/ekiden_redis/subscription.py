"""One connection to one server, which tells us of the results that we follow.

It speaks RESP3, where a connection that is subscribed may ask as well. So following some tasks is one write:

    SUBSCRIBE channel ...      from now on we are told of final results, as they are stored
    MGET result ...            and this is what is stored already: nothing falls between the two

In a cluster each task is subscribed to and looked for by itself, at its own server, and (from version 7 on) on a
shard channel: what is told on an ordinary one goes to every server of the cluster.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

import hiredis
import msgspec

from ekiden_redis.connection import Connection, Part, Reply, pack
from ekiden_redis.store_keys import StoreKeys

AT_ONCE = 256
"""Tasks that one command is about."""

LEFT_AT_ONCE = 64
"""Channels that are left together: nothing is told on them any more, so there is no hurry."""

Asker = TypeVar("Asker")


class Told(msgspec.Struct, Generic[Asker]):
    """What is stored of some tasks: None for nothing, ``b""`` for a final result that is too long to be told.

    ``asker`` is who looked for them; None when nobody did and we were told, or when nobody in particular did.
    """

    task_ids: Sequence[str]
    stored: Sequence[bytes | None]
    asker: Asker | None = None


class Moved(OSError):
    """Another server of the cluster has these tasks now."""

    def __init__(self) -> None:
        super().__init__("it has given some tasks to another server of its cluster")
        self.strerror = str(self)


class _Look(NamedTuple, Generic[Asker]):
    task_ids: Sequence[str]
    asker: Asker | None
    at: float


class Subscription(Generic[Asker]):
    """Used by one thread at a time. What it raises is what its connection raises; after that it must be closed."""

    def __init__(self, connection: Connection, keys: StoreKeys, *, one_by_one: bool) -> None:
        self._connection = connection
        self._keys = keys
        sharded = connection.has_shard_channels()
        self._subscribe, self._unsubscribe = (
            (b"SSUBSCRIBE", b"SUNSUBSCRIBE") if sharded else (b"SUBSCRIBE", b"UNSUBSCRIBE")
        )
        self._at_once = 1 if one_by_one else AT_ONCE
        self._looks: deque[_Look[Asker]] = deque()
        self._done: set[str] = set()
        self._leaving: set[bytes] = set()

    def fileno(self) -> int:
        """The socket's file descriptor: when it is readable, ``receive`` has something to do."""
        return self._connection.fileno()

    def follow(self, task_ids: Sequence[str], asker: Asker | None, deadline: float) -> int:
        """Be told of these tasks from now on, and look for them. Returns in how many parts the look is answered."""
        self._done.difference_update(task_ids)
        commands = self._goodbyes() if len(self._done) >= LEFT_AT_ONCE else []
        for some in self._parts(task_ids):
            commands.append((self._subscribe, *map(self._keys.channel, some)))
            commands.append(self._look_for(some, asker))
        self._connection.send(pack(commands), deadline)
        return -(-len(task_ids) // self._at_once)

    def look(self, task_ids: Sequence[str], deadline: float) -> None:
        """Look for these tasks, for nobody in particular."""
        self._connection.send(pack(self._look_for(some, None) for some in self._parts(task_ids)), deadline)

    def leave(self, task_ids: Iterable[str]) -> None:
        """Follow these no longer. The server learns it when there are some to be left together."""
        self._done.update(task_ids)

    def receive(self) -> list[Told[Asker]]:
        """What has arrived, without waiting for it."""
        return [told for told in map(self._understood, self._connection.read_arrived()) if told is not None]

    def unanswered_since(self) -> float:
        """When it looked for what it was not told yet, on the monotonic clock; infinity when it was told everything."""
        return self._looks[0].at if self._looks else math.inf

    def close(self) -> None:
        """Close the connection. May be called again."""
        self._connection.close()

    def _parts(self, task_ids: Sequence[str]) -> Iterable[Sequence[str]]:
        return (task_ids[start : start + self._at_once] for start in range(0, len(task_ids), self._at_once))

    def _look_for(self, task_ids: Sequence[str], asker: Asker | None) -> tuple[Part, ...]:
        self._looks.append(_Look(task_ids, asker, time.monotonic()))
        return (b"MGET", *map(self._keys.result, task_ids))

    def _goodbyes(self) -> list[tuple[Part, ...]]:
        commands: list[tuple[Part, ...]] = []
        for some in self._parts(list(self._done)):
            channels = [self._keys.channel(task_id) for task_id in some]
            self._leaving.update(channels)
            commands.append((self._unsubscribe, *channels))
        self._done.clear()
        return commands

    def _understood(self, reply: Reply) -> Told[Asker] | None:
        if isinstance(reply, hiredis.PushNotification):
            return self._pushed(reply)
        is_error = isinstance(reply, hiredis.ReplyError)
        if is_error and not str(reply).startswith("ASK "):
            raise Moved if str(reply).startswith("MOVED ") else reply
        look = self._looks.popleft()
        # ASK: the slot is on its way to another server. When it has arrived, our subscription is ended, and we move.
        return Told(look.task_ids, [None] * len(look.task_ids) if is_error else reply, look.asker)

    def _pushed(self, push: Reply) -> Told[Asker] | None:
        kind, channel, what = push
        if kind in {b"message", b"smessage"}:
            return Told((self._keys.told_of(channel),), (what,))
        if kind == self._unsubscribe.lower():
            if channel not in self._leaving:
                raise Moved
            self._leaving.discard(channel)
        return None
