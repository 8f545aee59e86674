"""When each task began to run: monotonic seconds in a file that the worker's processes and the benchmark map.

CLOCK_MONOTONIC is one clock for all processes of a Linux machine. Each task has a place of its own, its index, so any
number of threads and processes may mark at once, and a task that runs twice is counted once.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

PLACES = 100_000


class Stamps:
    """An array of PLACES times, 0.0 where nothing has begun yet."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._times = memoryview(mmap.mmap(file.fileno(), PLACES * 8)).cast("d")

    @classmethod
    def make(cls, path: Path) -> Stamps:
        """New ones, all 0.0."""
        with path.open("wb") as file:
            file.truncate(PLACES * 8)
        return cls(path)

    def mark(self, index: int) -> None:
        """The task of this index begins now."""
        self._times[index] = time.monotonic()

    def clear(self, first: int, count: int) -> None:
        """Nothing has begun yet of ``count`` tasks from the index ``first`` on."""
        for index in range(first, first + count):
            self._times[index] = 0.0

    def times(self, first: int, count: int) -> list[float]:
        """The times of ``count`` tasks from the index ``first`` on."""
        return self._times[first : first + count].tolist()


def opened() -> Stamps:
    """Those of this measurement."""
    return Stamps(Path(os.environ["BENCH_STAMPS"]))
