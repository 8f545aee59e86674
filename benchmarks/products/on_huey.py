"""The same with huey, whose worker loses what it is running when it dies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import stamps
from huey import RedisHuey

huey = RedisHuey(os.environ["BENCH_NAME"], url=os.environ["BENCH_URL"], clean_name=False)
started = stamps.opened()


@huey.task()
def noop(index: int) -> None:
    started.mark(index)


@huey.task()
def stored(index: int) -> int:
    started.mark(index)
    return index


@huey.task()
def sleeping(index: int) -> None:
    started.mark(index)
    time.sleep(0.05)


@huey.task()
def add(x: int, y: int) -> int:
    return x + y


def send(index: int) -> None:
    noop(index)


def send_stored(index: int) -> None:
    stored(index)


def send_sleeping(index: int) -> None:
    sleeping(index)


def round_trip() -> None:
    assert add(1, 2).get(blocking=True, timeout=10, backoff=1.0, max_delay=0.001) == 3


def fill(one: Callable[[int], None], count: int) -> None:
    for index in range(count):
        one(index)
