"""Ten thousand awaits at once cost a few threads, and none each."""

import asyncio
import threading
import uuid
from pathlib import Path

import pytest
from ekiden import Ekiden

MANY = 10_000
A_FEW = 3  # one publishes, one waits for results, and SQLite's backend has one that looks for them


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["memory", "sqlite"])
def test_ten_thousand_awaits_at_once_are_answered(broker: str, tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}" if broker == "memory" else f"sqlite:///{tmp_path / 'tasks.db'}"
    app = Ekiden("many", broker=url)
    most_threads = 0

    @app.task
    def double(number: int) -> int:
        return 2 * number

    async def call(number: int) -> int:
        nonlocal most_threads
        result = await double.adelay(number)
        most_threads = max(most_threads, threading.active_count())
        return await result

    async def call_all() -> list[int]:
        return await asyncio.gather(*(call(number) for number in range(MANY)))

    with app, app.worker(threads=2):
        before = threading.active_count()
        answers = asyncio.run(call_all())

    assert answers == [2 * number for number in range(MANY)]
    assert most_threads <= before + A_FEW
