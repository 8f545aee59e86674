"""What a task costs on SQLite, from ``delay()`` to settled, beside plain sqlite3 and beside huey, in one run.

    pip install -e '.[benchmarks]'
    python benchmarks/sqlite_tasks.py [--tasks N] [--rounds N]

A new user's settings: one worker process started by the command line's supervisor, defaults otherwise. Rates are from
the first execution to the last, as the bodies saw it. Each figure is the median of the rounds; ratios are of medians.
huey's worker loses a task that is running when it dies, ekiden's does not; both write with ``synchronous=normal``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from raw_sqlite import Raw

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    figures: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, measure in MEASURES.items():
            with tempfile.TemporaryDirectory() as directory:
                for key, figure in measure(Path(directory), options.tasks).items():
                    figures.setdefault(f"{name}{key}", []).append(figure)
    show(figures)


def show(figures: dict[str, list[float]]) -> None:
    middle = {name: statistics.median(values) for name, values in figures.items()}
    for name, values in figures.items():
        print(f"{name:44} {middle[name]:12.4g}   ({min(values):.4g} to {max(values):.4g})")
    print()
    for text, over, under, wanted in RATIOS:
        print(f"{text:56} {middle[over] / middle[under]:8.2f}   (wanted: {wanted})")


def ours(directory: Path, count: int) -> dict[str, float]:
    """One process sends, another works; then the same with results stored."""
    found = run("ekiden_client.py", directory, str(count))
    return {f" {name}": float(value) for name, value in (line.split() for line in found.splitlines())}


def huey(directory: Path, count: int) -> dict[str, float]:
    """The same with huey's consumer, eight threads and one."""
    found = run("huey_client.py", directory, str(count // 4))
    return {f" {name}": float(value) for name, value in (line.split() for line in found.splitlines())}


def run(program: str, directory: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(HERE / "programs"), "BENCH_DIRECTORY": str(directory)}
    finished = subprocess.run(
        [sys.executable, str(HERE / "programs" / program), *arguments],
        env=environment,
        cwd=directory,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    return finished.stdout


def raw(directory: Path, count: int) -> dict[str, float]:
    """Plain sqlite3 with the rows that ekiden writes, under its indexes, ringing its bell; nothing is run."""
    writer = Raw(directory / "raw.db")
    began = time.perf_counter()
    writer.publish_one_by_one(count // 4)
    one_by_one = time.perf_counter()
    writer.publish_in_batches(count - count // 4)
    by_the_hundred = time.perf_counter()
    writer.drain(count)
    drained = time.perf_counter()
    writer.close()
    return {
        " row and bell, 1 at a time, per s": count // 4 / (one_by_one - began),
        " rows and bell, 100 at a time, per s": (count - count // 4) / (by_the_hundred - one_by_one),
        " claim 100 + delete 100, per s": count / (drained - by_the_hundred),
    }


MEASURES: dict[str, Callable[[Path, int], dict[str, float]]] = {"raw": raw, "ekiden": ours, "huey": huey}

RATIOS = (
    ("drain: ekiden / raw claim 100 + delete 100", "ekiden drain", "raw claim 100 + delete 100, per s", ">= 0.35"),
    ("drain: ekiden / huey's best", "ekiden drain", "huey drain", ">= 8"),
    ("drain with results: ekiden / ekiden without", "ekiden drain_with_results", "ekiden drain", "> 0.5"),
    ("delay(): ekiden / the same row and bell", "ekiden delay", "raw row and bell, 1 at a time, per s", ">= 0.55"),
    (
        "enqueue_many: ekiden / the same rows",
        "ekiden enqueue_many",
        "raw rows and bell, 100 at a time, per s",
        ">= 0.5",
    ),
)


if __name__ == "__main__":
    main()
