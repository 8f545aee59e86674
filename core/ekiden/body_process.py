"""A process that runs one body at a time and owns no connection: both ends of its pipe.

    worker process                                body process (python -m ekiden.body_process)
      BodyProcess.run(...)  -- Begin, Run -->       main thread: executes the body
                            <-- Ask ---             the body sends tasks, tells progress, reads results
                            --- Answer -->
                            <-- Done ---

A body that must be ended is ended with its process; the worker keeps the delivery and says what became of it. When the
worker vanishes the pipe closes, and the body process ends at once. Frames are a four-byte length and JSON; user
code's standard output goes to standard error, because standard output is the pipe.
"""

from __future__ import annotations

import logging
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, assert_never

import msgspec

from ekiden.codec import decode_call
from ekiden.errors import (
    BackendError,
    BrokerRefused,
    BrokerUnavailable,
    EkidenError,
    MisuseError,
    SoftTimeLimitExceeded,
    TransportError,
    WorkerLostError,
)
from ekiden.execution import Outcome, Request, run, run_async
from ekiden.message import Depth, Message, Published, PublishOutcome, Seen
from ekiden.plan import exit_text
from ekiden.pools import is_users_code
from ekiden.results import Backend, Begun, Joined, Record, Start, StoredResult
from ekiden.spawning import deaf_to, end_with_parent, ignore_interrupts, obey
from ekiden.transport import Consumer, Listener, Transport, TransportDescription

if TYPE_CHECKING:
    from ekiden.app import Ekiden
    from ekiden.urls import BrokerURL

logger = logging.getLogger(__name__)

_INTERRUPT_AGAIN_SECONDS = 0.01
_LENGTH = struct.Struct("!I")


# Frames.


class Begin(msgspec.Struct, frozen=True, tag=True):
    """The first frame: which app to import, and from where."""

    target: str
    search_path: list[str]
    log_level: int


class Run(msgspec.Struct, frozen=True, tag=True):
    """Execute the call that this message carries; ``soft_time_limit`` in seconds."""

    message: Message
    attempt: int
    hostname: str
    soft_time_limit: float | None


class Done(msgspec.Struct, frozen=True, tag=True):
    """How it ended."""

    outcome: Outcome


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The app is imported: bodies can run."""


class Unusable(msgspec.Struct, frozen=True, tag=True):
    """The app could not be imported there."""

    reason: str


class AskPublish(msgspec.Struct, frozen=True, tag=True):
    """``Transport.publish``."""

    messages: list[Message]


class AskBroadcast(msgspec.Struct, frozen=True, tag=True):
    """``Transport.broadcast``."""

    topic: str
    payloads: list[bytes]


class AskDepth(msgspec.Struct, frozen=True, tag=True):
    """``Transport.depth``."""

    queue: str


class AskPut(msgspec.Struct, frozen=True, tag=True):
    """``Backend.put``."""

    results: list[StoredResult]


class AskGet(msgspec.Struct, frozen=True, tag=True):
    """``Backend.get``."""

    ids: list[str]


class AskWait(msgspec.Struct, frozen=True, tag=True):
    """``Backend.wait``."""

    ids: list[str]
    timeout: float


class AskForget(msgspec.Struct, frozen=True, tag=True):
    """``Backend.forget``."""

    ids: list[str]


class AskRead(msgspec.Struct, frozen=True, tag=True):
    """``Backend.read``."""

    keys: list[str]


class AskWrite(msgspec.Struct, frozen=True, tag=True):
    """``Backend.write``."""

    key: str
    value: bytes | None
    expected_version: int | None
    expires: float | None


class AskScan(msgspec.Struct, frozen=True, tag=True):
    """``Backend.scan``."""

    prefix: str


Ask = AskPublish | AskBroadcast | AskDepth | AskPut | AskGet | AskWait | AskForget | AskRead | AskWrite | AskScan


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What was asked for, encoded; or the kind and text of the error."""

    value: msgspec.Raw = msgspec.Raw(b"null")
    error_kind: str | None = None
    error: str = ""


class PublishedAnswer(msgspec.Struct, frozen=True):
    """A ``Published`` whose error has become text."""

    outcome: PublishOutcome
    error: str | None = None


ToBody = Begin | Run | Answer
FromBody = Done | Ready | Unusable | Ask

_encode = msgspec.json.Encoder().encode
_to_body = msgspec.json.Decoder(ToBody)
_from_body = msgspec.json.Decoder(FromBody)


def write_frame(stream: BinaryIO, frame: ToBody | FromBody) -> None:
    """Write one frame. Raises OSError (BrokenPipeError) when nobody reads any more."""
    body = _encode(frame)
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame's body, or None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length)
    return body if len(body) == length else None


# The worker's end.


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
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None
        match self._next():
            case Ready():
                return
            case Unusable(reason=reason):
                raise WorkerLostError(f"the body process could not start: {reason}")
            case _:
                raise self._died()

    def run(self, frame: Run, answer: Callable[[Ask], Answer]) -> Outcome:
        """Execute a call there, answering what its body asks. Raises WorkerLostError when the process dies."""
        try:
            write_frame(self._to, frame)
            while True:
                match self._next():
                    case Done(outcome=outcome):
                        return outcome
                    case None | Ready() | Unusable():
                        raise self._died()
                    case ask:
                        write_frame(self._to, answer(ask))
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None

    def _next(self) -> FromBody | None:
        body = read_frame(self._from)
        return None if body is None else _from_body.decode(body)

    def _died(self) -> WorkerLostError:
        self._process.kill()
        return WorkerLostError(f"the process that ran the body died: {exit_text(self._process.wait())}")

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


def answer_ask(ask: Ask, publish: Callable[[Sequence[Message]], list[Published]], app: Ekiden) -> Answer:
    """Do for a body what it asked for, and say how that went."""
    try:
        return Answer(msgspec.Raw(_encode(_done(ask, publish, app))))
    except EkidenError as error:
        return Answer(error_kind=type(error).__name__, error=str(error))


def _done(ask: Ask, publish: Callable[[Sequence[Message]], list[Published]], app: Ekiden) -> Any:
    match ask:
        case AskPublish():
            answers = publish(ask.messages)
            return [PublishedAnswer(each.outcome, None if each.error is None else str(each.error)) for each in answers]
        case AskBroadcast():
            return app.opened_transport().broadcast(ask.topic, ask.payloads)
        case AskDepth():
            return app.opened_transport().depth(ask.queue)
        case AskPut():
            return app.opened_backend().put(ask.results)
        case AskGet():
            return app.opened_backend().get(ask.ids)
        case AskWait():
            return app.opened_backend().wait(ask.ids, ask.timeout)
        case AskForget():
            return app.opened_backend().forget(ask.ids)
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


# The body's end.

_ERRORS: dict[str, type[EkidenError]] = {
    kind.__name__: kind for kind in (BrokerUnavailable, BrokerRefused, TransportError, BackendError)
}


class Channel:
    """The body's end of the pipe. One thread reads; a body's threads may ask, one at a time."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._asking = threading.Lock()
        self._answers: SimpleQueue[Answer] = SimpleQueue()
        self._runs: SimpleQueue[Begin | Run] = SimpleQueue()

    def read_for_ever(self) -> NoReturn:
        """Hand on what comes in. At the end of the pipe the worker is gone, and so is this process, at once."""
        while (body := read_frame(self._incoming)) is not None:
            match _to_body.decode(body):
                case Answer() as answer:
                    self._answers.put(answer)
                case frame:
                    self._runs.put(frame)
        os._exit(0)

    def next_frame(self) -> Begin | Run:
        """What to do next."""
        return self._runs.get()

    def tell(self, frame: Done | Ready | Unusable) -> None:
        """Tell the worker how it went."""
        with self._asking:
            write_frame(self._outgoing, frame)

    def ask(self, frame: Ask, kind: Any) -> Any:
        """Ask the worker, and return its answer as ``kind``. Raises the error that it met."""
        with self._asking:
            write_frame(self._outgoing, frame)
            answer = self._answers.get()
        if answer.error_kind is not None:
            raise _ERRORS.get(answer.error_kind, EkidenError)(answer.error)
        return msgspec.json.decode(answer.value, type=kind)


class RelayTransport(Transport):
    """Publishes through the worker. What only a connection of one's own can do is refused."""

    description = TransportDescription(
        summary="the worker's connection, from a body process",
        durability="the worker's broker's",
        hand_over="the worker's broker's",
        wake_up="none",
        shortest_lease=0.0,
        dead_consumer_noticed_within=0.0,
        wakes_within=0.0,
    )

    def __init__(self, url: BrokerURL, channel: Channel) -> None:
        self._url = url
        self._channel = channel

    def publish(self, messages: Sequence[Message]) -> list[Published]:
        """Have the worker publish."""
        answers = self._channel.ask(AskPublish(list(messages)), list[PublishedAnswer])
        return [Published(each.outcome, None if each.error is None else TransportError(each.error)) for each in answers]

    def broadcast(self, topic: str, payloads: Sequence[bytes]) -> None:
        """Have the worker broadcast."""
        self._channel.ask(AskBroadcast(topic, list(payloads)), None)

    def depth(self, queue: str) -> Depth:
        """Have the worker count."""
        found: Depth = self._channel.ask(AskDepth(queue), Depth)
        return found

    def consumer(
        self, queues: Sequence[str], *, lease: float, prefetch: int, name: str, strict: bool = False
    ) -> Consumer:
        """Refused."""
        raise self._refusal("consume from a queue")

    def browse(self, queue: str, *, after: str | None = None, limit: int = 100) -> list[Seen]:
        """Refused."""
        raise self._refusal("browse a queue")

    def purge(self, queue: str) -> int:
        """Refused."""
        raise self._refusal("purge a queue")

    def listen(self, topic: str) -> Listener:
        """Refused."""
        raise self._refusal("listen to a topic")

    def close(self) -> None:
        """Nothing is open here."""

    def forget(self) -> None:
        """Nothing is open here."""

    def _refusal(self, what: str) -> MisuseError:
        return MisuseError(
            f"a body process owns no connection, so it cannot {what}; open one by ekiden.connect({str(self._url)!r}), "
            "or run the task with pool='thread'."
        )


class RelayBackend(Backend):
    """Stores and reads through the worker."""

    def __init__(self, url: BrokerURL, channel: Channel) -> None:
        self._url = url
        self._channel = channel

    def put(self, results: Sequence[StoredResult]) -> list[bool]:
        """Have the worker store."""
        found: list[bool] = self._channel.ask(AskPut(list(results)), list[bool])
        return found

    def get(self, ids: Sequence[str]) -> list[StoredResult | None]:
        """Have the worker look."""
        found: list[StoredResult | None] = self._channel.ask(AskGet(list(ids)), list[StoredResult | None])
        return found

    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        """Have the worker wait."""
        found: list[StoredResult] = self._channel.ask(AskWait(list(ids), timeout), list[StoredResult])
        return found

    def wake(self) -> None:
        """Not needed: a wait is one question."""

    def forget(self, ids: Sequence[str]) -> None:
        """Have the worker delete."""
        self._channel.ask(AskForget(list(ids)), None)

    def begin(self, starts: Sequence[Start]) -> list[Begun]:
        """Refused: only workers begin."""
        raise MisuseError("only a worker asks whether a task may begin.")

    def join(self, join_id: str, member: str, outcome: bytes, *, size: int, expires: float | None) -> Joined:
        """Refused: only workers join."""
        raise MisuseError("only a worker notes that a member has arrived.")

    def read(self, keys: Sequence[str]) -> list[Record | None]:
        """Have the worker read."""
        found: list[Record | None] = self._channel.ask(AskRead(list(keys)), list[Record | None])
        return found

    def write(
        self, key: str, value: bytes | None, *, expected_version: int | None = None, expires: float | None = None
    ) -> int | None:
        """Have the worker write."""
        found: int | None = self._channel.ask(AskWrite(key, value, expected_version, expires), int | None)
        return found

    def scan(self, prefix: str) -> list[Record]:
        """Have the worker scan."""
        found: list[Record] = self._channel.ask(AskScan(prefix), list[Record])
        return found

    def close(self) -> None:
        """Nothing is open here."""

    def forget_connections(self) -> None:
        """Nothing is open here."""


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
    channel.tell(Ready())
    while True:
        frame = channel.next_frame()
        assert isinstance(frame, Run)
        channel.tell(Done(execute(app, frame)))


def _load(target: str, channel: Channel) -> Ekiden:
    from ekiden.app import load_app

    app = load_app(target)
    app.adopt(RelayTransport(app.broker_url(), channel), RelayBackend(app.backend_url(), channel))
    return app


def execute(app: Ekiden, frame: Run) -> Outcome:
    """Run the body of the call that ``frame`` carries, and say what happened."""
    message = frame.message
    call = decode_call(message.body, message.headers)
    task = app.find_task(call.task)
    assert task is not None, f"{call.task} is a task in the worker, but not in its body process"
    policy = app.policy(task)
    request = Request(call, message.queue, message.priority, frame.attempt, message.headers, frame.hostname)
    if task.is_async:
        import asyncio  # 40 ms to import, and only for tasks that are async

        return asyncio.run(run_async(task, policy, request))
    with SoftTimeLimit(frame.soft_time_limit):
        return run(task, policy, request)


class SoftTimeLimit:
    """Raises SoftTimeLimitExceeded in the main thread after some seconds, even out of a blocking call (POSIX)."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds if hasattr(signal, "setitimer") else None

    def __enter__(self) -> None:
        if self._seconds is not None:
            signal.signal(signal.SIGALRM, self._exceeded)
            signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_: object) -> None:
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @staticmethod
    def _exceeded(_number: int, frame: FrameType | None) -> None:
        if frame is not None and is_users_code(frame):
            raise SoftTimeLimitExceeded
        signal.setitimer(signal.ITIMER_REAL, _INTERRUPT_AGAIN_SECONDS)


def _configure_logging(level: int) -> None:
    if not logging.getLogger().handlers:
        logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


if __name__ == "__main__":
    main()
