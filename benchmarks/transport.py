"""What a transport and its backend cost by themselves, without tasks, beside the raw client, in one run.

    python benchmarks/transport.py sqlite|redis|rabbitmq|mongodb|couchdb [--messages N] [--queue-type quorum|classic]

Each line is microseconds per message, ours beside the raw client's, and the ratio of their rates (100 % is as fast as
raw). ``raw_*.py`` say what the raw clients do, and what they leave out.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ekiden.message import Ending, Message, new_id
from ekiden.plugins import open_backend, open_transport
from ekiden.results import Start, StoredResult
from products.raw import raw_queue
from servers import end_in_good_order, server_for
from timing import in_batches, later, rate_of

BODY = b'["bench.noop","0191f0c2a5d7f3c09f6e4a8b1d2c7e55",1763821000.123456,[12345],{},{"retries":0,"expires":null}]'
BATCH = 100


@dataclass(frozen=True)
class Amounts:
    """How many messages; one of ``single_share`` of them is published alone; ``delayed`` lie beside, if any."""

    messages: int = 20_000
    single_share: int = 4
    delayed: int = 100_000
    waits: int = 200


# A confirm of RabbitMQ's takes milliseconds. What stands in for the last two looks at every message for each claim.
AMOUNTS = {
    "sqlite": Amounts(),
    "redis": Amounts(),
    "rabbitmq": Amounts(single_share=20),
    "mongodb": Amounts(messages=1000, delayed=500, waits=50),
    "couchdb": Amounts(messages=1000, delayed=500, waits=50),
}


class Raw(Protocol):
    """The raw client's queue."""

    def publish_one_by_one(self, count: int) -> None: ...
    def publish_in_batches(self, count: int) -> None: ...
    def drain(self, count: int) -> float: ...
    def close(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("broker", choices=tuple(AMOUNTS))
    parser.add_argument("--messages", type=int, default=None)
    parser.add_argument("--url", help="the server, on this machine; without a virtual host for RabbitMQ")
    parser.add_argument("--queue-type", choices=("quorum", "classic"), default="quorum")
    options = parser.parse_args()
    end_in_good_order()
    with _opened(options) as (url, backend_url, raw):
        ours = Ours(url, backend_url)
        try:
            amounts = AMOUNTS[options.broker]
            measure(ours, raw, replace(amounts, messages=options.messages or amounts.messages))
        finally:
            ours.close()
            raw.close()


def measure(ours: Ours, raw: Raw, amounts: Amounts) -> None:
    """Print a line for each."""
    count, singles = amounts.messages, amounts.messages // amounts.single_share
    compare("publish, one at a time", singles, ours.publish_one_by_one, raw.publish_one_by_one)
    compare("publish, 100 at a time", count, ours.publish_in_batches, raw.publish_in_batches)
    compare("claim and settle in batches", count, ours.drain, raw.drain)
    if ours.transport.description.purges_delayed:
        ours.publish_in_batches(amounts.delayed, due=time.time() + 3600)
        ours.publish_in_batches(count)
        show(f"claim and settle beside {amounts.delayed:,} delayed", 1e6 / ours.drain(count))
    show("a message wakes an idle consumer (median)", ours.wake_consumer(amounts.waits))
    show("store results, 100 at a time", 1e6 / rate_of(ours.put, count))
    show("begin, 100 at a time", 1e6 / rate_of(ours.begin, count))
    show("a result wakes who waits (median)", ours.wake_waiter(amounts.waits))


@contextlib.contextmanager
def _opened(options: argparse.Namespace) -> Iterator[tuple[str, str, Raw]]:
    """Where ours is, where its results are, and the raw queue."""
    if options.broker == "sqlite":
        import raw_sqlite

        with tempfile.TemporaryDirectory() as directory:
            url = f"sqlite:///{Path(directory) / 'ours.db'}"
            yield url, url, raw_sqlite.Raw(Path(directory) / "raw.db")
        return
    with contextlib.closing(server_for(options.broker, options.url, queue_type=options.queue_type)) as server:
        told = server.environment(results=True)
        ours = told["BENCH_EKIDEN_URL"]
        yield ours, told.get("BENCH_EKIDEN_RESULTS_URL", ours), raw_queue(told)


class Ours:
    """What is measured."""

    def __init__(self, url: str, backend_url: str) -> None:
        self.transport = open_transport(url)
        self.backend = open_backend(backend_url)
        self.consumer = self.transport.consumer(["default"], lease=60, prefetch=BATCH, name="bench")
        self.idle = self.transport.consumer(["idle"], lease=60, prefetch=BATCH, name="idle")

    def publish_one_by_one(self, count: int) -> None:
        for _ in range(count):
            self.transport.publish([Message(new_id(), "default", BODY)])

    def publish_in_batches(self, count: int, due: float | None = None) -> None:
        for messages in in_batches((Message(new_id(), "default", BODY, due=due) for _ in range(count)), BATCH):
            self.transport.publish(messages)

    def drain(self, count: int) -> float:
        """How many a second, from the first delivery on."""
        left, began = count, time.perf_counter()
        while left > 0:
            deliveries = self.consumer.receive(BATCH, 5)
            self.consumer.settle([Ending(delivery) for delivery in deliveries])
            left -= len(deliveries)
        return count / (time.perf_counter() - began)

    def put(self, count: int) -> None:
        for results in in_batches((StoredResult(new_id(), "SUCCESS", 0, b"3", 86400) for _ in range(count)), BATCH):
            self.backend.put(results)

    def begin(self, count: int) -> None:
        for starts in in_batches((Start(new_id(), 0, new_id(), 86400) for _ in range(count)), BATCH):
            self.backend.begin(starts)

    def wake_consumer(self, count: int) -> float:
        delays = []
        for _ in range(count):
            published = later(self.transport.publish, [Message(new_id(), "idle", BODY)])
            deliveries = self.idle.receive(1, 5)
            delays.append(time.perf_counter() - published[0])
            self.idle.settle([Ending(delivery) for delivery in deliveries])
        return statistics.median(delays) * 1e6

    def wake_waiter(self, count: int) -> float:
        delays = []
        for _ in range(count):
            result = StoredResult(new_id(), "SUCCESS", 0, b"3", 86400)
            stored = later(self.backend.put, [result])
            self.backend.wait([result.task_id], 5)
            delays.append(time.perf_counter() - stored[0])
        return statistics.median(delays) * 1e6

    def close(self) -> None:
        self.backend.close()
        self.transport.close()


def compare(what: str, count: int, ours: Callable[[int], object], raw: Callable[[int], object]) -> None:
    """Both, a quarter at a time in turn, so that what else the machine does meets both."""
    times: dict[str, list[float]] = {"ours": [], "raw": []}
    for _ in range(4):
        times["raw"].append(1e6 / rate_of(raw, count // 4))
        times["ours"].append(1e6 / rate_of(ours, count // 4))
    show(what, statistics.median(times["ours"]), statistics.median(times["raw"]))


def show(what: str, ours: float, raw: float | None = None) -> None:
    beside = f"raw {raw:8.2f} us   {raw / ours:6.0%} of its rate" if raw is not None else ""
    print(f"{what:44} {ours:8.2f} us   {beside}", flush=True)


if __name__ == "__main__":
    main()
