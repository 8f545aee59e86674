"""What pymongo reaches alone, with a queue of the same promises: the ceiling for the MongoDB transport.

    python benchmarks/raw_mongodb.py [--messages N] [--url URL]

It sends the commands that ekiden sends, to collections with the same indexes: a publish is acknowledged by a majority's
journals, refuses an id a second time and rings; a claim finds ids, takes them with a fresh token and a lease by the
server's clock, and reads what it won; settling deletes what the token holds. It leaves out: headers, several queues,
consumer names, leases that have ended, follow-ups, answers for each message, the measure of the server's clock, the
decoding of calls, deadlines, threads, running anything, and every error.

    <name>.messages   {_id, q, s, p, v, o, n, t, b}, as ekiden has them
    <name>.signals    capped: {q, by, t}
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

from ekiden.message import new_id
from pymongo import IndexModel, MongoClient
from pymongo.errors import OperationFailure
from pymongo.write_concern import WriteConcern
from timing import rate_of

BATCH = 100
PRIORITY = 4
LEASE_MS = 60_000
CLAIM_INDEX = [("q", 1), ("s", 1), ("p", 1), ("v", 1), ("o", 1), ("_id", 1)]
ORDER = [("p", 1), ("v", 1), ("o", 1)]
FIELDS = {"p": 1, "n": 1, "b": 1, "h": 1, "d": 1}
BODY = b'["bench.noop","0191f0c2a5d7f3c09f6e4a8b1d2c7e55",1763821000.123456,[12345],{},{"retries":0,"expires":null}]'


class Raw:
    """One queue, by pymongo. ``url`` names the database."""

    def __init__(self, url: str, name: str) -> None:
        self._client: MongoClient[dict[str, Any]] = MongoClient(url)
        database = self._client.get_default_database()
        self._messages = database.get_collection(f"{name}.messages", write_concern=WriteConcern(w=1))
        self._durable = self._messages.with_options(write_concern=WriteConcern(w="majority", j=True))
        self._signals = database.get_collection(f"{name}.signals", write_concern=WriteConcern(w=0))
        vanishing = IndexModel([("x", 1)], name="vanishing", sparse=True, expireAfterSeconds=0)
        self._messages.create_indexes([IndexModel(CLAIM_INDEX, name="claim"), vanishing])
        try:
            database.create_collection(f"{name}.signals", capped=True, size=1024 * 1024)
        except OperationFailure:  # a work-alike without capped collections
            database.create_collection(f"{name}.signals")

    def publish_one_by_one(self, count: int) -> None:
        """One insertion and one ring each."""
        for _ in range(count):
            self._publish(1)

    def publish_in_batches(self, count: int) -> None:
        """The same for 100."""
        for start in range(0, count, BATCH):
            self._publish(min(BATCH, count - start))

    def _publish(self, count: int) -> None:
        now = datetime.now(UTC)
        order = time.time_ns()
        self._durable.insert_many(
            [
                {
                    "_id": f"default\0{new_id()}",
                    "q": "default",
                    "s": 0,
                    "p": 9 - PRIORITY,
                    "n": 0,
                    "b": BODY,
                    "v": now,
                    "o": order + number,
                }
                for number in range(count)
            ],
            ordered=False,
        )
        self._signals.insert_one({"q": ["default"], "by": "raw", "t": now})

    def drain(self, count: int) -> float:
        """Claim 100, settle 100, until ``count`` are settled; how many a second."""
        messages = self._messages
        began = time.perf_counter()
        left = count
        while left > 0:
            now = datetime.now(UTC)
            ready = {"q": "default", "s": 0, "p": {"$gte": 0, "$lte": 9}, "v": {"$lte": now}}
            found = messages.find(
                ready, {"_id": 1}, sort=ORDER, limit=BATCH, batch_size=BATCH + 1, hint=CLAIM_INDEX
            ).to_list()
            ids = [document["_id"] for document in found]
            token = f"raw\0{os.urandom(8).hex()}"
            lease_end = {"$add": ["$$NOW", LEASE_MS]}
            messages.update_many(
                {"_id": {"$in": ids}, "s": 0, "v": {"$lte": now}},
                [{"$set": {"s": 1, "v": lease_end, "n": {"$add": ["$n", 1]}, "t": {"$literal": token}}}],
            )
            ours = {"_id": {"$in": ids}, "t": token}
            won = messages.find(ours, FIELDS, batch_size=len(ids) + 1).to_list()
            settled = messages.delete_many(ours).deleted_count
            if not settled or settled != len(won):
                raise SystemExit("a lease was lost in the raw loop")
            left -= settled
        return count / (time.perf_counter() - began)

    def close(self) -> None:
        """Drop its collections."""
        self._messages.drop()
        self._signals.drop()
        self._client.close()


def main() -> None:
    from document_servers import MongoDBServer

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--messages", type=int, default=400)
    parser.add_argument("--url", help="a server on this machine; else one is started")
    options = parser.parse_args()
    rates: dict[str, list[float]] = {}
    with closing(MongoDBServer(options.url)) as server:
        print(server.described())
        raw = Raw(server.environment(results=False)["BENCH_URL"], "raw")
        for _ in range(5):
            one_by_one = options.messages // 4
            rates.setdefault("publish, one at a time", []).append(rate_of(raw.publish_one_by_one, one_by_one))
            raw.drain(one_by_one)
            rates.setdefault("publish, 100 at a time", []).append(rate_of(raw.publish_in_batches, options.messages))
            rates.setdefault("claim 100 and settle 100", []).append(raw.drain(options.messages))
        raw.close()
    for what, values in rates.items():
        print(f"{what:32} {statistics.median(values):10.0f} per s   ({min(values):.0f} to {max(values):.0f})")


if __name__ == "__main__":
    main()
