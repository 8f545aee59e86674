"""A task's context variables, its decimal context and its standard input are its own."""

import contextvars
import decimal
from collections.abc import Iterator

import pytest
from ekiden import Ekiden
from ekiden.message import new_id

from tests.working import PATIENCE

seen: contextvars.ContextVar[str] = contextvars.ContextVar("seen", default="nothing")


@pytest.fixture
def app() -> Iterator[Ekiden]:
    with Ekiden("contexts", broker=f"memory://{new_id()}") as app:
        yield app


@pytest.mark.parametrize("is_async", [False, True])
def test_what_a_task_sets_the_next_one_does_not_see(app: Ekiden, is_async: bool) -> None:
    def use() -> list[str]:
        found = [seen.get(), str(decimal.getcontext().prec)]
        seen.set("something")
        decimal.getcontext().prec = 5
        return found

    @app.task(name="plain")
    def plain() -> list[str]:
        return use()

    @app.task(name="of.loop")
    async def of_loop() -> list[str]:
        return use()

    task = of_loop if is_async else plain
    with app.worker(threads=1):
        found = [task.delay().get(PATIENCE) for _ in range(3)]

    assert found == [["nothing", "28"]] * 3
