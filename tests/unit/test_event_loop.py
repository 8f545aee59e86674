"""Bodies in an event loop: how many at once, how they are interrupted, how they are ended."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from ekiden.event_loop import EventLoop, Interruptible

from tests.working import PATIENCE, Notes, eventually


class Job:
    """What the loop runs, made of a coroutine function."""

    def __init__(self, body: Callable[[], Awaitable[Any]]) -> None:
        self._body = body

    async def run(self) -> None:
        await self._body()


@pytest.fixture
def errors() -> list[BaseException]:
    return []


@pytest.fixture
def loop(errors: list[BaseException]) -> Iterator[EventLoop]:
    loop = EventLoop(3, failed=errors.append)
    yield loop
    loop.close(PATIENCE)
    assert not [thread for thread in threading.enumerate() if thread.name == "ekiden-loop"]


def test_no_more_run_at_once_than_allowed(loop: EventLoop) -> None:
    running, most, ended = 0, 0, Notes()

    async def body() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        ended.take(1)

    loop.submit([Job(body) for _ in range(20)])

    ended.wait_for(20)
    assert most == 3


def test_what_waits_can_be_taken_back(loop: EventLoop) -> None:
    released = asyncio.Event()
    ended = Notes()

    async def body() -> None:
        await released.wait()
        ended.take(1)

    jobs = [Job(body) for _ in range(5)]
    loop.submit(list(jobs))
    eventually(lambda: loop.in_hand() == 5 and len(loop._running) == 3, what="three run")

    assert [loop.take_back(), loop.take_back(), loop.take_back()] == [jobs[4], jobs[3], None]
    loop.loop.call_soon_threadsafe(released.set)
    ended.wait_for(3)


def test_a_bug_in_a_job_is_told(loop: EventLoop, errors: list[BaseException]) -> None:
    async def body() -> None:
        raise ZeroDivisionError

    loop.submit([Job(body)])

    eventually(lambda: [type(error) for error in errors] == [ZeroDivisionError], what="it is told")


def test_closing_cancels_what_runs_and_the_threads_it_used(errors: list[BaseException]) -> None:
    loop = EventLoop(3, failed=errors.append)
    cancelled = Notes()

    async def body() -> None:
        await asyncio.to_thread(time.sleep, 0.01)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.take(1)
            raise

    loop.submit([Job(body), Job(body)])
    eventually(lambda: len(loop._running) == 2, what="both run")
    time.sleep(0.1)

    loop.close(PATIENCE)

    assert cancelled.taken == [1, 1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ekiden-loop")]
    eventually(
        lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("asyncio_")], what="they end"
    )


# Interrupting one coroutine.


def run(body: Callable[[], Any], act: Callable[[Interruptible], None]) -> Any:
    """Run a body, and have ``act`` interrupt it as soon as it awaits."""

    async def main() -> Any:
        interruptible = Interruptible()
        asyncio.get_running_loop().call_later(0.01, act, interruptible)
        try:
            return await asyncio.wait_for(asyncio.ensure_future(_alone(interruptible, body)), PATIENCE)
        finally:
            interruptible.close()

    return asyncio.run(main())


async def _alone(interruptible: Interruptible, body: Callable[[], Any]) -> Any:
    return await interruptible.run(body())


def test_a_body_that_nobody_interrupts_returns_and_raises_as_it_will() -> None:
    async def returns() -> int:
        await asyncio.sleep(0)
        return 7

    async def raises() -> None:
        await asyncio.sleep(0)
        raise KeyError("x")

    assert run(returns, lambda _body: None) == 7
    with pytest.raises(KeyError):
        run(raises, lambda _body: None)


def test_an_interruption_is_raised_where_the_body_awaits_and_may_be_handled() -> None:
    async def body() -> str:
        try:
            await asyncio.sleep(60)
        except LookupError as error:
            await asyncio.sleep(0)
            return f"handled {error}"
        return "never"

    assert run(body, lambda interruptible: interruptible.interrupt(LookupError("it"))) == "handled it"


@pytest.mark.parametrize("how", ["gather", "timeout", "wait_for", "event", "queue", "thread"])
def test_an_interruption_reaches_a_body_whatever_it_awaits(how: str) -> None:
    async def body() -> None:
        match how:
            case "gather":
                await asyncio.gather(asyncio.sleep(60), asyncio.sleep(60))
            case "timeout":
                async with asyncio.timeout(60):
                    await asyncio.sleep(60)
            case "wait_for":
                await asyncio.wait_for(asyncio.sleep(60), 60)
            case "event":
                await asyncio.Event().wait()
            case "queue":
                await asyncio.Queue[int]().get()
            case "thread":
                await asyncio.to_thread(time.sleep, 0.1)

    with pytest.raises(LookupError):
        run(body, lambda interruptible: interruptible.interrupt(LookupError()))


def test_an_ended_body_cannot_refuse() -> None:
    caught = Notes()

    async def body() -> str:
        for _ in range(2):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                caught.take("cancelled")
        return "I go on"

    with pytest.raises(LookupError, match="the end"):
        run(body, lambda interruptible: interruptible.end(LookupError("the end")))
    assert caught.taken == ["cancelled"] * 2


def test_ending_ends_the_tasks_that_the_body_started() -> None:
    ended = Notes()

    async def child() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.take("child")

    async def body() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
            group.create_task(child())

    with pytest.raises(LookupError):
        run(body, lambda interruptible: interruptible.end(LookupError()))
    assert ended.taken == ["child", "child"]


def test_a_body_that_is_ended_before_it_starts_never_starts() -> None:
    async def main() -> None:
        interruptible = Interruptible()
        interruptible.end(LookupError())
        started = Notes()

        async def body() -> None:
            started.take(1)

        with pytest.raises(LookupError):
            await interruptible.run(body())
        assert started.taken == []

    asyncio.run(main())


def test_interrupting_what_has_ended_does_nothing() -> None:
    async def main() -> str:
        interruptible = Interruptible()

        async def body() -> None:
            await asyncio.sleep(0)

        await interruptible.run(body())
        interruptible.interrupt(LookupError())
        interruptible.end(LookupError())
        await asyncio.sleep(0.01)
        return "well"

    assert asyncio.run(main()) == "well"


def test_a_limit_that_was_not_reached_leaves_nothing_behind() -> None:
    async def main() -> str:
        interruptible = Interruptible()
        interruptible.after(0.02, interruptible.end, LookupError())

        async def body() -> str:
            return "done"

        value: str = await interruptible.run(body())
        interruptible.close()
        await asyncio.sleep(0.05)
        return value

    assert asyncio.run(main()) == "done"
