"""Claiming and settling in batches, by ekiden's transport and by the raw client, in turns; prints JSON: name to rates.

claiming.py ROUNDS COUNT: in each round, both publish COUNT messages, and then claim and settle them.
"""

from __future__ import annotations

import json
import os
import sys
import time

import raw
from ekiden.message import Ending, Message, new_id
from ekiden.plugins import open_transport

BATCH = 100
BODY = b'["bench.noop","0191f0c2a5d7f3c09f6e4a8b1d2c7e55",1763821000.123456,[12345],{},{"retries":0,"expires":null}]'


def main() -> None:
    rounds, count = int(sys.argv[1]), int(sys.argv[2])
    theirs = raw.opened()
    ours = Ours(os.environ["BENCH_EKIDEN_URL"])
    rates: dict[str, list[float]] = {"claim and settle, raw": [], "claim and settle": []}
    try:
        for number in range(rounds + 1):
            theirs.publish_in_batches(count)
            ours.publish_in_batches(count)
            rate_of_theirs, rate_of_ours = theirs.drain(count), ours.drain(count)
            if number:  # the first round connects, and finds out what the server can do
                rates["claim and settle, raw"].append(rate_of_theirs)
                rates["claim and settle"].append(rate_of_ours)
    finally:
        ours.close()
        theirs.close()
    print(json.dumps(rates), flush=True)


class Ours:
    """The same as the raw client's queue, by the transport."""

    def __init__(self, url: str) -> None:
        self._transport = open_transport(url)
        self._consumer = self._transport.consumer(["default"], lease=60, prefetch=BATCH, name="bench")

    def publish_in_batches(self, count: int) -> None:
        for start in range(0, count, BATCH):
            size = min(BATCH, count - start)
            self._transport.publish([Message(new_id(), "default", BODY) for _ in range(size)])

    def drain(self, count: int) -> float:
        """Claim 100, settle 100, until ``count`` are settled; how many a second."""
        began = time.perf_counter()
        left = count
        while left > 0:
            deliveries = self._consumer.receive(BATCH, 5)
            self._consumer.settle([Ending(delivery) for delivery in deliveries])
            left -= len(deliveries)
        return count / (time.perf_counter() - began)

    def close(self) -> None:
        self._consumer.close()
        self._transport.close()


if __name__ == "__main__":
    main()
