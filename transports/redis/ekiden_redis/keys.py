"""The names of everything that is kept in Redis.

    {PREFIX:QUEUE}:messages    hash         id -> what was published: priority, due, headers and body, packed
    {PREFIX:QUEUE}:held        hash         id -> attempts, place in the order, token; for what is or was handed out
                                            and for what is delayed; nothing while a message only waits
    {PREFIX:QUEUE}:ready       sorted set   id -> place in the order
    {PREFIX:QUEUE}:delayed     sorted set   id -> when it is due, in milliseconds of the server's clock
    {PREFIX:QUEUE}:leased      sorted set   id -> when its lease ends, likewise
    {PREFIX:QUEUE}:bell        list         one element when a consumer should look; consumers block on it
    {PREFIX:QUEUE}:sequence    string       the place in the order that was given last
    {PREFIX:QUEUE}:open        string       of a ``reply.*`` queue: it exists, and expires with its consumer
    {PREFIX:TOPIC}:events      stream       what was broadcast lately

The part in braces is what a cluster looks at to place a key: all keys of one queue are on one server. So that no two
places and no two names ever meet, braces and percent signs in a prefix or a name are percent-encoded, and in a prefix
the colon too: the first colon behind the brace always ends the prefix, and the first closing brace the name.
``ekiden_redis.scripts`` says who writes what, and what always holds.
"""

from __future__ import annotations

from binascii import crc_hqx
from functools import lru_cache

import msgspec

CLUSTER_SLOTS = 16384


_IN_A_NAME = {ord(character): f"%{ord(character):02X}" for character in "%{}"}
_IN_A_PREFIX = {**_IN_A_NAME, ord(":"): "%3A"}


class QueueKeys(msgspec.Struct, frozen=True):
    """The keys of one queue."""

    messages: bytes
    held: bytes
    ready: bytes
    delayed: bytes
    leased: bytes
    bell: bytes
    sequence: bytes
    open: bytes


def prefix_in_keys(prefix: str) -> str:
    """``prefix`` as it stands in the names of keys."""
    return prefix.translate(_IN_A_PREFIX)


def key(prefix: str, name: str, part: str) -> bytes:
    """The key of one ``part`` of what is called ``name``. All parts of one name are on one server of a cluster."""
    return f"{{{prefix_in_keys(prefix)}:{name.translate(_IN_A_NAME)}}}:{part}".encode()


@lru_cache(maxsize=4096)
def queue_keys(prefix: str, queue: str) -> QueueKeys:
    """The keys of a queue."""
    return QueueKeys(*(key(prefix, queue, part) for part in QueueKeys.__struct_fields__))


def events_key(prefix: str, topic: str) -> bytes:
    """The stream of a topic."""
    return key(prefix, topic, "events")


def slot_of(key: bytes) -> int:
    """Which of a cluster's 16384 slots ``key`` is in."""
    begin = key.find(b"{")
    if begin >= 0:
        end = key.find(b"}", begin + 1)
        if end > begin + 1:
            key = key[begin + 1 : end]
    return crc_hqx(key, 0) % CLUSTER_SLOTS
