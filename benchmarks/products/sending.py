"""What sending costs with ekiden and with the raw client, in turns in one process; prints JSON: name to rates.

sending.py ROUNDS COUNT: in each round, COUNT single publishes and 10 times as many in batches.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable

import on_ekiden
import raw

BATCH_FACTOR = 10
THREADS = 16


def main() -> None:
    rounds, count = int(sys.argv[1]), int(sys.argv[2])
    queue = raw.opened()
    measures: dict[str, tuple[Callable[[int], object], int]] = {
        "single publish, raw": (queue.publish_one_by_one, count),
        "delay()": (delay, count),
        "delay() in 16 threads": (delay_in_threads, count),
        "publish in batches, raw": (queue.publish_in_batches, count * BATCH_FACTOR),
        "enqueue_many()": (enqueue_many, count * BATCH_FACTOR),
    }
    rates: dict[str, list[float]] = {name: [] for name in measures}
    try:
        for act, _ in measures.values():
            act(100)  # connect
        for _ in range(rounds):
            for name, (act, times) in measures.items():
                began = time.perf_counter()
                act(times)
                rates[name].append(times / (time.perf_counter() - began))
            on_ekiden.app.opened_transport().purge("default")
    finally:
        queue.close()
        on_ekiden.app.close()
    print(json.dumps(rates), flush=True)


def delay(count: int) -> None:
    for index in range(count):
        on_ekiden.noop.delay(index)


def delay_in_threads(count: int) -> None:
    threads = [threading.Thread(target=delay, args=(count // THREADS,)) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def enqueue_many(count: int) -> None:
    on_ekiden.noop.enqueue_many((index,) for index in range(count))


if __name__ == "__main__":
    main()
