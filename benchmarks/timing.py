"""Small things that more than one benchmark times with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def rate_of(act: Callable[[int], object], count: int) -> float:
    """How many a second ``act(count)`` does."""
    began = time.perf_counter()
    act(count)
    return count / (time.perf_counter() - began)


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items; the last one may be shorter."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def later(act: Callable[[list[Any]], object], batch: list[Any]) -> list[float]:
    """Do it in 5 ms in a thread; the returned list then holds when it began."""
    began: list[float] = []

    def run() -> None:
        time.sleep(0.005)
        began.append(time.perf_counter())
        act(batch)

    threading.Thread(target=run).start()
    return began
