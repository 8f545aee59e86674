"""Bodies in an event loop: one thread for every ``async def`` body, and how a running one is interrupted."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Protocol

from ekiden.loggers import safe_logger

logger = safe_logger(__name__)

_CANCEL_AGAIN_SECONDS = 1.0


class Interruptible:
    """Awaits one coroutine, and can raise any exception in it where it awaits, or end it; asyncio can only cancel.

    Made in the running loop, and used in its thread only. ``close`` it when the coroutine has ended, or will not run.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timers: list[asyncio.TimerHandle] = []
        self._task: asyncio.Task[Any] | None = None
        self._interruption: BaseException | None = None
        self._end: BaseException | None = None

    async def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Await ``coroutine``. Raises what it was ended with, if it was, whatever the coroutine made of that."""
        if self._end is not None:
            coroutine.close()
            raise self._end
        self._task = asyncio.current_task()
        try:
            value = await _Interposed(coroutine, self._instead_of)
        except BaseException as error:
            if self._end is not None:
                raise self._end from error
            raise
        finally:
            self._task = None
        if self._end is not None:
            raise self._end
        return value

    def interrupt(self, error: BaseException) -> None:
        """Raise ``error`` in the coroutine, which may handle it."""
        if self._task is not None and self._end is None:
            self._interruption = error
            self._task.cancel()

    def end(self, error: BaseException) -> None:
        """Cancel the coroutine and what it awaits, once more every second until it has ended."""
        self._end = self._end or error
        self._interruption = None
        if self._task is not None:
            self._task.cancel()
            self._timers.append(self._loop.call_later(_CANCEL_AGAIN_SECONDS, self.end, error))

    def after(self, seconds: float | None, action: Callable[[BaseException], None], error: BaseException) -> None:
        """Do ``interrupt`` or ``end`` in ``seconds``, unless it was closed by then. None is never."""
        if seconds is not None:
            self._timers.append(self._loop.call_later(seconds, action, error))

    def close(self) -> None:
        """Interrupt nothing any more."""
        for timer in self._timers:
            timer.cancel()

    def _instead_of(self, thrown: BaseException) -> BaseException:
        """What the coroutine is to see of what asyncio raises in it."""
        interruption, self._interruption = self._interruption, None
        if interruption is None or not isinstance(thrown, asyncio.CancelledError):
            return thrown
        if self._task is not None:
            self._task.uncancel()
        return interruption


class _Interposed:
    """Awaits a coroutine; what is raised in it from outside passes through ``instead_of``."""

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], instead_of: Callable[[BaseException], BaseException]
    ) -> None:
        self._coroutine = coroutine
        self._instead_of = instead_of

    def __await__(self) -> Generator[Any, Any, Any]:
        sent: Any = None
        error: BaseException | None = None
        while True:
            try:
                yielded = self._coroutine.send(sent) if error is None else self._coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
            sent = error = None
            try:
                sent = yield yielded
            except BaseException as thrown:  # noqa: BLE001 - it is thrown on into the coroutine
                error = self._instead_of(thrown)


class LoopJob(Protocol):
    """What the event loop runs."""

    async def run(self) -> None:
        """The whole of it; raises nothing."""
        ...


class EventLoop:
    """One thread with an event loop that runs up to ``concurrency`` jobs at once; the others wait in line.

    ``_waiting`` is a deque that two threads take from, one at each end: taking is atomic.
    """

    def __init__(self, concurrency: int, *, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._concurrency = concurrency
        self._waiting: deque[LoopJob] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="ekiden-loop", daemon=True)
        self._thread.start()

    def submit(self, jobs: list[LoopJob]) -> None:
        """Run ``jobs`` as soon as there is room."""
        self._waiting.extend(jobs)
        self.loop.call_soon_threadsafe(self._start)

    def take_back(self) -> LoopJob | None:
        """The job that has waited shortest and was not started, or None."""
        try:
            return self._waiting.pop()
        except IndexError:
            return None

    def in_hand(self) -> int:
        """How many are running or waiting."""
        return len(self._running) + len(self._waiting)

    def close(self, grace: float) -> None:
        """Cancel what is running and end the thread, within ``grace`` seconds."""
        self.loop.call_soon_threadsafe(self._cancel)
        self._thread.join(grace)
        if self._thread.is_alive():
            logger.warning("the event loop did not end within %g s: a task blocks it", grace)

    def _start(self) -> None:
        while len(self._running) < self._concurrency:
            try:
                job = self._waiting.popleft()
            except IndexError:
                return
            task = self.loop.create_task(job.run())
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failed(error)
        self._start()

    def _cancel(self) -> None:
        self._waiting.clear()
        for task in self._running:
            task.cancel()
        self.loop.create_task(self._stop_when_idle())

    async def _stop_when_idle(self) -> None:
        while self._running:
            await asyncio.wait(self._running)
        await self.loop.shutdown_asyncgens()
        await self.loop.shutdown_default_executor()
        self.loop.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()
