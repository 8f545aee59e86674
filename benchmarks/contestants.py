"""Who takes part: ekiden, and its peers, each with the worker that does best among its pools."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Contestant:
    """One way to run one product's worker.

    ``family`` is compared as a whole, by its best; ``module`` is one of ``products/``; ``command`` starts the worker;
    ``environment`` is added to what the measurement says (None takes a name out).
    """

    family: str
    way: str
    module: str
    command: tuple[str, ...]
    environment: dict[str, str | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Family and way."""
        return f"{self.family} {self.way}".strip()


def ekiden(way: str = "", *more: str, module: str = "on_ekiden", **environment: str | None) -> Contestant:
    """One worker process, started by the command line's supervisor; all else as a new user has it."""
    command = (sys.executable, "-m", "ekiden", "worker", f"{module}:app", "--processes", "1", "--log-level", "warning")
    return Contestant("ekiden", way, module, (*command, *more), environment)


def celery(pool: str, concurrency: int, **environment: str | None) -> Contestant:
    """Without gossip, mingle and heartbeats, which cost it time."""
    command = (
        *(sys.executable, "-m", "celery", "-A", "on_celery", "worker", "-l", "ERROR"),
        *("-P", pool, "-c", str(concurrency), "--without-gossip", "--without-mingle", "--without-heartbeat"),
    )
    prefetch, polling = environment.get("BENCH_PREFETCH"), environment.get("BENCH_POLLING")
    way = f"{pool}-{concurrency}" + (f" prefetch x{prefetch}" if prefetch else "")
    way += f" polls every {polling} s" if polling else ""
    return Contestant("celery", way, "on_celery", command, environment)


def dramatiq(threads: int = 8) -> Contestant:
    """One process."""
    command = (
        *(sys.executable, "-m", "dramatiq", "on_dramatiq", "--processes", "1", "--threads", str(threads)),
        "--skip-logging",
    )
    return Contestant("dramatiq", f"threads-{threads}", "on_dramatiq", command)


def taskiq(way: str, *more: str, **environment: str | None) -> Contestant:
    """One process; its tasks are ``async def``."""
    command = (
        *(sys.executable, "-m", "taskiq", "worker", "on_taskiq:broker", "--workers", "1"),
        *("--log-level", "ERROR", *more),
    )
    return Contestant("taskiq", way, "on_taskiq", command, environment)


def huey(threads: int) -> Contestant:
    """Its threads; it has no processes that would lose less."""
    consumer = str(Path(sys.executable).with_name("huey_consumer"))
    command = (sys.executable, consumer, "on_huey.huey", "-w", str(threads), "-k", "thread", "-q")
    return Contestant("huey", f"threads-{threads}", "on_huey", command)


ON_REDIS = (
    ekiden(),
    celery("solo", 1),
    celery("threads", 8),
    celery("prefork", 2),
    dramatiq(),
    taskiq("list"),
    taskiq("stream", BENCH_STREAM="1"),
    huey(1),
    huey(8),
)
SLEEPERS_ON_REDIS = (
    ekiden("threads", "--threads", "100"),
    ekiden("async", module="on_ekiden_async"),
    celery("threads", 100),
    dramatiq(100),
    taskiq("list"),
    huey(100),
)
ON_RABBITMQ = (
    ekiden(),
    celery("solo", 1),
    celery("solo", 1, BENCH_PREFETCH="64"),
    celery("threads", 8),
    celery("prefork", 2),
    dramatiq(),
    taskiq("aio-pika"),
    taskiq("aio-pika prefetch 100", BENCH_PREFETCH="100"),
)
SLEEPERS_ON_RABBITMQ = (
    ekiden("threads", "--threads", "100"),
    ekiden("async", module="on_ekiden_async"),
    celery("threads", 100),
    dramatiq(100),
    taskiq("aio-pika prefetch 100", BENCH_PREFETCH="100"),
)
ON_MONGODB = (
    ekiden(),
    celery("solo", 1),
    celery("threads", 8, BENCH_POLLING="0.01"),
    celery("prefork", 2),
)
IDLERS_ON_MONGODB = (
    ekiden(),
    celery("solo", 1),
)
