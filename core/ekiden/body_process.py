"""A process that runs one body at a time and owns no connection: as its worker sees it, and its own program.

    worker process                                body process (python -m ekiden.body_process)
      BodyProcess.run(...)  -- Begin, Run -->       main thread: executes the body
                            <-- Ask ---             the body sends tasks, tells progress, reads results
                            --- Answer -->
                            <-- Done ---

A body that must be ended is ended with its process; the worker keeps the delivery and says what became of it. When the
worker vanishes the pipe closes, and the body process ends at once. User code's standard output goes to standard error,
because standard output is the pipe; a body that finds the pipe and writes into it has failed.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, assert_never

import msgspec

from ekiden import hooks
from ekiden.body_frames import (
    Answer,
    Ask,
    AskBroadcast,
    AskDepth,
    AskExpect,
    AskForget,
    AskGet,
    AskPublish,
    AskPut,
    AskRead,
    AskScan,
    AskWait,
    AskWrite,
    Begin,
    Done,
    NoFrame,
    PublishedAnswer,
    Ready,
    Run,
    Unusable,
    read_from_body,
    to_json,
    write_frame,
)
from ekiden.body_relay import Channel, RelayBackend, RelayTransport
from ekiden.codec import decode_call, failure_record, type_name
from ekiden.errors import (
    EkidenError,
    MisuseError,
    NotRegistered,
    SoftTimeLimitExceeded,
    WorkerLostError,
)
from ekiden.execution import run, run_async
from ekiden.loggers import safe_logger
from ekiden.message import Message, Published
from ekiden.options import Policy
from ekiden.outcomes import Failed, Outcome
from ekiden.plan import exit_text
from ekiden.pools import is_users_code
from ekiden.request import Request, limits_of
from ekiden.safe_text import text_of
from ekiden.spawning import deaf_to, end_with_parent, ignore_interrupts, obey

if TYPE_CHECKING:
    from ekiden.app import Ekiden
    from ekiden.task import Task

logger = safe_logger(__name__)

Publish = Callable[[Sequence[Message], float | None], list[Published]]
"""Publishes messages, within so many seconds where that is said."""

_INTERRUPT_AGAIN_SECONDS = 0.01
_LONGEST_TIMER_SECONDS = 1e8


class BodyProcess:
    """One body process, as its worker sees it. ``run`` is called by one thread at a time; ``kill`` by any."""

    def __init__(self, target: str) -> None:
        with deaf_to(signal.SIGTERM, signal.SIGINT):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ekiden.body_process", target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(_search_path())},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._target = target
        self._to: BinaryIO = self._process.stdin  # type: ignore[assignment]
        self._from: BinaryIO = self._process.stdout  # type: ignore[assignment]

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait until the app is imported there. Raises WorkerLostError when it cannot be."""
        try:
            write_frame(self._to, Begin(self._target, list(sys.path), logging.getLogger().getEffectiveLevel()))
            frame = read_from_body(self._from)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None
        except NoFrame as error:
            self._process.kill()
            raise WorkerLostError(f"the body process could not start: {error}") from error
        match frame:
            case Ready():
                return
            case Unusable(reason=reason):
                raise WorkerLostError(f"the body process could not start: {reason}")
            case _:
                raise self._died()

    def run(self, frame: Run, answer: Callable[[Ask], Answer]) -> Outcome:
        """Execute a call there, answering what its body asks.

        Raises WorkerLostError when the process dies. Raises MisuseError when the call cannot be sent there, or what
        comes from there cannot be read: then the process is of no use any more.
        """
        try:
            write_frame(self._to, frame)
            while True:
                match read_from_body(self._from):
                    case Done(outcome=outcome):
                        return outcome
                    case None | Ready() | Unusable():
                        raise self._died()
                    case ask:
                        write_frame(self._to, answer(ask))
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None
        except NoFrame as error:
            self._process.kill()
            raise MisuseError(text_of(error)) from error

    def _died(self) -> WorkerLostError:
        self._process.kill()
        return WorkerLostError(f"the process that ran the body died: {exit_text(self._process.wait())}")

    def is_usable(self) -> bool:
        """Whether it can take the next call: it lives, and nothing came from it since the last one ended."""
        if not hasattr(select, "poll"):
            return self._process.poll() is None  # Windows: what came from it is noticed by the next call
        waiting = select.poll()
        waiting.register(self._from.fileno(), select.POLLIN)
        return not waiting.poll(0)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def close(self) -> None:
        """End it: it does so by itself when its pipe closes, and is killed if not within a second."""
        for stream in (self._to, self._from):
            try:
                stream.close()
            except OSError:
                continue  # what was still to be written cannot be: the process is gone
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _search_path() -> list[str]:
    return [each for each in sys.path if each]


def answer_ask(ask: Ask, publish: Publish, app: Ekiden) -> Answer:
    """Do for a body what it asked for, and say how that went. Raises nothing: a body may ask for anything."""
    try:
        return Answer(msgspec.Raw(to_json(_done(ask, publish, app))))
    except EkidenError as error:
        return Answer(error_kind=type(error).__name__, error=text_of(error))
    except Exception as error:
        logger.exception("a body process asked for what cannot be done")
        return Answer(error_kind=EkidenError.__name__, error=f"{type_name(type(error))}: {text_of(error)}")


def _published(answer: Published) -> PublishedAnswer:
    if answer.error is None:
        return PublishedAnswer(answer.outcome)
    return PublishedAnswer(answer.outcome, type(answer.error).__name__, text_of(answer.error))


def _deadline(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds


def _done(ask: Ask, publish: Publish, app: Ekiden) -> Any:
    match ask:
        case AskPublish():
            answers = publish(ask.messages, ask.seconds)
            return [_published(each) for each in answers]
        case AskBroadcast():
            return app.opened_transport().broadcast(ask.topic, ask.payloads)
        case AskDepth():
            return app.opened_transport().depth(ask.queue)
        case AskExpect():
            return app.opened_backend().expect(ask.ids, app.opened_transport, deadline=_deadline(ask.seconds))
        case AskPut():
            return app.opened_backend().put(ask.results)
        case AskGet():
            return app.opened_backend().get(ask.ids)
        case AskWait():
            return app.opened_backend().wait(ask.ids, ask.timeout)
        case AskForget():
            return app.opened_backend().forget(ask.ids, deadline=_deadline(ask.seconds))
        case AskRead():
            return app.opened_backend().read(ask.keys)
        case AskWrite():
            return app.opened_backend().write(
                ask.key, ask.value, expected_version=ask.expected_version, expires=ask.expires
            )
        case AskScan():
            return app.opened_backend().scan(ask.prefix)
        case _:
            assert_never(ask)


def main() -> None:
    """Run bodies until the pipe closes."""
    end_with_parent()
    ignore_interrupts()
    obey(signal.SIGTERM, None)  # it may be meant for the whole group of processes; the worker ends this one
    incoming = os.fdopen(os.dup(0), "rb")
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what user code prints must not get into the frames
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    channel = Channel(incoming, outgoing)
    threading.Thread(target=channel.read_for_ever, name="ekiden-pipe", daemon=True).start()
    begin = channel.next_frame()
    assert isinstance(begin, Begin)
    _configure_logging(begin.log_level)
    sys.path[:] = begin.search_path
    del sys.argv[1:]
    try:
        app = _load(begin.target, channel)
    except EkidenError as error:
        channel.tell(Unusable(str(error)))
        return
    hooks.worker_process_init.send(None)
    channel.tell(Ready())
    while True:
        _tell_outcome(channel, _outcome_of_next(app, channel))


def _outcome_of_next(app: Ekiden, channel: Channel) -> Outcome:
    """How the next call ended. What is wrong with the call itself ends it, and not this process."""
    try:
        frame = channel.next_frame()
        assert isinstance(frame, Run)
        return execute(app, frame)
    except BaseException as error:  # noqa: BLE001 - the worker waits for an outcome
        return Failed(failure_record(error, None))


def _tell_outcome(channel: Channel, outcome: Outcome) -> None:
    try:
        channel.tell(Done(outcome))
    except NoFrame as error:
        channel.tell(Done(Failed(failure_record(MisuseError(f"how it ended cannot be told: {error}"), None))))


def _load(target: str, channel: Channel) -> Ekiden:
    from ekiden.app import load_app

    app = load_app(target)
    app.adopt(
        RelayTransport(app.broker_url(), channel), RelayBackend(app.backend_url(), channel, stores=app.stores_results())
    )
    return app


def execute(app: Ekiden, frame: Run) -> Outcome:
    """Run the body of the call that ``frame`` carries, and say what happened."""
    message = frame.message
    call = decode_call(message.body, message.headers)
    task = app.find_task(call.task)
    if task is None:
        raise NotRegistered(f"{call.task} is a task in the worker, but not in its body process")
    policy = app.policy(task)
    limits = limits_of(call, policy)
    request = Request(
        call, message.queue, message.priority, frame.attempt, message.headers, frame.hostname, limits=limits
    )
    if task.is_async:
        from ekiden.event_loop import run_coroutine  # asyncio takes 40 ms to import, and not every task is async

        return run_coroutine(_execute_async(task, policy, request, frame.soft_time_limit))
    with SoftTimeLimit(frame.soft_time_limit):
        return run(task, policy, request)


async def _execute_async(
    task: Task[..., Any], policy: Policy, request: Request, soft_time_limit: float | None
) -> Outcome:
    from ekiden.event_loop import Interruptible

    body = Interruptible()
    body.after(soft_time_limit, body.interrupt, SoftTimeLimitExceeded())
    try:
        return await run_async(task, policy, request, body.run)
    finally:
        body.close()


class SoftTimeLimit:
    """Raises SoftTimeLimitExceeded in the main thread after some seconds, even out of a blocking call (POSIX)."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds if hasattr(signal, "setitimer") else None
        self._over = False

    def __enter__(self) -> None:
        if self._seconds is not None:
            signal.signal(signal.SIGALRM, self._exceeded)
            signal.setitimer(signal.ITIMER_REAL, min(self._seconds, _LONGEST_TIMER_SECONDS))

    def __exit__(self, *_: object) -> None:
        self._over = True  # a signal that has come already may be handled after this
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _exceeded(self, _number: int, frame: FrameType | None) -> None:
        if self._over:
            return
        if frame is not None and is_users_code(frame):
            raise SoftTimeLimitExceeded
        signal.setitimer(signal.ITIMER_REAL, _INTERRUPT_AGAIN_SECONDS)


def _configure_logging(level: int) -> None:
    if not logging.getLogger().handlers:
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


if __name__ == "__main__":
    main()
