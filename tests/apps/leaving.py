"""Async bodies whose helpers in the event loop do what ends a program."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

from ekiden import Ekiden

app = Ekiden("leaving", broker="memory://leaving")

KINDS: dict[str, type[BaseException]] = {
    "SystemExit": SystemExit,
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
}

SEEN_BY_THE_BODY = ("gather", "task group", "await", "wait_for", "thread", "generator")
SEEN_BY_NOBODY = ("task", "call_soon", "call_later", "done callback", "handler", "finalizer", "cancelled", "stop")


@app.task(name="leaving.leave")
async def leave(how: str, kind: str) -> str:
    """Have something leave, as ``how`` says, and return how that was if the body saw nothing of it."""
    if how in SEEN_BY_THE_BODY:
        await _awaited(how, KINDS[kind])
    else:
        await _left_alone(how, KINDS[kind])
    await asyncio.sleep(0.05)
    asyncio.get_running_loop().set_exception_handler(None)
    return how


async def _awaited(how: str, error: type[BaseException]) -> None:
    match how:
        case "gather":
            await asyncio.gather(asyncio.sleep(0.01), leaves(error))
        case "task group":
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(60))
                group.create_task(leaves(error))
        case "await":
            await asyncio.create_task(leaves(error))
        case "wait_for":
            await asyncio.wait_for(leaves(error), 60)
        case "thread":
            await asyncio.to_thread(raises, error)
        case "generator":
            async for _ in generates(error):
                continue


async def _left_alone(how: str, error: type[BaseException]) -> None:
    loop = asyncio.get_running_loop()
    match how:
        case "task":
            kept.append(asyncio.create_task(leaves(error)))
        case "call_soon":
            loop.call_soon(raises, error)
        case "call_later":
            loop.call_later(0.01, raises, error)
        case "done callback":
            done = loop.create_future()
            done.add_done_callback(lambda _: raises(error))
            done.set_result(None)
        case "handler":
            loop.set_exception_handler(lambda _loop, _context: raises(error))
            loop.call_soon(raises, ZeroDivisionError)
        case "finalizer":
            async for _ in leaves_at_its_end(error):
                break
            gc.collect()
        case "cancelled":
            kept.append(asyncio.create_task(leaves_when_cancelled(error)))
            await asyncio.sleep(0)
            kept[-1].cancel()
        case "stop":
            loop.stop()


@app.task(name="leaving.fine")
async def fine(number: int) -> int:
    """Do nothing of the kind."""
    await asyncio.sleep(0.01)
    return number


kept: list[asyncio.Task[Any]] = []


def raises(error: type[BaseException]) -> None:
    raise error("leaving")


async def leaves(error: type[BaseException]) -> None:
    await asyncio.sleep(0)
    raise error("leaving")


async def leaves_when_cancelled(error: type[BaseException]) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        raise error("leaving")


async def generates(error: type[BaseException]) -> AsyncIterator[int]:
    yield 1
    raise error("leaving")


async def leaves_at_its_end(error: type[BaseException]) -> AsyncIterator[int]:
    try:
        yield 1
        yield 2
    finally:
        raise error("leaving")
