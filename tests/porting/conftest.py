"""Runs a ported program: on a broker of the test's own, with a worker in this process."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ekiden import Ekiden, memory
from ekiden.message import new_id

Start = Callable[..., Ekiden]


@pytest.fixture(params=["memory", "sqlite"])
def broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/tasks.db"
        return
    name = new_id()
    yield f"memory://{name}"
    memory.discard(name)


@pytest.fixture
def use(broker_url: str) -> Iterator[Callable[[Ekiden], Ekiden]]:
    """Has a program's app use the test's broker, without a worker yet."""
    used: list[tuple[Ekiden, str | None, str | None]] = []

    def use(app: Ekiden) -> Ekiden:
        used.append((app, app.conf.broker_url, app.conf.result_backend))
        app.conf.broker_url = app.conf.result_backend = broker_url
        return app

    yield use
    for app, broker, backend in used:
        app.close()
        app.conf.broker_url, app.conf.result_backend = broker, backend


@pytest.fixture
def work(use: Callable[[Ekiden], Ekiden]) -> Iterator[Start]:
    """Starts a worker for a program's app. Called again, it starts another one."""
    with ExitStack() as workers:

        def work(app: Ekiden, **options: Any) -> Ekiden:
            use(app)
            workers.enter_context(app.worker(**{"threads": 4, "grace": 5.0, **options}))
            return app

        yield work
