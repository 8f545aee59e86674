"""For ``async`` callers: one thread that publishes and one that waits for results, however many are awaiting.

Both are started at the first await, owned by what starts them (the Publisher, the app's results), and ended by its
``close``. They are daemons, so that a program that forgets to close an app still ends.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Protocol

from ekiden.errors import BackendError, BackendRefused, MisuseError, TransportCrashed, UnknownResult
from ekiden.loggers import safe_logger
from ekiden.message import Message, Published
from ekiden.options import Publishing
from ekiden.results import Backend, StoredResult, each_apart

logger = safe_logger(__name__)

_FIRST_WAIT = 0.05
_LONGEST_WAIT = 5.0


class Publish(Protocol):
    """``Publisher.publish``."""

    def __call__(self, messages: Sequence[Message], how: Publishing) -> list[Published]: ...


class _Awaited:
    """One async caller's messages and the future that waits for the answer, in its loop."""

    __slots__ = ("future", "how", "loop", "messages")

    def __init__(self, messages: Sequence[Message], how: Publishing) -> None:
        self.messages = messages
        self.how = how
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[Published]] = self.loop.create_future()


class PublishingThread:
    """The one thread that publishes for ``async`` callers. ``_mutex`` keeps callers from one that has ended."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        self._queue: SimpleQueue[_Awaited | None] = SimpleQueue()
        self._taken: list[_Awaited] = []
        self._mutex = threading.Lock()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ekiden-async-publisher", daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether the thread has ended on an error: another one is needed."""
        return self._failure is not None

    async def publish(self, messages: Sequence[Message], how: Publishing) -> list[Published]:
        """Publish with whatever else is waiting; the caller's loop runs on meanwhile."""
        awaited = _Awaited(messages, how)
        with self._mutex:
            if self._failure is not None:
                raise _publishing_failed(self._failure)
            self._queue.put(awaited)
        return await awaited.future

    def close(self) -> None:
        """Publish what was given before, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._publish_until_closed()
        except BaseException as error:
            logger.critical("the thread that publishes for async callers has failed: %r", error, exc_info=error)
            with self._mutex:
                self._failure = error
                self._take_all()
            for awaited in self._taken:
                _resolve(awaited, None, _publishing_failed(error))

    def _publish_until_closed(self) -> None:
        while (first := self._queue.get()) is not None:
            self._taken = [first]
            is_closed = not self._take_all()
            self._publish_all(self._taken)
            self._taken = []
            if is_closed:
                return

    def _take_all(self) -> bool:
        """Take along what waits in the queue; whether there may be more some time."""
        while True:
            try:
                following = self._queue.get_nowait()
            except Empty:
                return True
            if following is None:
                return False
            self._taken.append(following)

    def _publish_all(self, waiting: list[_Awaited]) -> None:
        """One publish for all who want it the same way, which is mostly all."""
        groups: dict[Publishing, list[_Awaited]] = {}
        for awaited in waiting:
            groups.setdefault(awaited.how, []).append(awaited)
        for how, group in groups.items():
            self._publish_group(group, how)

    def _publish_group(self, group: list[_Awaited], how: Publishing) -> None:
        messages = [message for awaited in group for message in awaited.messages]
        try:
            answers = self._publish(messages, how)
        except Exception as error:  # noqa: BLE001 - it travels to every caller, whatever it is
            for awaited in group:
                _resolve(awaited, None, error)
            return
        start = 0
        for awaited in group:
            _resolve(awaited, answers[start : start + len(awaited.messages)], None)
            start += len(awaited.messages)


def _publishing_failed(error: BaseException) -> TransportCrashed:
    failed = TransportCrashed(
        f"The thread that publishes for async callers has failed: {error!r}. The message may have been stored."
    )
    failed.__cause__ = error
    return failed


def _resolve(awaited: _Awaited, answers: list[Published] | None, error: Exception | None) -> None:
    def finish() -> None:
        if awaited.future.done():
            return
        if error is not None:
            awaited.future.set_exception(error)
        else:
            awaited.future.set_result(answers or [])

    try:
        awaited.loop.call_soon_threadsafe(finish)
    except RuntimeError:
        return  # its loop has been closed: nobody awaits this any more


Callback = Callable[[StoredResult | None, Exception | None], None]


class WaitingThread:
    """The one thread that waits for the results of all who await. ``_callbacks`` is guarded by ``_mutex``."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._mutex = threading.Lock()
        self._wanted = threading.Event()
        self._callbacks: dict[str, list[Callback]] = {}
        self._closed = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="ekiden-results", daemon=True)
        self._thread.start()

    def call_when_final(self, task_id: str, callback: Callback) -> None:
        """Call ``callback(result, None)`` from the thread once the task has ended, or ``(None, error)``."""
        with self._mutex:
            if self._failed:
                raise BackendError("The thread that waits for results has just failed; ask again.")
            if self._closed:
                raise MisuseError("the app has been closed while its results were awaited")
            is_new = task_id not in self._callbacks
            self._callbacks.setdefault(task_id, []).append(callback)
            was_waiting = self._wanted.is_set()
            self._wanted.set()
        if is_new and was_waiting:
            self._backend.wake()

    async def wait(self, task_id: str) -> StoredResult:
        """Await the final result of a task."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StoredResult] = loop.create_future()

        def resolve(result: StoredResult | None, error: Exception | None) -> None:
            def finish() -> None:
                if future.done():
                    return
                if result is not None:
                    future.set_result(result)
                else:
                    future.set_exception(error or MisuseError("the app has been closed while a result was awaited"))

            try:
                loop.call_soon_threadsafe(finish)
            except RuntimeError:
                return  # its loop has been closed: nobody awaits this any more

        self.call_when_final(task_id, resolve)
        return await future

    def close(self) -> None:
        """End the thread; whoever still awaits gets a MisuseError."""
        with self._mutex:
            self._closed = True
            self._wanted.set()
        while self._thread.is_alive():
            self._backend.wake()
            self._thread.join(_FIRST_WAIT)

    @property
    def has_failed(self) -> bool:
        """Whether the thread has ended on an error: another one is needed."""
        return self._failed

    def _run(self) -> None:
        try:
            self._wait_until_closed()
        except BaseException as error:
            logger.critical("the thread that waits for results has failed: %r", error, exc_info=error)
            with self._mutex:
                self._failed = self._closed = True
            failed = BackendError(f"The thread that waits for results has failed: {error!r}; ask again.")
            failed.__cause__ = error
            self._finish_all(failed)

    def _wait_until_closed(self) -> None:
        ids: list[str] = []
        wait = _FIRST_WAIT
        while True:
            self._wanted.wait()
            with self._mutex:
                if self._closed:
                    break
                known, ids = ids, list(self._callbacks)
                if not ids:
                    self._wanted.clear()
                    continue
            # Whoever asks between here and the backend's wait wakes nobody, and then waits for as long as this.
            wait = min(wait * 2, _LONGEST_WAIT) if ids == known else _FIRST_WAIT
            try:
                results = self._backend.wait(ids, wait)
            except UnknownResult as error:
                for task_id in error.task_ids or ids:
                    self._finish(task_id, None, error)
                continue
            except BackendRefused as error:
                if not self._finish_refused(ids):
                    self._finish_all(error)
                continue
            except Exception as error:  # noqa: BLE001 - it travels to everyone who awaits, whatever it is
                self._finish_all(error)
                continue
            for result in results:
                self._finish(result.task_id, result, None)
        self._finish_all(MisuseError("the app has been closed while a result was awaited"))

    def _finish_refused(self, ids: list[str]) -> bool:
        """Tell those who await what the store could never hold; whether there were any."""
        try:
            answers = each_apart(self._backend.get, ids)
        except Exception as error:  # noqa: BLE001 - it travels to everyone who awaits, whatever it is
            self._finish_all(error)
            return True
        refused = [(task_id, each) for task_id, each in zip(ids, answers, strict=True) if isinstance(each, Exception)]
        for task_id, refusal in refused:
            self._finish(task_id, None, refusal)
        return bool(refused)

    def _finish(self, task_id: str, result: StoredResult | None, error: Exception | None) -> None:
        with self._mutex:
            callbacks = self._callbacks.pop(task_id, [])
        for callback in callbacks:
            callback(result, error)

    def _finish_all(self, error: Exception) -> None:
        with self._mutex:
            callbacks = [each for waiting in self._callbacks.values() for each in waiting]
            self._callbacks.clear()
        for callback in callbacks:
            callback(None, error)
