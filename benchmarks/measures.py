"""The measurements: each starts what it needs, on a queue of its own, ends it, and returns figures by name."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import psutil
from contestants import Contestant
from counting import CountingProxy, HTTPRequests, MongoDBMessages
from products.stamps import Stamps
from servers import Server

HERE = Path(__file__).parent
PATIENCE_SECONDS = 120
FIRST_OF_PACE = 1000
WAKE_EVERY_SECONDS = 0.2
SETTLING_SECONDS = 3.0
REQUESTS = {"mongodb": MongoDBMessages, "couchdb": HTTPRequests}
STANDARD_PORTS = {"mongodb": 27_017, "couchdb": 5984}


class DidNotFinish(Exception):
    """A worker or sender did not do what it was told in time."""


@dataclass
class Place:
    """One measurement's directory, stamps, queue and environment."""

    directory: Path
    stamps: Stamps
    environment: dict[str, str]
    log: IO[bytes]

    def run(self, program: str, *arguments: str) -> Any:
        """Run a program of ``products/`` to its end, and return what it printed, as JSON."""
        try:
            finished = subprocess.run(
                [sys.executable, str(HERE / "products" / program), *arguments],
                env=self.environment,
                cwd=self.directory,
                check=True,
                stdout=subprocess.PIPE,
                stderr=self.log,
                timeout=PATIENCE_SECONDS * 2,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise DidNotFinish(f"{program} {' '.join(arguments)}: {self.last_words()}") from error
        return json.loads(finished.stdout.splitlines()[-1])

    def wait_for(self, first: int, count: int, worker: subprocess.Popen[bytes]) -> list[float]:
        """The moments in which these tasks began, once all have."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while 0.0 in (times := self.stamps.times(first, count)):
            if time.monotonic() > give_up or worker.poll() is not None:
                began = count - times.count(0.0)
                raise DidNotFinish(f"{began} of {count} tasks began: {self.last_words()}")
            time.sleep(0.02)
        return times

    def last_words(self) -> str:
        """The last line that the programs wrote to standard error; all of it is kept in a file that is named."""
        said = (self.directory / "log").read_text(errors="replace")
        with tempfile.NamedTemporaryFile("w", prefix="bench-", suffix=".log", delete=False) as kept:
            kept.write(said)
        return f"{said.strip().rpartition(chr(10))[2]} (all of it is in {kept.name})"


@contextlib.contextmanager
def place(server: Server, contestant: Contestant | None, *, results: bool) -> Iterator[Place]:
    """A directory, stamps and a queue of its own."""
    with tempfile.TemporaryDirectory() as name, (Path(name) / "log").open("ab") as log:
        directory = Path(name)
        stamps = Stamps.make(directory / "stamps")
        told: dict[str, str | None] = {
            **os.environ,
            **server.environment(results=results),
            "PYTHONPATH": os.pathsep.join([str(HERE / "products"), str(HERE), os.environ.get("PYTHONPATH", "")]),
            "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", f"{tempfile.gettempdir()}/bench-pycache"),
            "PYTHONDONTWRITEBYTECODE": None,  # compiling every module at each start would double the start times
            "BENCH_STAMPS": str(directory / "stamps"),
            **(contestant.environment if contestant is not None else {}),
        }
        environment = {name: value for name, value in told.items() if value is not None}
        yield Place(directory, stamps, environment, log)


@contextlib.contextmanager
def worker(contestant: Contestant, at: Place) -> Iterator[subprocess.Popen[bytes]]:
    """Its worker, running; ended at the end, by force if it must be."""
    process = subprocess.Popen(
        contestant.command,
        env=at.environment,
        cwd=at.directory,
        stdin=subprocess.DEVNULL,
        stdout=at.log,
        stderr=at.log,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own: nobody else is in this group
            process.wait()


def drain(server: Server, contestant: Contestant, count: int, *, results: bool) -> dict[str, float]:
    """Tasks a second from the first to begin to the last, of ``count`` that were there; and the start's length."""
    with place(server, contestant, results=results) as at:
        at.run("sender.py", contestant.module, "fill", "send_stored" if results else "send", str(count))
        began = time.monotonic()
        with worker(contestant, at) as process:
            times = at.wait_for(0, count, process)
    first, last = min(times), max(times)
    kind = "drain with results" if results else "drain"
    return {f"{kind}, per s": (count - 1) / (last - first), "start to first task, s": first - began}


def sleepers(server: Server, contestant: Contestant, count: int) -> dict[str, float]:
    """How many times the ideal it takes when each of ``count`` tasks sleeps for 50 ms, 100 at a time."""
    with place(server, contestant, results=False) as at:
        at.run("sender.py", contestant.module, "fill", "send_sleeping", str(count))
        with worker(contestant, at) as process:
            times = at.wait_for(0, count, process)
    ideal = count / 100 * 0.05
    return {f"{count} x 50 ms, times the ideal": (max(times) + 0.05 - min(times)) / ideal}


def latencies(
    server: Server, contestant: Contestant, *, trips: int, seconds: float, idle_seconds: float
) -> dict[str, float]:
    """Round trips one after another; 200 sends a second; then what the idle worker takes. All with one worker."""
    with place(server, contestant, results=True) as at, worker(contestant, at) as process:
        found = round_trips(at, contestant, trips)
        waits = paced(at, contestant, process, count=int(200 * seconds), rate=200)
        found["200/s: send to start p50, ms"] = statistics.median(waits)
        found["200/s: send to start p95, ms"] = percentile(waits, 95)
        if idle_seconds:
            # A peer whose worker process dies of having nothing to do, and is replaced, has no such figures.
            with contextlib.suppress(psutil.NoSuchProcess):
                found.update(idle(process, idle_seconds))
    return found


def waking(server: Server, contestant: Contestant, *, trips: int, wakes: int) -> dict[str, float]:
    """Round trips, of ekiden only: peers poll for results. Then sends so seldom that each finds the worker idle."""
    with place(server, contestant, results=True) as at, worker(contestant, at) as process:
        found = {}
        if contestant.family == "ekiden":
            found = round_trips(at, contestant, trips)
        else:
            paced(at, contestant, process, count=1, rate=1)  # it is up
        # The first one connects.
        waits = paced(at, contestant, process, count=1 + wakes, rate=1 / WAKE_EVERY_SECONDS)[1:]
        found["wake-up p50, ms"] = statistics.median(waits)
        found["wake-up p99, ms"] = percentile(waits, 99)
    return found


def idling(server: Server, contestant: Contestant, seconds: float) -> dict[str, float]:
    """What a worker with nothing to do takes, and how many requests its processes make together."""
    with (
        place(server, contestant, results=False) as at,
        CountingProxy(*_address(at.environment["BENCH_URL"]), REQUESTS[server.broker]) as proxy,
    ):
        for name in ("BENCH_URL", "BENCH_EKIDEN_URL"):
            at.environment[name] = _directly(proxy.through(at.environment[name]))
        with worker(contestant, at) as process:
            paced(at, contestant, process, count=1, rate=1)  # it is up
            time.sleep(SETTLING_SECONDS)
            before, began = proxy.requests, time.perf_counter()
            found = idle(process, seconds)
            found["idle worker, requests per s"] = (proxy.requests - before) / (time.perf_counter() - began)
    return found


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or STANDARD_PORTS[parts.scheme]


def _directly(url: str) -> str:
    """A client of MongoDB goes where the server says that it is, unless told not to."""
    return url + ("&" if "?" in url else "?") + "directConnection=true" if url.startswith("mongodb:") else url


def round_trips(at: Place, contestant: Contestant, trips: int) -> dict[str, float]:
    """Send and wait for the result, one after another."""
    taken = at.run("sender.py", contestant.module, "trips", str(trips))
    return {"round trip p50, ms": statistics.median(taken), "round trip p99, ms": percentile(taken, 99)}


def paced(
    at: Place, contestant: Contestant, process: subprocess.Popen[bytes], *, count: int, rate: float
) -> list[float]:
    """Milliseconds from the moment before each of ``count`` sends to the beginning of its body, ``rate`` a second."""
    sent = at.run("sender.py", contestant.module, "pace", str(FIRST_OF_PACE), str(count), str(rate))
    began = at.wait_for(FIRST_OF_PACE, count, process)
    at.stamps.clear(FIRST_OF_PACE, count)
    return [(start - send) * 1e3 for start, send in zip(began, sent, strict=True)]


def idle(process: subprocess.Popen[bytes], seconds: float) -> dict[str, float]:
    """Memory and time on the processor of a worker that has nothing to do.

    ``worker process`` is the one that runs tasks, where there is a supervisor above it; ``tree`` is all of them.
    """
    top = psutil.Process(process.pid)
    tree = [top, *top.children(recursive=True)]
    workers = [each for each in tree if "ekiden.worker_process" in " ".join(each.cmdline())]
    before, began = _busy(tree), time.perf_counter()
    time.sleep(seconds)
    busy = 100 * (_busy(tree) - before) / (time.perf_counter() - began)
    found = {
        "idle tree, % of a core": busy,
        "idle tree, PSS MiB": sum(each.memory_full_info().pss for each in tree) / 2**20,
        "idle tree, RSS MiB": sum(each.memory_info().rss for each in tree) / 2**20,
    }
    if workers:
        found["idle worker process, RSS MiB"] = workers[0].memory_info().rss / 2**20
        found["idle worker process, PSS MiB"] = workers[0].memory_full_info().pss / 2**20
    return found


def _busy(processes: list[psutil.Process]) -> float:
    return sum(sum(each.cpu_times()[:2]) for each in processes)


def sending(server: Server, *, rounds: int, count: int) -> dict[str, float]:
    """Publishing with ekiden beside the raw client, in turns in one process: rates per second."""
    with place(server, None, results=False) as at:
        rates = at.run("sending.py", str(rounds), str(count))
    return {f"{name}, per s": statistics.median(found) for name, found in rates.items()}


def claims(server: Server, *, rounds: int, count: int) -> dict[str, float]:
    """Claiming and settling in batches by ekiden's transport beside the raw client, in turns in one process."""
    with place(server, None, results=False) as at:
        rates = at.run("claiming.py", str(rounds), str(count))
    return {f"{name}, per s": statistics.median(found) for name, found in rates.items()}


def raw_drain(server: Server, count: int) -> dict[str, float]:
    """What the raw client reaches: claim and settle, or consume and acknowledge, in batches."""
    with place(server, None, results=False) as at:
        return {"drain, per s": at.run("raw_drain.py", str(count))}


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]
