"""The same with taskiq, in ``async def`` tasks, which it runs quickest: Redis list, Redis stream, or aio-pika."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import stamps
from taskiq_aio_pika import AioPikaBroker
from taskiq_aio_pika.exchange import Exchange
from taskiq_aio_pika.queue import Queue, QueueType
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend, RedisStreamBroker

name = os.environ["BENCH_NAME"]
url = os.environ["BENCH_URL"]
if os.environ["BENCH_BROKER"] == "rabbitmq":
    kind = QueueType(os.environ["BENCH_QUEUE_TYPE"])
    broker: Any = AioPikaBroker(
        url,
        qos=int(os.environ.get("BENCH_PREFETCH", "10")),
        exchange=Exchange(name=name),
        task_queues=[Queue(name=name, type=kind)],
        dead_letter_queue=Queue(name=f"{name}.dead_letter", type=kind),
    )
elif os.environ.get("BENCH_STREAM"):
    broker = RedisStreamBroker(url, queue_name=name, consumer_group_name=name)
else:
    broker = ListQueueBroker(url, queue_name=name)
results = os.environ.get("BENCH_RESULTS_URL")
if results:
    broker = broker.with_result_backend(RedisAsyncResultBackend(results, prefix_str=os.environ["BENCH_RESULTS_PREFIX"]))
started = stamps.opened()


@broker.task(task_name="noop")
async def noop(index: int) -> None:
    started.mark(index)


@broker.task(task_name="stored")
async def stored(index: int) -> int:
    started.mark(index)
    return index


@broker.task(task_name="sleeping")
async def sleeping(index: int) -> None:
    started.mark(index)
    await asyncio.sleep(0.05)


@broker.task(task_name="add")
async def add(x: int, y: int) -> int:
    return x + y


class Sender:
    """An event loop in which a program that is not asynchronous may send; it starts the broker at the first call."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, awaitable: Any) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._loop.run_until_complete(broker.startup())
        return self._loop.run_until_complete(awaitable)


sender = Sender()


def send(index: int) -> None:
    sender.run(noop.kiq(index))


def send_stored(index: int) -> None:
    sender.run(stored.kiq(index))


def send_sleeping(index: int) -> None:
    sender.run(sleeping.kiq(index))


async def _add_and_wait() -> Any:
    # It polls: every 0.2 s unless told otherwise.
    return await (await add.kiq(1, 2)).wait_result(check_interval=0.001, timeout=10)


def round_trip() -> None:
    assert sender.run(_add_and_wait()).return_value == 3


def fill(one: Callable[[int], None], count: int) -> None:
    for index in range(count):
        one(index)
