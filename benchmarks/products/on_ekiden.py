"""The tasks as ekiden has them, and how they are sent. Every module ``on_...`` here has the same functions.

send(index)           a body that marks that it began; its result is not kept
send_stored(index)    the same, and its result is stored
send_sleeping(index)  the same as the first, and it sleeps for 50 ms
round_trip()          send, wait for the result
fill(send, count)     send many before a worker starts, by the quickest way that there is
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import stamps
from ekiden import Ekiden

app = Ekiden("bench", broker=os.environ["BENCH_EKIDEN_URL"], backend=os.environ.get("BENCH_EKIDEN_RESULTS_URL"))
started = stamps.opened()


@app.task(ignore_result=True)
def noop(index: int) -> None:
    started.mark(index)


@app.task
def stored(index: int) -> int:
    started.mark(index)
    return index


@app.task(ignore_result=True)
def sleeping(index: int) -> None:
    started.mark(index)
    time.sleep(0.05)


@app.task
def add(x: int, y: int) -> int:
    return x + y


def send(index: int) -> None:
    noop.delay(index)


def send_stored(index: int) -> None:
    stored.delay(index)


def send_sleeping(index: int) -> None:
    sleeping.delay(index)


def round_trip() -> None:
    assert add.delay(1, 2).get(10) == 3


def fill(one: Callable[[int], None], count: int) -> None:
    task = {send: noop, send_stored: stored, send_sleeping: sleeping}[one]
    task.enqueue_many((index,) for index in range(count))
