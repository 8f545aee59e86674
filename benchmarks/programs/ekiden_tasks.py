"""The tasks that benchmarks send: a body that does nothing but count, so that the rate can be told."""

import os
import time
from pathlib import Path

from ekiden import Ekiden

directory = Path(os.environ["BENCH_DIRECTORY"])
app = Ekiden("bench", broker=f"sqlite:///{directory / 'ekiden.db'}")
times: list[float] = []


def count_one(total: int) -> None:
    times.append(time.perf_counter())
    if len(times) == total:
        (directory / "rate").write_text(str((total - 1) / (max(times) - min(times))))
        times.clear()


@app.task(ignore_result=True)
def noop(total: int) -> None:
    count_one(total)


@app.task
def stored(total: int) -> int:
    count_one(total)
    return total


@app.task
def add(x: int, y: int) -> int:
    return x + y
