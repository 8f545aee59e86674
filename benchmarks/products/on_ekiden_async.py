"""The same in ``async def`` tasks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import stamps
from ekiden import Ekiden

app = Ekiden("bench", broker=os.environ["BENCH_EKIDEN_URL"], backend=os.environ.get("BENCH_EKIDEN_RESULTS_URL"))
started = stamps.opened()


@app.task(ignore_result=True)
async def noop(index: int) -> None:
    started.mark(index)


@app.task
async def stored(index: int) -> int:
    started.mark(index)
    return index


@app.task(ignore_result=True)
async def sleeping(index: int) -> None:
    started.mark(index)
    await asyncio.sleep(0.05)


@app.task
async def add(x: int, y: int) -> int:
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
