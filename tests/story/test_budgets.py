"""How far it is from `delay()` to the broker, and from the broker to a function: budgets, so that it stays readable.

Counted are calls of ekiden's own functions (comprehensions are none), with the broker and the results in memory. The
memory broker's package counts as one module.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import CodeType, FrameType
from uuid import uuid4

import pytest
from ekiden import Ekiden, Task
from ekiden.explain import Noted, Tracer
from ekiden.memory import MemoryConsumer, MemoryTransport
from ekiden.plan import WorkerOptions
from ekiden.runner import Runner
from ekiden.worker import Worker


@pytest.fixture
def app() -> Ekiden:
    return Ekiden("budgets", broker=f"memory://{uuid4().hex}")


@pytest.fixture
def add(app: Ekiden) -> Task[[int, int], int]:
    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    return add


def functions(noted: Iterable[Noted]) -> list[Noted]:
    return [each for each in noted if not each.code.co_name.startswith("<")]


def modules(noted: Iterable[Noted]) -> set[str]:
    return {"ekiden.memory" if each.module.startswith("ekiden.memory.") else each.module for each in noted}


def listing(noted: Iterable[Noted]) -> str:
    """What a failing test shows."""
    return "".join(f"{'  ' * each.depth}{each.module}.{each.code.co_qualname}\n" for each in noted)


def test_delay_is_five_functions_deep_and_thirty_long(app: Ekiden, add: Task[[int, int], int]) -> None:
    with app:
        add.delay(0, 0)
        tracer = Tracer()
        with tracer.traced():
            add.delay(1, 2)

    calls = functions(tracer.calls)
    (publish,) = [each for each in calls if each.code is MemoryTransport.publish.__code__]
    assert publish.depth + 1 <= 5, listing(calls)
    assert len(calls) <= 30, listing(calls)
    assert len(modules(calls)) <= 8, modules(calls)


def test_a_message_takes_sixty_calls_in_twelve_modules_of_the_worker(app: Ekiden, add: Task[[int, int], int]) -> None:
    with app:
        idle = {noted.code for noted in work(app)}
        add.delay(1, 2)
        calls = functions(one_turn(work(app), idle))

    assert len(calls) <= 60, listing(calls)
    assert len(modules(calls)) <= 12, modules(calls)


def test_a_body_is_at_most_six_functions_deep(app: Ekiden) -> None:
    frames: list[FrameType] = []

    @app.task
    def look() -> None:
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
            frames.append(frame)

    with app:
        look.delay()
        work(app)

    ours = [frame.f_code.co_qualname for frame in frames if frame.f_globals["__name__"].startswith("ekiden.")]
    assert 1 <= len(ours) + 1 <= 6, ours


def work(app: Ekiden) -> list[Noted]:
    """What a worker calls that starts, works off what is there, and ends."""
    with Tracer() as tracer, tracer.traced():
        Worker(app, WorkerOptions(burst=True, threads=2)).run()
    return tracer.calls


def one_turn(calls: list[Noted], idle: set[CodeType]) -> list[Noted]:
    """What one message took: the receiver's turn from receiving to handing out, and all that an idle one does not."""
    receives = [index for index, each in enumerate(calls) if each.code is MemoryConsumer.receive.__code__]
    (submits,) = [index for index, each in enumerate(calls) if each.code is Runner.submit.__code__]
    receiver = calls[receives[0]].thread
    return [
        each
        for index, each in enumerate(calls)
        if each.code not in idle or (each.thread == receiver and receives[0] <= index < submits)
    ]
