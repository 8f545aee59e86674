"""The body process's end of the pipe: a transport and a backend that have the worker do what they are asked."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import msgspec

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
    UnreadableFrame,
    Unusable,
    read_to_body,
    write_frame,
)
from ekiden.errors import (
    BackendError,
    BackendRefused,
    BrokerRefused,
    BrokerUnavailable,
    ConfigurationError,
    EkidenError,
    MisuseError,
    TransportError,
    UnknownResult,
)
from ekiden.loggers import safe_logger
from ekiden.message import Depth, Message, Published, Seen
from ekiden.plan import EXIT_DONE, EXIT_FAILED
from ekiden.results import Backend, Begun, Joined, Record, Start, StoredResult
from ekiden.safe_text import text_of
from ekiden.transport import Consumer, Listener, Transport, TransportDescription

if TYPE_CHECKING:
    from ekiden.urls import BrokerURL


logger = safe_logger(__name__)

_ERRORS: dict[str, type[EkidenError]] = {
    kind.__name__: kind
    for kind in (
        BrokerUnavailable,
        BrokerRefused,
        TransportError,
        BackendError,
        BackendRefused,
        UnknownResult,
        ConfigurationError,
    )
}


class Channel:
    """The body's end of the pipe. One thread reads; a body's threads may ask, one at a time.

    ``ended`` is called when the worker is gone or the pipe to it closed, just before this process ends.
    """

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO, *, ended: Callable[[], object]) -> None:
        self._ended = ended
        self._incoming = incoming
        self._outgoing = outgoing
        self._asking = threading.Lock()
        self._awaits_answer = False
        self._answers: SimpleQueue[Answer] = SimpleQueue()
        self._runs: SimpleQueue[Begin | Run | UnreadableFrame] = SimpleQueue()

    def read_for_ever(self) -> NoReturn:
        """Hand on what comes in. At the end of the pipe the worker is gone, and so is this process, at once."""
        while True:
            frame: Answer | Begin | Run | UnreadableFrame | None
            try:
                frame = read_to_body(self._incoming)
            except UnreadableFrame as error:
                frame = Answer(error_kind=EkidenError.__name__, error=str(error)) if self._awaits_answer else error
            except (NoFrame, OSError) as error:
                logger.critical("this body process ends: %s", error)
                os._exit(1)
            if frame is None:
                self._end(EXIT_DONE)
            if isinstance(frame, Answer):
                self._answers.put(frame)
            else:
                self._runs.put(frame)

    def next_frame(self) -> Begin | Run:
        """What to do next. Raises UnreadableFrame for what cannot be understood."""
        frame = self._runs.get()
        if isinstance(frame, UnreadableFrame):
            raise frame
        return frame

    def tell(self, frame: Done | Ready | Unusable) -> None:
        """Tell the worker how it went. Where user code has closed the pipe, nobody can be told: this process ends."""
        try:
            with self._asking:
                write_frame(self._outgoing, frame)
        except OSError as error:
            logger.critical("this body process ends: the pipe to its worker is closed, maybe by the task: %s", error)
            self._end(EXIT_FAILED)

    def ask(self, frame: Ask, kind: Any, deadline: float | None = None) -> Any:
        """Ask the worker, and return its answer as ``kind``. Raises the error that it met.

        ``deadline`` (on the monotonic clock): for what has one. Raises MisuseError for what cannot be sent to the
        worker.
        """
        if not self._asking.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            raise BrokerUnavailable("Another thread of this body was asking the worker until the call had to end.")
        try:
            if isinstance(frame, AskPublish | AskExpect | AskForget):
                frame = msgspec.structs.replace(frame, seconds=_seconds_until(deadline))
            self._awaits_answer = True
            try:
                write_frame(self._outgoing, frame)
                answer = self._answers.get()
            except NoFrame as error:
                raise MisuseError(text_of(error)) from error
            finally:
                self._awaits_answer = False
        finally:
            self._asking.release()
        if answer.error_kind is not None:
            raise _ERRORS.get(answer.error_kind, EkidenError)(answer.error)
        return msgspec.json.decode(answer.value, type=kind)

    def _end(self, code: int) -> NoReturn:
        self._ended()
        os._exit(code)


def _error_in(answer: PublishedAnswer) -> EkidenError | None:
    kind = answer.error_kind
    return None if kind is None else _ERRORS.get(kind, TransportError)(answer.error)


def _seconds_until(deadline: float | None) -> float | None:
    """What is left until ``deadline``: the worker's clock is its own."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


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
        names_duplicates=False,  # the worker's broker may not; what rests on it is done the careful way
    )

    def __init__(self, url: BrokerURL, channel: Channel) -> None:
        self._url = url
        self._channel = channel

    def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
        """Have the worker publish."""
        answers = self._channel.ask(AskPublish(list(messages)), list[PublishedAnswer], deadline)
        return [Published(each.outcome, _error_in(each)) for each in answers]

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

    def __init__(self, url: BrokerURL, channel: Channel, *, stores: bool) -> None:
        self.stores = stores
        self._url = url
        self._channel = channel

    def expect(
        self, ids: Sequence[str], transport: Callable[[], Transport], *, deadline: float | None = None
    ) -> str | None:
        """Have the worker await the results."""
        found: str | None = self._channel.ask(AskExpect(list(ids)), str | None, deadline)
        return found

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

    def forget(self, ids: Sequence[str], *, deadline: float | None = None) -> None:
        """Have the worker delete."""
        self._channel.ask(AskForget(list(ids)), None, deadline)

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
