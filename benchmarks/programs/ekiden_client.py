"""Sends to a worker process and prints what came of it: names and figures, a line each."""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import psutil
from ekiden import Ekiden
from ekiden_tasks import add, directory, noop, stored


def start_worker() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "ekiden", "worker", "ekiden_tasks:app", "--processes", "1"])


def stop(worker: subprocess.Popen[bytes]) -> None:
    worker.terminate()
    worker.wait(60)


def rate() -> float:
    path = Path(directory, "rate")
    give_up = time.monotonic() + 120
    while not path.exists() or not path.read_text():
        if time.monotonic() > give_up:
            raise SystemExit("the worker did not finish")
        time.sleep(0.01)
    found = float(path.read_text())
    path.unlink()
    return found


def per_second(count: int, began: float) -> float:
    return count / (time.perf_counter() - began)


def main() -> None:
    count = int(sys.argv[1])
    began = time.perf_counter()
    noop.enqueue_many((count,) for _ in range(count))
    print("enqueue_many", per_second(count, began))
    worker = start_worker()
    print("drain", rate())
    stop(worker)
    stored.enqueue_many((count,) for _ in range(count))
    worker = start_worker()
    print("drain_with_results", rate())
    stop(worker)
    few = count // 4
    began = time.perf_counter()
    for _ in range(few):
        noop.delay(few)
    print("delay", per_second(few, began))
    worker = start_worker()
    rate()
    trips = []
    for _ in range(500):
        sent = time.perf_counter()
        add.delay(1, 2).get(10)
        trips.append((time.perf_counter() - sent) * 1e3)
    print("round_trip_p50_ms", median(trips))
    print("round_trip_p99_ms", quantiles(trips, n=100)[98])
    stop(worker)
    began = time.perf_counter()
    worker = start_worker()
    add.delay(1, 2).get(10)
    print("start_to_first_result_s", time.perf_counter() - began)
    idle(worker)
    stop(worker)
    print("memory_round_trip_p50_ms", median(round_trips_in_memory()))
    print("import_ms_beyond_bare_python", 1e3 * (seconds_of("import ekiden") - seconds_of("pass")))


def round_trips_in_memory() -> list[float]:
    """Milliseconds of each of 500 calls, sent, run and awaited in this process."""
    local = Ekiden("local", broker="memory://")
    trips = []

    @local.task
    def add_here(x: int, y: int) -> int:
        return x + y

    with local, local.worker():
        for _ in range(500):
            sent = time.perf_counter()
            add_here.delay(1, 2).get(10)
            trips.append((time.perf_counter() - sent) * 1e3)
    return trips


def seconds_of(program: str) -> float:
    """The shortest of ten runs of an interpreter, in seconds."""
    return min(_run(program) for _ in range(10))


def _run(program: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - began


def idle(worker: subprocess.Popen[bytes]) -> None:
    (process,) = psutil.Process(worker.pid).children()
    before, began = sum(process.cpu_times()[:2]), time.perf_counter()
    time.sleep(5)
    print("idle_cpu_percent", 100 * (sum(process.cpu_times()[:2]) - before) / (time.perf_counter() - began))
    print("idle_resident_MiB", process.memory_info().rss / 2**20)


if __name__ == "__main__":
    main()
