"""For ``async`` callers: one thread that publishes and one that waits for results, however many are awaiting.

Both are started at the first await, owned by what starts them (the Publisher, the app's results), and ended by its
``close``. They are daemons, so that a program that forgets to close an app still ends.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Protocol

from ekiden.errors import (
    BackendError,
    BackendRefused,
    BrokerUnavailable,
    MisuseError,
    TransportCrashed,
    UnknownResult,
)
from ekiden.locks import Flag, start_thread
from ekiden.loggers import safe_logger
from ekiden.message import Message, Published
from ekiden.options import Publishing
from ekiden.publisher import Tries
from ekiden.results import Backend, StoredResult, each_apart

logger = safe_logger(__name__)

_LAST_WORD_SECONDS = 0.1
_FIRST_WAIT = 0.05
_LONGEST_WAIT = 5.0

MOST_CALLBACKS = 100_000
"""So many callbacks of ``then`` wait at most in one process: some wait for what never comes, such as a purged call."""


class Publish(Protocol):
    """``Publisher.publish``."""

    def __call__(self, messages: Sequence[Message], how: Publishing, deadline: float) -> list[Published]: ...


class _Awaited:
    """One async caller's messages, their tries, and the future that waits for the answer, in its loop.

    ``due``: when the next try is, on the monotonic clock.
    """

    __slots__ = ("due", "future", "loop", "tries")

    def __init__(self, messages: Sequence[Message], how: Publishing, deadline: float) -> None:
        self.tries = Tries(messages, how, deadline)
        self.due = 0.0
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[Published]] = self.loop.create_future()

    def loop_does(self, call: Callable[[], None]) -> None:
        """Have its loop call this; nothing where that has been closed: nobody awaits the answer any more."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(call)

    def give_up(self) -> None:
        """In its loop: the deadline is over, and the thread is busy with others."""
        if not self.future.done():
            queue, seconds = self.tries.messages[0].queue, self.tries.how.timeout
            self.future.set_exception(
                BrokerUnavailable(
                    f"{queue}: nothing could be published within {seconds:g} s; the broker does not answer."
                )
            )


class PublishingThread:
    """The one thread that publishes for ``async`` callers. What is to be tried again waits beside what is new.

    ``_mutex`` keeps callers from one that has ended, and from starting it twice.
    """

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        self._queue: SimpleQueue[_Awaited | None] = SimpleQueue()
        self._again: list[_Awaited] = []
        self._taken: list[_Awaited] = []
        self._closing = False
        self._mutex = threading.Lock()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ekiden-async-publisher", daemon=True)

    @property
    def has_failed(self) -> bool:
        """Whether the thread has ended on an error: another one is needed."""
        return self._failure is not None

    async def publish(self, messages: Sequence[Message], how: Publishing, deadline: float) -> list[Published]:
        """Publish with whatever else is waiting; the caller's loop runs on meanwhile. Ends at the deadline."""
        awaited = _Awaited(messages, how, deadline)
        with self._mutex:
            if self._failure is not None:
                raise _publishing_failed(self._failure)
            if self._thread.ident is None:
                start_thread(self._thread)
            self._queue.put(awaited)
        # The transport, which knows more of the trouble, has the first word.
        seconds = max(0.0, deadline - time.monotonic()) + _LAST_WORD_SECONDS
        timer = awaited.loop.call_later(seconds, awaited.give_up)
        try:
            return await awaited.future
        finally:
            timer.cancel()

    def close(self) -> None:
        """Publish what was given before, and end the thread."""
        self._queue.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._publish_until_closed()
        except BaseException as error:
            logger.critical("the thread that publishes for async callers has failed: %r", error, exc_info=error)
            with self._mutex:
                self._failure = error
                with suppress(Empty):
                    while True:
                        self._note(self._queue.get_nowait())
            for awaited in (*self._taken, *self._again):
                _resolve(awaited, _publishing_failed(error))

    def _publish_until_closed(self) -> None:
        while group := self._next():
            self._taken = group
            for how, same in _alike(group).items():
                self._publish_group(same, how)
            self._taken = []

    def _next(self) -> list[_Awaited]:
        """What is to be published now, as soon as there is something; nothing once all is done and it was closed."""
        while True:
            self._take_new()
            now = time.monotonic()
            # Who does not wait any more has been told that nothing was published.
            waiting = [each for each in self._again if not each.future.done()]
            for late in [each for each in waiting if each.tries.deadline <= now]:
                late.loop_does(late.give_up)
                waiting.remove(late)
            due = [each for each in waiting if each.due <= now]
            self._again = [each for each in waiting if each.due > now]
            if due or (self._closing and not self._again):
                return due

    def _take_new(self) -> None:
        """Wait until there is something new, or something is to be tried again; take all that is new."""
        with suppress(Empty):
            patience = None
            if self._again:
                patience = max(0.0, min(each.due for each in self._again) - time.monotonic())
            elif self._closing:
                patience = 0.0
            self._note(self._queue.get(timeout=patience))
            while True:
                self._note(self._queue.get_nowait())

    def _note(self, new: _Awaited | None) -> None:
        if new is None:
            self._closing = True
        else:
            self._again.append(new)

    def _publish_group(self, group: list[_Awaited], how: Publishing) -> None:
        """One try of all that want it the same way."""
        messages = [message for awaited in group for message in awaited.tries.left()]
        deadline = max(awaited.tries.deadline for awaited in group)
        answers: list[Published] | None = None
        error: BrokerUnavailable | None = None
        try:
            answers = self._publish(messages, Publishing(how.timeout, None), deadline)
        except BrokerUnavailable as trouble:
            error = trouble
        except Exception as trouble:  # noqa: BLE001 - it travels to every caller, whatever it is
            for awaited in group:
                _resolve(awaited, trouble)
            return
        start = 0
        for awaited in group:
            end = start + len(awaited.tries.left())
            pause = awaited.tries.pause_after(None if answers is None else answers[start:end], error)
            start = end
            if pause is None:
                _resolve(awaited, None)
            else:
                awaited.due = time.monotonic() + pause
                self._again.append(awaited)


def _publishing_failed(error: BaseException) -> TransportCrashed:
    failed = TransportCrashed(
        f"The thread that publishes for async callers has failed: {error!r}. The message may have been stored."
    )
    failed.__cause__ = error
    return failed


def _alike(waiting: list[_Awaited]) -> dict[Publishing, list[_Awaited]]:
    """Those who want it the same way, which are mostly all, together."""
    groups: dict[Publishing, list[_Awaited]] = {}
    for awaited in waiting:
        groups.setdefault(awaited.tries.how, []).append(awaited)
    return groups


def _resolve(awaited: _Awaited, error: Exception | None) -> None:
    """Tell the caller what became of it: ``error``, or what its tries brought."""
    answers: list[Published] = []
    if error is None:
        try:
            answers = awaited.tries.outcome()
        except BrokerUnavailable as trouble:
            error = trouble

    def finish() -> None:
        if awaited.future.done():
            return
        if error is not None:
            awaited.future.set_exception(error)
        else:
            awaited.future.set_result(answers)

    awaited.loop_does(finish)


Callback = Callable[[StoredResult | None, Exception | None], None]


class WaitingThread:
    """The one thread that waits for the results of all who await. ``_mutex`` guards ``_callbacks`` and ``_unowned``.

    ``_unowned``: those callbacks that nobody takes back, the oldest first. Of these there are at most ``most``.
    """

    def __init__(self, backend: Backend, *, most: int = MOST_CALLBACKS) -> None:
        self._backend = backend
        self._mutex = threading.Lock()
        self._wanted = Flag()
        self._callbacks: dict[str, list[Callback]] = {}
        self._unowned: dict[Callback, str] = {}
        self._most = most
        self._closed = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="ekiden-results", daemon=True)

    def call_when_final(self, task_id: str, callback: Callback) -> None:
        """Call ``callback(result, None)`` from the thread once the task has ended, or ``(None, error)``.

        When too many wait, the oldest is called at once, with an error.
        """
        dropped: Callback | None = None
        with self._mutex:
            if len(self._unowned) >= self._most:
                dropped, its_task = next(iter(self._unowned.items()))
                self._remove(its_task, dropped)
            self._unowned[callback] = task_id
        try:
            self._follow(task_id, callback)
        except BaseException:
            self._drop(task_id, callback)
            raise
        if dropped is not None:
            dropped(None, BackendError(f"more than {self._most} callbacks wait for results; the oldest is dropped."))

    def _follow(self, task_id: str, callback: Callback) -> None:
        with self._mutex:
            if self._failed:
                raise BackendError("The thread that waits for results has just failed; ask again.")
            if self._closed:
                raise MisuseError("the app has been closed while its results were awaited")
            is_new = task_id not in self._callbacks
            self._callbacks.setdefault(task_id, []).append(callback)
            was_waiting = self._wanted.is_set()
            self._wanted.set()
            if self._thread.ident is None:
                start_thread(self._thread)
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

        try:
            self._follow(task_id, resolve)
            return await future
        finally:
            self._drop(task_id, resolve)

    def _drop(self, task_id: str, callback: Callback) -> None:
        """Nobody waits for it by ``callback`` any more: it was told, timed out or cancelled."""
        with self._mutex:
            self._remove(task_id, callback)

    def _remove(self, task_id: str, callback: Callback) -> None:
        """The caller holds the mutex."""
        self._unowned.pop(callback, None)
        callbacks = self._callbacks.get(task_id)
        if callbacks is not None and callback in callbacks:
            callbacks.remove(callback)
            if not callbacks:
                del self._callbacks[task_id]

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
                self._unowned.pop(callback, None)
        for callback in callbacks:
            callback(result, error)

    def _finish_all(self, error: Exception) -> None:
        with self._mutex:
            callbacks = [each for waiting in self._callbacks.values() for each in waiting]
            self._callbacks.clear()
            self._unowned.clear()
        for callback in callbacks:
            callback(None, error)
