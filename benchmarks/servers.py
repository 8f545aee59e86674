"""The servers that are measured on: where they are, what a measurement's queues are called there, and their end."""

from __future__ import annotations

import itertools
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import pika
import redis

REDIS = "redis://127.0.0.1:6379/9"
RABBITMQ = "amqp://guest:guest@127.0.0.1:5672"


class Server(Protocol):
    """One server, for one run of a benchmark."""

    broker: str

    def environment(self, *, results: bool) -> dict[str, str]:
        """What the programs of one measurement are told: a queue of their own, and whether results are stored."""
        ...

    def described(self) -> str:
        """The server in a few words."""
        ...

    def close(self) -> None:
        """Delete everything that this run has made."""
        ...


class RedisServer:
    """Every key of a run has its token in its name; they are deleted after it."""

    broker = "redis"

    def __init__(self, url: str | None) -> None:
        self._url = url or REDIS
        refuse_other_machines(self._url)
        self._redis = redis.Redis.from_url(self._url)
        self._token = f"bench-{secrets.token_hex(4)}"
        self._numbers = itertools.count(1)

    def environment(self, *, results: bool) -> dict[str, str]:
        name = f"{self._token}-{next(self._numbers)}"
        found = {
            "BENCH_BROKER": self.broker,
            "BENCH_NAME": name,
            "BENCH_URL": self._url,
            "BENCH_EKIDEN_URL": f"{self._url}?prefix={name}",
        }
        return {**found, **_results(self._url, name)} if results else found

    def described(self) -> str:
        about = self._redis.info("server")
        kept = "appendonly " + self._redis.config_get("appendonly")["appendonly"]
        return f"Redis {about['redis_version']} at {urlsplit(self._url).hostname}, {kept}"

    def close(self) -> None:
        clean_redis(self._redis, self._token)
        self._redis.close()


class RabbitMQServer:
    """A run has a virtual host of its own, which is deleted after it; `rabbitmqctl` makes it."""

    broker = "rabbitmq"

    def __init__(self, url: str | None, queue_type: str, results_url: str | None) -> None:
        self._base = (url or RABBITMQ).rstrip("/")
        refuse_other_machines(self._base)
        self._queue_type = queue_type
        self._token = f"bench-{secrets.token_hex(4)}"
        self._results_url = results_url or REDIS
        self._redis = redis.Redis.from_url(self._results_url)
        self._numbers = itertools.count(1)
        _control("add_vhost", self._token)
        _control("set_permissions", "-p", self._token, urlsplit(self._base).username or "guest", ".*", ".*", ".*")

    def environment(self, *, results: bool) -> dict[str, str]:
        name = f"q{next(self._numbers)}"
        found = {
            "BENCH_BROKER": self.broker,
            "BENCH_NAME": name,
            "BENCH_QUEUE_TYPE": self._queue_type,
            "BENCH_URL": f"{self._base}/{self._token}",
            "BENCH_EKIDEN_URL": f"{self._base}/{self._token}?queue_type={self._queue_type}&prefix={name}.",
        }
        if not results:
            return found
        prefix = f"{self._token}-{name}"
        return {
            **found,
            **_results(self._results_url, prefix),
            "BENCH_EKIDEN_RESULTS_URL": f"{self._results_url}?prefix={prefix}",
        }

    def described(self) -> str:
        connection = pika.BlockingConnection(pika.URLParameters(f"{self._base}/{self._token}"))
        version = connection._impl.server_properties["version"]
        connection.close()
        return (
            f"RabbitMQ {version} at {urlsplit(self._base).hostname}, {self._queue_type} queues, durable, persistent "
            "messages; results, where stored, in Redis unless said otherwise"
        )

    def close(self) -> None:
        _control("delete_vhost", self._token)
        clean_redis(self._redis, self._token)
        self._redis.close()


def server_for(broker: str, url: str | None, *, queue_type: str, results_url: str | None = None) -> Server:
    """The server of this broker at ``url``, or at its usual place; the other options are RabbitMQ's."""
    match broker:
        case "redis":
            return RedisServer(url)
        case "rabbitmq":
            return RabbitMQServer(url, queue_type, results_url)
    from document_servers import CouchDBServer, MongoDBServer

    return MongoDBServer(url) if broker == "mongodb" else CouchDBServer(url)


def _results(url: str, prefix: str) -> dict[str, str]:
    return {"BENCH_RESULTS_URL": url, "BENCH_RESULTS_PREFIX": prefix, "BENCH_CELERY_RESULTS_URL": url}


def clean_redis(server: redis.Redis, token: str) -> None:
    """Delete every key with ``token`` in its name."""
    keys = list(server.scan_iter(match=f"*{token}*", count=1000))
    for start in range(0, len(keys), 1000):
        server.unlink(*keys[start : start + 1000])


def refuse_other_machines(url: str) -> None:
    """This is load, not a look: it goes to this machine only."""
    if urlsplit(url).hostname not in {"127.0.0.1", "localhost", "::1"}:
        raise SystemExit("benchmarks put load on a server: give them one on this machine (127.0.0.1).")


def _control(*arguments: str) -> None:
    try:
        subprocess.run(["rabbitmqctl", "-q", *arguments], check=True, timeout=60)
    except FileNotFoundError as error:
        raise SystemExit("rabbitmqctl is needed to make a virtual host for the run; it comes with RabbitMQ.") from error


def end_in_good_order() -> None:
    """Have SIGTERM end the program as an interrupt does: with what it made deleted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def machine() -> str:
    """The machine in a few words: its processor and how many of it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else "unknown processor"
