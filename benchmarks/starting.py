"""How long a worker takes from its command to its first task, and what it holds in memory when it has nothing to do.

    python benchmarks/starting.py [--brokers sqlite redis rabbitmq] [--rounds N] [--other PYTHON]

The message waits when the command starts. On a machine that does other things, too, the time on the processor says
more than the time that passed. ``--other`` is the interpreter of an environment with another version of
ekiden: both take turns, and each figure is told as a ratio to the other's. Beside them a bare interpreter's start, and
what it takes to import ekiden. Memory is that of the supervisor and its one worker process together (in RSS
what they share counts twice, in PSS once).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil
from servers import Server, end_in_good_order, server_for

HERE = Path(__file__).parent
PATIENCE_SECONDS = 60
SETTLING_SECONDS = 1.5
BROKERS = ("sqlite", "redis", "rabbitmq")


def main() -> None:
    options = _options()
    end_in_good_order()
    pythons = {"this": sys.executable} | ({"other": options.other} if options.other else {})
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with contextlib.ExitStack() as closing:
        servers = {broker: _server(broker, closing) for broker in options.brokers}
        for _ in range(options.rounds):
            for who, python in pythons.items():
                found["python", "interpreter alone, ms"][who].append(1e3 * _seconds(python, "pass"))
                found["python", "import ekiden.app, ms"][who].append(1e3 * _seconds(python, "import ekiden.app"))
            for broker, server in servers.items():
                for who, python in pythons.items():
                    for name, value in measured(python, server).items():
                        found[broker, name][who].append(value)
    for (broker, name), values in found.items():
        shown = ", ".join(
            f"{who} {statistics.median(each):.1f} (least {min(each):.1f})" for who, each in values.items()
        )
        if "other" in values:
            shown += f"; ratio {statistics.median(values['this']) / statistics.median(values['other']):.2f}"
        print(f"{broker}: {name}: {shown}")


def measured(python: str, server: Server | None) -> dict[str, float]:
    """Send one call, start a worker, note when its body began and what the idle worker holds; end it."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        told = {"BENCH_EKIDEN_URL": f"sqlite:///{directory}/tasks.db"}
        environment = _environment(directory, told if server is None else server.environment(results=False))
        send = [python, "-c", "from starting_tasks import note; note.delay()"]
        subprocess.run(send, env=environment, cwd=directory, check=True)
        began = time.monotonic()
        with _worker(python, environment, directory) as process:
            first = _first(directory / "began", process)
            busy = [_on_processor(each) for each in _tree(process)]
            time.sleep(SETTLING_SECONDS)
            held = [each.memory_full_info() for each in _tree(process)]
    return {
        "start to first task, ms": 1e3 * (first - began),
        "start to first task, ms of processor": 1e3 * sum(busy),
        "of these the supervisor's": 1e3 * busy[0],
        "idle tree, PSS MiB": sum(each.pss for each in held) / 2**20,
        "idle tree, RSS MiB": sum(each.rss for each in held) / 2**20,
        "idle supervisor, RSS MiB": held[0].rss / 2**20,
    }


def _tree(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The supervisor and its processes, itself first."""
    top = psutil.Process(process.pid)
    return [top, *top.children(recursive=True)]


def _on_processor(process: psutil.Process) -> float:
    """Seconds that all threads of a process have spent on a processor: the kernel counts them in nanoseconds."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _server(broker: str, closing: contextlib.ExitStack) -> Server | None:
    """Where calls go; None for a file of each measurement's own."""
    if broker == "sqlite":
        return None
    server = server_for(broker, None, queue_type="quorum")
    closing.callback(server.close)
    return server


@contextlib.contextmanager
def _worker(python: str, environment: dict[str, str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [python, "-m", "ekiden", "worker", "starting_tasks:app", "--processes", "1"]
    process = subprocess.Popen(
        command, env=environment, cwd=directory, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_SECONDS)


def _first(stamp: Path, process: subprocess.Popen[bytes]) -> float:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not stamp.exists():
        if time.monotonic() > give_up or process.poll() is not None:
            raise SystemExit("the worker did not run its task")
        time.sleep(0.005)
    return float(stamp.read_text())


def _seconds(python: str, program: str) -> float:
    began = time.perf_counter()
    subprocess.run([python, "-c", program], check=True, env=_environment(Path.cwd(), {}))
    return time.perf_counter() - began


def _environment(directory: Path, told: dict[str, str]) -> dict[str, str]:
    left_out = {"PYTHONDONTWRITEBYTECODE"}  # compiling every module at each start would double the time
    told = {**told, "PYTHONPATH": str(HERE / "programs"), "BENCH_DIRECTORY": str(directory)}
    return {name: value for name, value in os.environ.items() if name not in left_out} | told


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--brokers", nargs="+", choices=BROKERS, default=BROKERS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--other", help="the interpreter of another version")
    return parser.parse_args()


if __name__ == "__main__":
    main()
