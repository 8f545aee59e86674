"""What a ``memory://`` URL may say."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class MemoryOptions(msgspec.Struct, frozen=True):
    """What may stand behind the ``?`` of a ``memory://`` URL.

    ``max_messages``: how many messages the broker holds before it answers that it is full.
    ``max_message_bytes``: the largest body it takes. ``max_value_bytes``: the largest result or record that is stored.
    """

    max_messages: Annotated[int, Meta(ge=0)] = 10_000_000
    max_message_bytes: Annotated[int, Meta(ge=0)] = 64 * 1024 * 1024
    max_value_bytes: Annotated[int, Meta(ge=0)] = 64 * 1024 * 1024
