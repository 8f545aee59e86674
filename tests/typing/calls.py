"""What type checkers accept and refuse. Each line that must be refused carries an ignore comment.

An ignore comment that suppresses nothing is an error to mypy and pyright alike (see pyproject.toml), so a checker that
accepts what it should refuse fails this file, and so does one that refuses what it should accept.
"""

from collections.abc import Coroutine
from typing import Any, assert_type

from ekiden import AsyncResult, Ekiden, Signature, Task, TaskSet, shared_task
from ekiden.results import EagerResult
from ekiden.task import AsyncTask

app = Ekiden("typing", broker="memory://")


@app.task
def add(x: int, y: int = 0) -> int:
    return x + y


@app.task(queue="slow", max_retries=5)
def greet(name: str, *, loud: bool = False) -> str:
    return name.upper() if loud else name


@app.task
async def fetch(url: str) -> bytes:
    return url.encode()


@app.task(bind=True, max_retries=None)
def again(self: Task[..., Any], count: int) -> float:
    return self.request.retries / count


@app.task(bind=True)
async def async_again(self: Task[..., Any], count: int) -> float:
    return self.request.retries / count


class Counting(Task[..., Any]):
    """A base class with an attribute of its own."""

    calls: int = 0


@app.task(base=Counting)
def counted(text: str) -> int:
    return len(text)


@shared_task
def shared(number: int) -> str:
    return str(number)


@shared_task(priority=9)
def shared_urgently(number: int) -> str:
    return str(number)


tasks = TaskSet("more")


@tasks.task
def carried(number: int) -> str:
    return str(number)


def what_is_declared() -> None:
    assert_type(add(1, 2), int)
    assert_type(greet("you", loud=True), str)
    coroutine: Coroutine[Any, Any, bytes] = fetch("http://localhost")
    coroutine.close()
    assert_type(counted, Counting)
    assert_type(counted.calls, int)
    task: Task[[int], float] = again
    async_task: AsyncTask[[int], float] = async_again
    print(task, async_task)


def what_may_be_sent() -> None:
    assert_type(add.delay(1, 2), AsyncResult[int])
    assert_type(add.delay(1), AsyncResult[int])
    assert_type(add.delay(x=1, y=2), AsyncResult[int])
    assert_type(greet.delay("you", loud=True), AsyncResult[str])
    assert_type(fetch.delay("http://localhost"), AsyncResult[bytes])
    assert_type(again.delay(3), AsyncResult[float])
    assert_type(async_again.delay(3), AsyncResult[float])
    assert_type(shared.delay(3), AsyncResult[str])
    assert_type(shared_urgently.delay(3), AsyncResult[str])
    assert_type(carried.delay(3), AsyncResult[str])
    assert_type(add.apply_async((1, 2), countdown=10), AsyncResult[int])
    assert_type(add.apply((1, 2)), EagerResult[int])
    assert_type(add.delay(1, 2).get(timeout=1), int)
    assert_type(add.s(1), Signature)
    assert_type(add.enqueue_many((number,) for number in range(3)), list[AsyncResult[int]])


async def what_may_be_awaited() -> None:
    assert_type(await add.adelay(1, 2), AsyncResult[int])
    assert_type(await (await add.adelay(1, 2)), int)
    assert_type(await add.delay(1), int)
    assert_type(await fetch("http://localhost"), bytes)


def what_is_refused() -> None:
    add.delay("1", 2)  # type: ignore[arg-type]
    add.delay(1, 2, 3)  # type: ignore[call-arg]
    add.delay()  # type: ignore[call-arg]
    add.delay(1, z=2)  # type: ignore[call-arg]
    greet.delay("you", True)  # type: ignore[call-arg]
    fetch.delay(1)  # type: ignore[arg-type]
    again.delay("3")  # type: ignore[arg-type]
    async_again.delay("3")  # type: ignore[arg-type]
    shared.delay("3")  # type: ignore[arg-type]
    shared_urgently.delay("3")  # type: ignore[arg-type]
    carried.delay(None)  # type: ignore[arg-type]
    add.apply_async((1, 2), countdown="soon")  # type: ignore[arg-type]
    text: str = add.delay(1, 2).get()  # type: ignore[assignment]
    print(text)


async def what_is_refused_when_awaited() -> None:
    await add.adelay("1")  # type: ignore[arg-type]
    number: int = await fetch.delay("http://localhost")  # type: ignore[assignment]
    print(number)
