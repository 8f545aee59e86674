"""What still goes into a server that has reached its maxmemory: what workers need to end the calls that are there.

With ``maxmemory-policy noeviction`` such a server refuses what needs memory. For new messages that is right. But the
end of a call needs memory too: its result, the fence's note, its next try, its copy among the dead letters; refused
these, workers would end nothing, and nothing would become free. So what was refused is looked at once more, and sent
``beyond`` maxmemory

- where it is small: a result, an outcome, a record of at most ``SMALL_BYTES``, and every note. There are no more of
  them than of calls in the queues, each call frees its message, and no new ones come in meanwhile;
- where it fits into ``SHARE_BEYOND`` of maxmemory beyond it: larger results, outcomes and records;
- what follows a call and is not larger than the call; and where it is larger by at most ``FOLLOWING_BYTES``, if that
  fits likewise.

What does not go in waits for room, and is tried again like everything that a broker or a store cannot do just now. What
is larger than the whole memory of the server would wait for ever, and is refused for good.
"""

from __future__ import annotations

import msgspec
from ekiden.errors import EkidenError

from ekiden_redis.client import Call, Client

SMALL_BYTES = 1000
FOLLOWING_BYTES = 16 * 1024
SHARE_BEYOND = 0.5

LARGE_BYTES = 64 * 1024
"""What is not larger than this fits into any server's memory."""


class Memory(msgspec.Struct, frozen=True):
    """A server's memory in bytes: in use now, in use when nothing is stored, and its maxmemory."""

    used: int
    used_by_itself: int
    most: int

    def has_room_beyond(self, size: int) -> bool:
        """Whether so many bytes may go beyond maxmemory."""
        return self.used + size <= self.most * (1 + SHARE_BEYOND)

    def can_hold(self, size: int) -> bool:
        """Whether so many bytes fit where nothing else is."""
        return self.used_by_itself + size < self.most


def memory_of(client: Client, key: bytes) -> Memory | None:
    """The memory of the server that has ``key``; None where it has no limit, or does not tell this user."""
    (reply,) = client.run_all([Call(None, (key,), (b"INFO", b"memory"))])
    if isinstance(reply, EkidenError):
        return None
    lines = (line.partition(b":") for line in reply.splitlines())
    told = {name: int(value) for name, _, value in lines if value.isdigit()}
    most = told.get(b"maxmemory", 0)
    return Memory(told.get(b"used_memory", 0), told.get(b"used_memory_startup", 0), most) if most else None


def may_go_beyond(size: int, memory: Memory | None, *, beside: int = 0) -> bool:
    """Whether a result, an outcome or a record of so many bytes may go in, ``beside`` as many that go in with it."""
    return size <= SMALL_BYTES or (memory is not None and memory.has_room_beyond(size + beside))


def may_follow(growth: int, memory: Memory | None) -> bool:
    """Whether what follows a call may go in, which is larger than the call by ``growth`` bytes."""
    if growth <= 0:
        return True
    return growth <= FOLLOWING_BYTES and memory is not None and memory.has_room_beyond(growth)


def never_fits(size: int, memory: Memory | None) -> bool:
    """Whether so many bytes would be refused by this server if it were empty."""
    return size > LARGE_BYTES and memory is not None and not memory.can_hold(size)


def does_not_hold(where: object, size: int, memory: Memory | None) -> str:
    """Say so."""
    most = 0 if memory is None else memory.most
    return f"{where} cannot hold {size} bytes: its maxmemory is {most}."
