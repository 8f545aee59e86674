"""How many there may be of anything: the types of numbers that options and settings share, and the command's ranges."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

MOST = 2**31 - 1
"""No number of things is larger: brokers, stores and systems count in 32 bits in many places."""

MOST_THREADS, MOST_IN_HAND = 10_000, 1_000_000

Count = Annotated[int, Meta(ge=1, le=MOST)]
Tries = Annotated[int, Meta(ge=0, le=MOST)]
Threads = Annotated[int, Meta(ge=1, le=MOST_THREADS)]
InHand = Annotated[int, Meta(ge=1, le=MOST_IN_HAND)]
