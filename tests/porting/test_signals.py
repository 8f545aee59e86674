"""Signals, connected the way Celery's users connect them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ekiden import signals
from ekiden.testing.conformance.fixtures import eventually

from tests.porting.conftest import Start
from tests.porting.programs import calling, limits, tasks


class Heard:
    """Connects receivers, and disconnects them at the end."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object, dict[str, Any]]] = []
        self._connected: list[tuple[signals.Signal, Any, object]] = []

    def to(self, signal: signals.Signal, sender: object = None) -> None:
        @signal.connect(sender=sender)
        def receiver(sender: object = None, **fields: Any) -> None:
            self.calls.append((signal.name, sender, fields))

        self._connected.append((signal, receiver, sender))

    def of(self, name: str) -> list[dict[str, Any]]:
        return [fields for called, _, fields in self.calls if called == name]

    def disconnect(self) -> None:
        for signal, receiver, sender in self._connected:
            assert signal.disconnect(receiver, sender)


@pytest.fixture
def heard() -> Iterator[Heard]:
    heard = Heard()
    yield heard
    heard.disconnect()


def test_publishing_is_heard_by_task_name(work: Start, heard: Heard) -> None:
    work(calling.app)
    heard.to(signals.before_task_publish, sender=calling.add.name)
    heard.to(signals.after_task_publish, sender=calling.add.name)

    result = calling.add.delay(1, 2)
    calling.where.delay().get(timeout=10)

    assert [name for name, *_ in heard.calls] == ["before_task_publish", "after_task_publish"]
    assert heard.calls[0][2]["task_id"] == result.id
    assert heard.calls[0][2]["routing_key"] == "default"


def test_a_body_is_heard_from_start_to_end(work: Start, heard: Heard) -> None:
    work(calling.app)
    for each in (signals.task_prerun, signals.task_success, signals.task_postrun):
        heard.to(each, sender=calling.add)

    result = calling.add.delay(1, 2)
    result.get(timeout=10)

    assert [name for name, *_ in heard.calls] == ["task_prerun", "task_success", "task_postrun"]
    (prerun,), (success,), (postrun,) = heard.of("task_prerun"), heard.of("task_success"), heard.of("task_postrun")
    assert (prerun["task_id"], prerun["task"], list(prerun["args"])) == (result.id, calling.add, [1, 2])
    assert success["result"] == 3
    assert (postrun["retval"], postrun["state"]) == (3, "SUCCESS")


def test_a_failure_and_a_retry_are_heard(work: Start, heard: Heard) -> None:
    work(tasks.app)
    heard.to(signals.task_failure)
    heard.to(signals.task_retry)

    result = tasks.retry_by_hand.delay(9)
    result.get(timeout=10, propagate=False)

    assert [str(each["reason"]) for each in heard.of("task_retry")] == ["try 0", "try 1"]
    (failure,) = heard.of("task_failure")
    assert (failure["task_id"], str(failure["exception"])) == (result.id, "try 2")
    assert "Unreachable" in failure["einfo"]


def test_revoking_and_expiring_are_heard(work: Start, use: Callable[..., object], heard: Heard) -> None:
    use(limits.app)
    heard.to(signals.task_revoked)
    revoked = limits.quick.delay()
    revoked.revoke()
    expired = limits.quick.apply_async(expires=0.000001)

    work(limits.app)

    eventually(lambda: revoked.ready() and expired.ready(), what="both have ended")
    told = {each["request"].id: (each["terminated"], each["expired"]) for each in heard.of("task_revoked")}
    assert told == {revoked.id: (False, False), expired.id: (False, True)}


@pytest.mark.slow
def test_a_worker_says_that_it_is_ready_and_stops(use: Callable[..., Any], heard: Heard) -> None:
    app = use(calling.app)
    heard.to(signals.worker_ready)
    heard.to(signals.worker_shutting_down)

    with app.worker(name="worker-1"):
        pass

    assert [(name, sender) for name, sender, _ in heard.calls] == [
        ("worker_ready", "worker-1"),
        ("worker_shutting_down", "worker-1"),
    ]
