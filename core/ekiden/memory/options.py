"""What a ``memory://`` URL may say."""

from __future__ import annotations

import msgspec


class MemoryOptions(msgspec.Struct, frozen=True):
    """What may stand behind the ``?`` of a ``memory://`` URL.

    ``max_messages``: how many messages the broker holds before it answers that it is full.
    ``max_message_bytes``: the largest body it takes. ``max_value_bytes``: the largest result or record that is stored.
    """

    max_messages: int = 10_000_000
    max_message_bytes: int = 64 * 1024 * 1024
    max_value_bytes: int = 64 * 1024 * 1024
