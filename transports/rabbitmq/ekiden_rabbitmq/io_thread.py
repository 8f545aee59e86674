"""The I/O thread: one loop in which both connections of a transport live, and the only thread that touches pika.

    any thread   post(work)          the loop calls it, in the order of posting; many posts cost one wake-up
                 ask(make, timeout)  the loop runs the coroutine that ``make`` makes; the caller waits for its answer
    the loop     start(coroutine)    runs it up to where it waits, and on whenever what it waits for is there
                 Reply               what a coroutine waits for: a value, or an error, to come
                 sleep, call_later   time

A protocol of several steps (look for a queue, make it, consume from it) is thus written as a coroutine that reads from
top to bottom. Between two of its steps others run; within a step nothing does, so the loop's state needs no lock.

The thread starts with the first work, is a daemon, and ends with ``stop``. A coroutine that nobody waits for and that
fails has met a bug of ours: the loop ends with it, and everyone who asks is told.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from ekiden.errors import BrokerUnavailable, TransportClosed, TransportError
from ekiden.loggers import safe_logger
from pika.adapters.select_connection import IOLoop

logger = safe_logger(__name__)

T = TypeVar("T")

STOPS_WITHIN_SECONDS = 5.0

_PIKA_LOGGERS = (
    "pika.adapters.base_connection",
    "pika.adapters.select_connection",
    "pika.adapters.utils.connection_workflow",
    "pika.adapters.utils.io_services_utils",
    "pika.adapters.utils.selector_ioloop_adapter",
    "pika.callback",
    "pika.channel",
    "pika.connection",
    "pika.heartbeat",
)
_THREAD_NAMES = "ekiden-rabbitmq"


def _is_told_by_us(record: logging.LogRecord) -> bool:
    return not (record.threadName or "").startswith(_THREAD_NAMES) or record.levelno >= logging.CRITICAL


def _quieten_pika() -> None:
    """Our exceptions and log lines say what pika logs of our connections; and much of it (404) is no trouble at all."""
    for name in _PIKA_LOGGERS:
        safe_logger(name).addFilter(_is_told_by_us)


class Reply(Generic[T]):
    """A value to come. Made, set and awaited on the I/O thread; the first value or error counts."""

    __slots__ = ("_error", "_then", "_value", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._then: list[Callable[[], None]] = []

    def set(self, value: T) -> None:
        """It has come."""
        if not self.is_set:
            self._value = value
            self._finish()

    def fail(self, error: BaseException) -> None:
        """It will not come."""
        if not self.is_set:
            self._error = error
            self._finish()

    def then(self, call: Callable[[], None]) -> None:
        """Call this when it is set; at once where it is."""
        if self.is_set:
            call()
        else:
            self._then.append(call)

    @property
    def error(self) -> BaseException | None:
        """Why it will not come; None where it has come, or may."""
        return self._error

    def result(self) -> T:
        """The value, once it is set. Raises what it failed with."""
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def __await__(self) -> Generator[Reply[Any], None, T]:
        if not self.is_set:
            yield self
        return self.result()

    def _finish(self) -> None:
        self.is_set = True
        calls, self._then = self._then, []
        for call in calls:
            call()


Work = Coroutine[Reply[Any], None, T]


def start(coroutine: Work[T]) -> Reply[T]:
    """Run ``coroutine`` up to its first wait, and on from there; returns what it will have returned."""
    reply: Reply[T] = Reply()

    def step() -> None:
        try:
            waits_for = coroutine.send(None)
        except StopIteration as end:
            reply.set(end.value)
        except Exception as error:  # noqa: BLE001 - it travels to whoever awaits the reply
            reply.fail(error)
        else:
            waits_for.then(step)

    step()
    return reply


class Bell:
    """Rung when there is something to do; whoever waits is woken once for any number of rings."""

    def __init__(self) -> None:
        self._rung: Reply[None] = Reply()

    def ring(self) -> None:
        """There is something to do."""
        self._rung.set(None)

    async def wait(self) -> None:
        """Until it was rung since the last wait ended."""
        await self._rung
        self._rung = Reply()


class _Question(Generic[T]):
    """What another thread waits for. The lock is held until the answer is there."""

    __slots__ = ("answered", "error", "value")

    def __init__(self) -> None:
        self.answered = threading.Lock()
        self.answered.acquire()
        self.value: T | None = None
        self.error: BaseException | None = None


class IOThread:
    """Owns the thread and its loop. ``post``, ``ask`` and ``stop`` are for other threads, the rest is for the loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: IOLoop | None = None
        self._posted: deque[Callable[[], None]] = deque()
        self._woken = False
        self._stopped = False
        self._questions: set[_Question[Any]] = set()
        self._crash: BaseException | None = None

    # For other threads.

    def post(self, work: Callable[[], None]) -> None:
        """Have the loop call ``work``. After ``stop`` nothing happens."""
        self._posted.append(work)
        if self._woken:
            return  # the loop has not begun to look at what is posted
        self._woken = True
        loop = self._loop or self._start()
        if loop is not None:
            loop.add_callback_threadsafe(self._work_off)

    def ask(self, make: Callable[[], Work[T]], timeout: float, *, what: str) -> T:
        """What the coroutine returns or raises. Raises BrokerUnavailable after ``timeout`` seconds, with ``what``."""
        self.check()
        question: _Question[T] = _Question()
        self.post(lambda: self._begin(question, make))
        if not question.answered.acquire(timeout=min(timeout, threading.TIMEOUT_MAX)):
            self.post(lambda: self._questions.discard(question))
            raise BrokerUnavailable(f"{what}: no answer within {timeout:g} s.")
        if question.error is not None:
            raise question.error
        return question.value  # type: ignore[return-value]

    def check(self) -> None:
        """Raise what keeps the loop from answering: it was stopped, or has failed."""
        if self._stopped or self._crash is not None:
            raise self._end() from self._crash

    def stop(self) -> None:
        """End the loop and its thread. Whoever still asks gets TransportClosed."""
        with self._lock:
            self._stopped = True
            thread, loop = self._thread, self._loop
        if thread is None or loop is None:
            return
        loop.add_callback_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(STOPS_WITHIN_SECONDS)

    def _end(self) -> TransportError:
        """Why nothing is answered any more."""
        if self._crash is not None:
            return BrokerUnavailable(f"The I/O thread of this transport has failed: {self._crash!r}.")
        return TransportClosed("This transport was closed; open it again.")

    # For the loop.

    @property
    def loop(self) -> IOLoop:
        """pika's loop, for pika's connections."""
        assert self._loop is not None
        return self._loop

    def call_later(self, seconds: float, call: Callable[[], None]) -> object:
        """Have ``call`` called after so many seconds; ``cancel`` takes what this returns."""
        return self.loop.call_later(max(0.0, seconds), self._guarded(call))

    def cancel(self, timer: object) -> None:
        """Do not call it."""
        self.loop.remove_timeout(timer)  # type: ignore[arg-type]

    def sleep(self, seconds: float) -> Reply[None]:
        """Await it to wait so long."""
        reply: Reply[None] = Reply()
        self.call_later(seconds, lambda: reply.set(None))
        return reply

    def within(self, seconds: float, reply: Reply[T]) -> Reply[T]:
        """The same reply, failed with TimeoutError if it is not there after so many seconds."""
        if not reply.is_set:
            timer = self.call_later(seconds, lambda: reply.fail(TimeoutError()))
            reply.then(lambda: self.cancel(timer))
        return reply

    def spawn(self, coroutine: Work[Any]) -> None:
        """Run a coroutine that nobody waits for and that handles its errors itself."""
        reply = start(coroutine)
        reply.then(lambda: self.crashed(reply.error) if reply.error is not None else None)

    def _start(self) -> IOLoop | None:
        with self._lock:
            if self._stopped or self._crash is not None:
                return None
            if self._loop is None:
                _quieten_pika()
                self._loop = IOLoop()
                self._thread = threading.Thread(target=self._run, args=(self._loop,), name=_THREAD_NAMES, daemon=True)
                self._thread.start()
            return self._loop

    def _run(self, loop: IOLoop) -> None:
        try:
            loop.start()
        except BaseException as error:
            self._crash = error
            logger.critical("the I/O thread has failed: %r", error, exc_info=error)
        finally:
            with self._lock:
                self._stopped = True
            for question in list(self._questions):
                question.error = self._end()
                question.answered.release()
            self._questions.clear()
            loop.close()

    def _work_off(self) -> None:
        self._woken = False
        for _ in range(len(self._posted)):
            self._guarded(self._posted.popleft())()

    def _begin(self, question: _Question[T], make: Callable[[], Work[T]]) -> None:
        self._questions.add(question)
        reply = start(make())

        def answer() -> None:
            if question in self._questions:
                self._questions.remove(question)
                question.value, question.error = (None, reply.error) if reply.error else (reply.result(), None)
                question.answered.release()

        reply.then(answer)

    def _guarded(self, call: Callable[[], None]) -> Callable[[], None]:
        """pika would take an exception for the connection's; ours ends the loop."""

        def guarded() -> None:
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - see above
                self.crashed(error)

        return guarded

    def crashed(self, error: BaseException) -> None:
        """Our own code has raised what it must not: the loop ends, and everyone who asks is told."""
        if self._crash is None:
            self._crash = error
            logger.critical("the I/O thread has failed: %r", error, exc_info=error)
        self.loop.stop()
