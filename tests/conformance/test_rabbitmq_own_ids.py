"""A call under a user's own id, on RabbitMQ with a store: what ekiden sends again itself is not taken for a copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from ekiden import Ekiden, Reject, Task
from ekiden.cli.dead import _redrive
from ekiden.message import new_id
from ekiden.testing.conformance.fixtures import eventually

PATIENCE = 20.0

runs: Counter[str] = Counter()


@pytest.fixture
def app(rabbitmq_place: str, redis_place: str) -> Iterator[Ekiden]:
    with Ekiden("own-ids", broker=rabbitmq_place, backend=redis_place) as app:
        yield app


@pytest.mark.parametrize("how", ["retry", "raise", "requeue", "requeue, early"])
def test_what_is_sent_again_under_an_own_id_runs(app: Ekiden, how: str) -> None:
    acks = "early" if how == "requeue, early" else "late"

    @app.task(bind=True, max_retries=3, default_retry_delay=0, retry_backoff=False, autoretry_for=(OSError,), acks=acks)
    def again(self: Task[..., Any], key: str) -> int:
        runs[key] += 1
        if runs[key] < 3:
            match how:
                case "retry":
                    raise self.retry(countdown=0)
                case "requeue" | "requeue, early":
                    raise Reject("again", requeue=True)
                case _:
                    raise OSError("no route")
        return runs[key]

    own_id = f"order-{new_id()}"
    with app.worker(threads=2):
        assert again.apply_async((own_id,), task_id=own_id).get(timeout=PATIENCE) == 3


def test_a_dead_letter_under_an_own_id_runs_again_when_it_is_sent_back(app: Ekiden) -> None:
    @app.task(max_retries=0)
    def fails_once(key: str) -> int:
        runs[key] += 1
        if runs[key] == 1:
            raise ValueError("not yet")
        return runs[key]

    own_id = f"order-{new_id()}"
    with app.worker(threads=2):
        result = fails_once.apply_async((own_id,), task_id=own_id)
        with pytest.raises(ValueError, match="not yet"):
            result.get(timeout=PATIENCE)
        with app.transport.consumer(["default.dead"], lease=60, prefetch=10, name=new_id()) as consumer:
            letters = consumer.receive(10, PATIENCE)
            assert _redrive(app, "default", consumer, letters) == (1, [])

        eventually(lambda: runs[own_id] == 2, what="it ran again")
        assert app.AsyncResult(own_id).get(timeout=PATIENCE) == 2
