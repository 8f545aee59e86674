"""The same for huey: its SQLite storage, a body that only counts."""

import os
import time
from pathlib import Path

from huey import SqliteHuey

directory = Path(os.environ["BENCH_DIRECTORY"])
huey = SqliteHuey("bench", filename=str(directory / "huey.db"), results=False)
times: list[float] = []


@huey.task()
def noop(total: int) -> None:
    times.append(time.perf_counter())
    if len(times) == total:
        (directory / "rate").write_text(str((total - 1) / (max(times) - min(times))))
        times.clear()
