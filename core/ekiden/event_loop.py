"""Bodies in an event loop: one thread for every ``async def`` body, and how a running one is interrupted.

What a body starts in the loop (child tasks, callbacks, generators) may raise SystemExit or KeyboardInterrupt, which
asyncio passes on to the loop, or stop the loop. That ends a program; here it would end everybody else's bodies, so the
loop goes on. Who awaits a child task sees what that raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from ekiden.loggers import safe_logger

logger = safe_logger(__name__)

Answer = TypeVar("Answer")

_CANCEL_AGAIN_SECONDS = 1.0
_LEFTOVERS_SECONDS = 0.3


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


class _Root(Coroutine[Any, Any, Answer]):
    """What asyncio drives: a coroutine, in which a GeneratorExit out of an awaited child task is another error.

    Python does not raise a GeneratorExit in a coroutine but closes it, and everything that it awaits: its answer would
    be lost.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Answer]) -> None:
        self._coroutine = coroutine
        self.send = coroutine.send  # type: ignore[method-assign, assignment]  # without a function of ours at every step

    def send(self, value: Any) -> Any:
        """Go on."""
        return self._coroutine.send(value)

    def throw(self, kind: Any, value: Any = None, traceback: Any = None) -> Any:
        """Go on with an error."""
        error = kind if isinstance(kind, BaseException) else value if isinstance(value, BaseException) else kind()
        if isinstance(error, GeneratorExit):
            escaped = RuntimeError(f"what it awaited raised {error!r}")
            escaped.__cause__ = error
            error = escaped
        return self._coroutine.throw(error)

    def close(self) -> None:
        """Do not go on."""
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Answer]:
        return self._coroutine.__await__()


class LoopJob(Protocol):
    """What the event loop runs."""

    def run(self) -> Coroutine[Any, Any, None]:
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
        self._asked_at: float | None = None
        self._is_over = False
        self.loop = _new_loop()
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

    def blocked_for(self) -> float:
        """For how many seconds the loop has not come round since it was asked; asks it again when it has.

        Called again and again by one thread.
        """
        if self._asked_at is not None:
            return time.monotonic() - self._asked_at
        self._asked_at = time.monotonic()
        self._call(self._answer)
        return 0.0

    def close(self, grace: float) -> None:
        """Cancel what is running and end the thread, within ``grace`` seconds."""
        self._call(self._cancel)
        self._thread.join(grace)
        if self._thread.is_alive():
            logger.warning("the event loop did not end within %g s: a task blocks it", grace)

    def _call(self, action: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has failed
            self.loop.call_soon_threadsafe(action)

    def _answer(self) -> None:
        self._asked_at = None

    def _start(self) -> None:
        while len(self._running) < self._concurrency:
            try:
                job = self._waiting.popleft()
            except IndexError:
                return
            # A context of its own: it sees nothing that another body, or whoever submitted it, has set.
            task = self.loop.create_task(_Root(job.run()), context=contextvars.Context())
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
        await _end_leftovers()
        self._is_over = True
        self.loop.stop()

    def _run(self) -> None:
        try:
            asyncio.set_event_loop(self.loop)
            _run_loop(self.loop, lambda: self._is_over)
        except BaseException as error:  # noqa: BLE001 - a bug of ours: the worker must end, not go on without its loop
            self._failed(error)
        finally:
            self.loop.close()


def run_coroutine(coroutine: Coroutine[Any, Any, Answer]) -> Answer:
    """Run ``coroutine`` in a loop of its own, and return what it returns.

    As ``asyncio.run`` does it, save that nothing what it has started ends the loop before it, and that what it leaves
    behind is waited for in bounded time only. For a thread that no Ctrl-C reaches.
    """
    loop = _new_loop()
    try:
        asyncio.set_event_loop(loop)
        answer = _run_to_its_end(loop, coroutine)
        _run_to_its_end(loop, _end_leftovers())
        return answer.result()
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _run_to_its_end(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Answer]) -> asyncio.Task[Answer]:
    task = loop.create_task(_Root(coroutine), context=contextvars.Context())
    task.add_done_callback(lambda _: loop.stop())
    _run_loop(loop, task.done)
    return task


def _new_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    # One that is not waited for: a function that a body has left in a thread may never end.
    loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix="asyncio"))
    return loop


def _run_loop(loop: asyncio.AbstractEventLoop, is_over: Callable[[], bool]) -> None:
    """Run ``loop`` until it ``is_over``, whatever the code in it raises."""
    while not is_over():
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as error:
            logger.error(
                "%r ends nothing but what raised it, a child task or callback of a body", error, exc_info=error
            )
        else:
            if not is_over():
                logger.error("code of a body has stopped the event loop, which others use, too: it goes on")


async def _end_leftovers() -> None:
    """Cancel what bodies have left behind in this loop, and wait a moment for it to end."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=_LEFTOVERS_SECONDS)
    closing = asyncio.create_task(asyncio.get_running_loop().shutdown_asyncgens())
    await asyncio.wait({closing}, timeout=_LEFTOVERS_SECONDS)
