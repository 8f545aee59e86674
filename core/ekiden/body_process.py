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

import contextlib
import contextvars
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, assert_never

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
    Stream,
    Unusable,
    read_from_body,
    to_json,
    write_frame,
)
from ekiden.body_relay import Channel, RelayBackend, RelayTransport
from ekiden.codec import decode_call
from ekiden.descendants import HAVE_GROUPS_INSTEAD, end_descendants
from ekiden.errors import (
    EkidenError,
    MisuseError,
    NotRegistered,
    SoftTimeLimitExceeded,
    WorkerLostError,
)
from ekiden.execution import run, run_async
from ekiden.failures import failure_record, type_name
from ekiden.loggers import safe_logger
from ekiden.logs import format_of, logging_of_program
from ekiden.message import Message, Published
from ekiden.modules import what_failed
from ekiden.options import Policy
from ekiden.outcomes import Failed, Outcome
from ekiden.plan import EXIT_UNUSABLE, exit_text
from ekiden.pools import is_users_code
from ekiden.process_pipe import ProcessPipe, wait_without_reaping
from ekiden.request import Request, limits_of
from ekiden.safe_text import text_of
from ekiden.spawning import (
    BODY_MARK,
    STOP_SIGNALS,
    deaf_to,
    end_process,
    end_with_parent,
    ignore_interrupts,
    marked,
    obey,
    take_standard_input,
)

if TYPE_CHECKING:
    from ekiden.app import Ekiden
    from ekiden.task import Task

logger = safe_logger(__name__)

Publish = Callable[[Sequence[Message], float | None], list[Published]]
"""Publishes messages, within so many seconds where that is said."""

_INTERRUPT_AGAIN_SECONDS = 0.01
_LONGEST_TIMER_SECONDS = 1e8


class BodyProcess:
    """One body process, as its worker sees it. ``run`` is called by one thread at a time; ``kill`` by any.

    What its bodies have started ends with it. ``_ending`` guards its number, which may be another process's as soon as
    it has been waited for.
    """

    def __init__(self, target: str) -> None:
        self._mark = os.urandom(8).hex()
        import subprocess  # most worker processes start none

        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_search_path())}
        with deaf_to(*STOP_SIGNALS, signal.SIGINT):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ekiden.body_process", target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=marked(environment, BODY_MARK, self._mark),
                process_group=0 if HAVE_GROUPS_INSTEAD else None,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._target = target
        self._ending = threading.Lock()
        self._is_gone = False
        self._to: Stream = self._process.stdin
        self._from: Stream = self._process.stdout
        self._pipe: ProcessPipe | None = None
        if hasattr(select, "poll"):
            self._pipe = ProcessPipe(self._process)
            self._to = self._from = self._pipe

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait until the app is imported there. Raises WorkerLostError when it cannot be."""
        root = logging.getLogger()
        begin = Begin(self._target, list(sys.path), root.getEffectiveLevel(), format_of(root))
        try:
            write_frame(self._to, begin)
            frame = read_from_body(self._from)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None
        except NoFrame as error:
            self.kill()
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
            self.kill()
            raise MisuseError(text_of(error)) from error

    def _died(self) -> WorkerLostError:
        self.kill()
        return WorkerLostError(f"the process that ran the body died: {exit_text(self._wait())}")

    def is_usable(self) -> bool:
        """Whether it can take the next call: it lives, and nothing came from it since the last one ended."""
        if self._pipe is None:
            return self._process.poll() is None  # Windows: what came from it is noticed by the next call
        return self._pipe.is_quiet()

    def kill(self) -> None:
        """End it at once, and what its bodies have started."""
        with self._ending:
            if self._is_gone:
                return
            if HAVE_GROUPS_INSTEAD:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._signal("SIGSTOP")  # from now on it starts nothing, and its children are still its children
            try:
                end_descendants(self._process.pid, BODY_MARK, self._mark)
            except OSError as error:
                logger.error("what body process %d has started may live on: %s", self._process.pid, error)
            self._signal("SIGKILL")

    def _signal(self, name: str) -> None:
        """Popen's own methods may wait for it, and then its number is free."""
        with contextlib.suppress(ProcessLookupError):
            if hasattr(signal, name):
                os.kill(self._process.pid, getattr(signal, name))
            elif name == "SIGKILL":
                self._process.kill()

    def _wait(self) -> int:
        """Wait for its end, which is certain; what it leaves behind ends with it."""
        self.kill()
        wait_without_reaping(self._process.pid)
        with self._ending:
            self._is_gone = True
            return self._process.wait()

    def close(self) -> None:
        """End it, and what its bodies have started. May be called again."""
        self._wait()
        for stream in (self._to, self._from):
            try:
                stream.close()
            except OSError:
                continue  # what was still to be written cannot be: the process is gone


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
    for number in STOP_SIGNALS:
        obey(number, None)  # it may be meant for every process of the worker, which ends this one
    incoming = take_standard_input()
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what user code prints must not get into the frames
    mark = os.environ.get(BODY_MARK, "")
    channel = Channel(incoming, outgoing, ended=lambda: end_descendants(os.getpid(), BODY_MARK, mark))
    threading.Thread(target=channel.read_for_ever, name="ekiden-pipe", daemon=True).start()
    begin = channel.next_frame()
    assert isinstance(begin, Begin)
    sys.path[:] = begin.search_path
    del sys.argv[1:]
    try:
        with logging_of_program(begin.log_level, begin.log_format):
            app = _load(begin.target, channel)
    except BaseException as error:  # noqa: BLE001 - the worker waits for an answer
        channel.tell(Unusable(text_of(error) if isinstance(error, EkidenError) else what_failed(error)))
        end_process(EXIT_UNUSABLE)
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
        # In a context of its own: context variables, and so the decimal context, are as in a new thread.
        return contextvars.Context().run(run, task, policy, request)


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


if __name__ == "__main__":
    main()
