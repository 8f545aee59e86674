"""The I/O thread: one loop in which both connections of a transport live, and the only thread that touches pika.

    any thread   post(work)          the loop calls it, in the order of posting; many posts cost one wake-up
                 ask(make, timeout)  the loop runs the coroutine that ``make`` makes; the caller waits for its answer
                 at_crash(call)      called when the loop has failed, so that nobody waits for it
    the loop     start(coroutine)    runs it up to where it waits, and on whenever what it waits for is there
                 Reply               what a coroutine waits for: a value, or an error, to come
                 sleep, call_later   time

A protocol of several steps (look for a queue, make it, consume from it) is thus written as a coroutine that reads from
top to bottom. Between two of its steps others run; within a step nothing does, so the loop's state needs no lock.

The thread starts with the first work, is a daemon, and ends with ``stop``.

**Errors of our own.** What comes from a message, a number or the server harms at most the call or the channel that met
it: the owner of that tells ``survived``, and the loop goes on. Where that happens again and again, or where a bug shows
that belongs to no call, the loop ends (``crashed``), its connections are dropped, and everyone who asks gets
TransportCrashed; the transport starts another one for what is asked next.

**Exceptions out of signal handlers** reach callers between any two of their steps. What was posted before is done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from ekiden.errors import BrokerUnavailable, TransportClosed, TransportCrashed, TransportError
from ekiden.locks import start_thread
from ekiden.loggers import safe_logger
from pika.adapters.select_connection import IOLoop

logger = safe_logger(__name__)

T = TypeVar("T")

STOPS_WITHIN_SECONDS = 5.0

SURVIVES, WITHIN_SECONDS = 20, 60.0
"""After so many errors of our own within so many seconds it is better to begin anew."""

STALLED_AFTER_SECONDS = 10.0
"""A loop that has not turned for so long is stuck: no step of ours takes a tenth of it."""

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
    """What another thread waits for. The lock is held until the answer is there; the first answer counts."""

    __slots__ = ("_is_answered", "answered", "error", "value")

    def __init__(self) -> None:
        self.answered = threading.Lock()
        self.answered.acquire()
        self.value: T | None = None
        self.error: BaseException | None = None
        self._is_answered = False

    def answer(self, value: T | None, error: BaseException | None) -> None:
        """By the I/O thread."""
        if not self._is_answered:
            self._is_answered = True
            self.value, self.error = value, error
            self.answered.release()


class IOThread:
    """Owns the thread and its loop. The first part is for other threads, the rest is for the loop.

    The lock guards that there is one loop. It is reentrant, because a signal handler may post while its thread starts
    the loop.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._loop: IOLoop | None = None
        self._posted: deque[Callable[[], None]] = deque()
        self._woken = False
        self._stopped = False
        self._questions: set[_Question[Any]] = set()
        self._at_crash: dict[Callable[[TransportCrashed], None], None] = {}
        self._survived: deque[float] = deque(maxlen=SURVIVES)
        self._crash: BaseException | None = None
        self._asked_at: float | None = None

    # For other threads.

    def post(self, work: Callable[[], None]) -> None:
        """Have the loop call ``work``. After ``stop`` nothing happens."""
        self._posted.append(work)
        if self._woken:
            return  # the loop has not begun to look at what is posted
        loop = self._loop
        if loop is None:
            self._start()  # it begins with what is posted
            return
        try:
            self._woken = True
            loop.add_callback_threadsafe(self._work_off)
        except BaseException:
            # Out of a signal handler. Others have posted meanwhile, perhaps, and rely on us.
            self._woken = False
            loop.add_callback_threadsafe(self._work_off)
            raise

    def ask(self, make: Callable[[], Work[T]], timeout: float, *, what: str) -> T:
        """What the coroutine returns or raises. Raises BrokerUnavailable after ``timeout`` seconds, with ``what``."""
        question: _Question[T] = _Question()
        self._questions.add(question)
        try:
            self.check()  # after it was added: now a crash answers it
            self.post(lambda: self._begin(question, make))
            if not question.answered.acquire(timeout=min(timeout, threading.TIMEOUT_MAX)):
                raise BrokerUnavailable(f"{what}: no answer within {timeout:g} s.")
        finally:
            self._questions.discard(question)
        if question.error is not None:
            raise question.error
        return question.value  # type: ignore[return-value]

    def check(self) -> None:
        """Raise what keeps the loop from answering: it was stopped, or has failed."""
        if self._stopped or self._crash is not None:
            raise self._end() from self._crash

    @property
    def has_crashed(self) -> bool:
        """Whether the loop has failed: another one is needed."""
        return self._crash is not None

    def at_crash(self, call: Callable[[TransportCrashed], None]) -> None:
        """Have ``call`` called by the thread when its loop has failed; until ``not_at_crash``."""
        self._at_crash[call] = None

    def not_at_crash(self, call: Callable[[TransportCrashed], None]) -> None:
        """Do not call it."""
        self._at_crash.pop(call, None)

    def stalled(self) -> float | None:
        """For how many seconds the loop has not turned, if that is too long. Called now and then; never blocks."""
        if self._loop is None or self._stopped:
            return None
        now = time.monotonic()
        asked_at = self._asked_at
        if asked_at is None:
            self._asked_at = now
            self.post(self._turned)
            return None
        return now - asked_at if now - asked_at > STALLED_AFTER_SECONDS else None

    def stop(self) -> None:
        """End the loop and its thread. Whoever still asks gets TransportClosed."""
        with self._lock:
            self._stopped = True
            thread, loop = self._thread, self._loop
        if loop is not None:
            loop.add_callback_threadsafe(loop.stop)
        if thread is not None and thread is not threading.current_thread():
            thread.join(STOPS_WITHIN_SECONDS)
        self._tell_the_end()

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None or self._stopped or self._crash is not None:
                return
            _quieten_pika()
            thread = threading.Thread(target=self._run, name=_THREAD_NAMES, daemon=True)
            try:
                start_thread(thread)
            finally:
                # An exception out of a signal handler may come before or after the thread has begun. Of two of them,
                # the second finds the first one's loop, and ends.
                if thread.ident is not None:
                    self._thread = thread

    def _end(self) -> TransportError:
        """Why nothing is answered any more."""
        if self._crash is not None:
            return TransportCrashed(
                f"The I/O thread of this transport has failed: {self._crash!r}. Whether what was under way was done is "
                "not known; what is asked next gets another thread."
            )
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

    def survived(self, error: BaseException, *, doing: str) -> None:
        """Our own code has raised what it must not, and its caller has confined that to one call, or one channel."""
        logger.error("%s: an error of ekiden's own: %r", doing, error, exc_info=error)
        now = time.monotonic()
        self._survived.append(now)
        if len(self._survived) == SURVIVES and now - self._survived[0] < WITHIN_SECONDS:
            self.crashed(error)

    def crashed(self, error: BaseException) -> None:
        """Our own code has raised what it must not: the loop ends, and everyone who asks is told."""
        if self._crash is None:
            self._crash = error
            logger.critical("the I/O thread has failed: %r", error, exc_info=error)
        self.loop.stop()

    def _run(self) -> None:
        loop = IOLoop()
        with self._lock:
            if self._loop is not None or self._stopped:
                loop.close()
                return
            self._loop = loop
        try:
            loop.add_callback_threadsafe(self._work_off)
            loop.start()
        except BaseException as error:
            self._crash = error
            logger.critical("the I/O thread has failed: %r", error, exc_info=error)
        finally:
            with self._lock:
                self._stopped = True
            loop.close()
            self._tell_the_end()

    def _tell_the_end(self) -> None:
        for question in list(self._questions):
            question.answer(None, self._end())
        crash = self._end()
        if isinstance(crash, TransportCrashed):
            for call in list(self._at_crash):
                try:
                    call(crash)
                except Exception:
                    logger.exception("after the I/O thread had failed, it was not told to everybody")

    def _work_off(self) -> None:
        self._woken = False
        for _ in range(len(self._posted)):
            work = self._posted.popleft()
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - pika would take it for the connection's
                self.crashed(error)

    def _turned(self) -> None:
        self._asked_at = None

    def _begin(self, question: _Question[T], make: Callable[[], Work[T]]) -> None:
        try:
            reply = start(make())
        except Exception as error:  # noqa: BLE001 - it travels to who asks
            question.answer(None, error)
            return

        def answer() -> None:
            question.answer(None if reply.error else reply.result(), reply.error)

        reply.then(answer)

    def _guarded(self, call: Callable[[], None]) -> Callable[[], None]:
        """pika would take an exception for the connection's; ours ends the loop."""

        def guarded() -> None:
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - see above
                self.crashed(error)

        return guarded
