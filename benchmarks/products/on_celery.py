"""The same with Celery: acknowledged late, so that a task whose worker dies is not lost (on MongoDB it is)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import stamps
from celery import Celery

name = os.environ["BENCH_NAME"]
app = Celery("bench", broker=os.environ["BENCH_URL"], backend=os.environ.get("BENCH_CELERY_RESULTS_URL"))
app.conf.update(
    task_acks_late=True,
    task_default_queue=name,
    worker_prefetch_multiplier=int(os.environ.get("BENCH_PREFETCH", "4")),
    broker_connection_retry_on_startup=True,
)
if os.environ["BENCH_BROKER"] == "redis":
    app.conf.broker_transport_options = {"global_keyprefix": f"{name}."}
elif os.environ["BENCH_BROKER"] == "mongodb":
    parts = ("messages", "routing", "broadcast", "queues")
    app.conf.broker_transport_options = {f"{part}_collection": f"{name}.{part}" for part in parts}
    if "BENCH_POLLING" in os.environ:
        app.conf.broker_transport_options["polling_interval"] = float(os.environ["BENCH_POLLING"])
    app.conf.mongodb_backend_settings = {"taskmeta_collection": f"{name}.results"}
else:
    app.conf.broker_transport_options = {"confirm_publish": True}
    if os.environ["BENCH_QUEUE_TYPE"] == "quorum":
        app.conf.task_default_queue_type = "quorum"
        app.conf.worker_detect_quorum_queues = True
if "BENCH_RESULTS_PREFIX" in os.environ:
    app.conf.result_backend_transport_options = {"global_keyprefix": os.environ["BENCH_RESULTS_PREFIX"] + "."}
started = stamps.opened()


@app.task(ignore_result=True)
def noop(index: int) -> None:
    started.mark(index)


@app.task
def stored(index: int) -> int:
    started.mark(index)
    return index


@app.task(ignore_result=True)
def sleeping(index: int) -> None:
    started.mark(index)
    time.sleep(0.05)


@app.task
def add(x: int, y: int) -> int:
    return x + y


def send(index: int) -> None:
    noop.delay(index)


def send_stored(index: int) -> None:
    stored.delay(index)


def send_sleeping(index: int) -> None:
    sleeping.delay(index)


def round_trip() -> None:
    assert add.delay(1, 2).get(10) == 3


def fill(one: Callable[[int], None], count: int) -> None:
    for index in range(count):
        one(index)
