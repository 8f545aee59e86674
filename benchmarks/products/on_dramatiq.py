"""The same with dramatiq."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import dramatiq
import stamps
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

name = os.environ["BENCH_NAME"]
queue_type = os.environ.get("BENCH_QUEUE_TYPE", "")


class TypedRabbitmqBroker(RabbitmqBroker):
    """dramatiq has no option for the type of its queues; it declares them with these arguments."""

    def _build_queue_arguments(self, queue_name: str) -> dict[str, Any]:
        return {**super()._build_queue_arguments(queue_name), "x-queue-type": queue_type}


if os.environ["BENCH_BROKER"] == "redis":
    broker: Any = RedisBroker(url=os.environ["BENCH_URL"], namespace=name)
else:
    broker = TypedRabbitmqBroker(url=os.environ["BENCH_URL"], confirm_delivery=True)
results = os.environ.get("BENCH_RESULTS_URL")
stores: dict[str, Any] = {}
if results:
    stores["store_results"] = True
    broker.add_middleware(
        Results(
            backend=RedisBackend(
                url=results, namespace=os.environ["BENCH_RESULTS_PREFIX"], use_namespace_prefix_keys=True
            )
        )
    )
dramatiq.set_broker(broker)
started = stamps.opened()


@dramatiq.actor(queue_name=name)
def noop(index: int) -> None:
    started.mark(index)


@dramatiq.actor(queue_name=name, **stores)
def stored(index: int) -> int:
    started.mark(index)
    return index


@dramatiq.actor(queue_name=name)
def sleeping(index: int) -> None:
    started.mark(index)
    time.sleep(0.05)


@dramatiq.actor(queue_name=name, **stores)
def add(x: int, y: int) -> int:
    return x + y


def send(index: int) -> None:
    noop.send(index)


def send_stored(index: int) -> None:
    stored.send(index)


def send_sleeping(index: int) -> None:
    sleeping.send(index)


def round_trip() -> None:
    assert add.send(1, 2).get_result(block=True, timeout=10_000) == 3


def fill(one: Callable[[int], None], count: int) -> None:
    for index in range(count):
        one(index)
