"""The abstract Backend, where results and small records are kept; and AsyncResult, a task's result to come.

A backend stores bytes under task ids and keys and knows nothing of tasks. Every method takes a batch and answers
for each. The conformance kit (``ekiden.testing.conformance``) checks what the docstrings promise.
"""

from __future__ import annotations

import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar, cast

import msgspec

from ekiden.codec import OutcomeRecord, decode_outcome, decode_value
from ekiden.errors import BackendRefused, MisuseError, ResultTimeout, TaskError
from ekiden.failures import rebuild_exception
from ekiden.kinds import Kind
from ekiden.loggers import safe_logger
from ekiden.safe_text import is_storable
from ekiden.states import EXCEPTION_STATES, PROPAGATE_STATES, State, is_final
from ekiden.times import checked_timeout

if TYPE_CHECKING:
    from ekiden.futures import WaitingThread
    from ekiden.transport import Transport
    from ekiden.urls import BrokerURL

logger = safe_logger(__name__)

R_co = TypeVar("R_co", covariant=True)
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class StoredResult(msgspec.Struct, frozen=True, gc=False):
    """What a backend keeps of a task: its state, which try (``step``: 0 for the first) it is of, and encoded bytes.

    ``expires`` is how many seconds from the moment of storing it is kept; None is for ever.
    """

    task_id: str
    state: str
    step: int
    body: bytes
    expires: float | None = None


class Start(msgspec.Struct, frozen=True):
    """A worker is about to run try ``step`` of a task, out of the message ``message_id``. ``expires`` as above."""

    task_id: str
    step: int
    message_id: str
    expires: float | None = None


class BeginOutcome(Enum):
    """What a worker that asked to begin is to do.

    GO: run it. SECOND_COPY: another message of this same try, or a later try, has begun: settle and publish nothing.
    ENDED: this try's outcome is stored already: publish what follows from it again, settle, do not run.
    """

    GO = "go"
    SECOND_COPY = "second copy"
    ENDED = "ended"


class Begun(msgspec.Struct, frozen=True):
    """The answer for one start; ``result`` is what is stored when it ENDED, and None otherwise."""

    outcome: BeginOutcome
    result: StoredResult | None = None


class Joined(msgspec.Struct, frozen=True):
    """The answer to a member's arrival. ``complete`` is told to everyone who asks from then on.

    ``outcomes``: what each member brought, by member, once complete; empty before.
    """

    arrived: int
    complete: bool
    outcomes: dict[str, bytes] = {}


class Record(msgspec.Struct, frozen=True):
    """A small stored value. ``version`` is 1 when it was first written and rises with each write."""

    key: str
    value: bytes
    version: int


class Backend(ABC):
    """One result store, opened once per app and process.

    Made with the parsed URL. Every method may be called by any thread. Each raises BackendError when the store
    cannot be reached or is full, within its deadline; then none, some or all of the batch may have been done, and
    every method may safely be called again with the same arguments.

    Each raises BackendRefused, which is a BackendError, when the store will never take a value of the batch, whoever
    tries and however often: a body too large for it, an id too long, an id or key that is no text
    (``refuse_unstorable``). Then too, none, some or all of the others may have been done. The caller divides the batch
    until the culprit stands alone (``each_apart``), so a backend that finds a culprit need not do it itself. A batch
    that is too large only as a whole is never refused: the backend sends it in several requests. Nothing that an
    operator can mend is BackendRefused: a missing right, a wrong password, a full or read-only store.

    What is stored and cannot be read (another program's, damaged) is set aside: it is logged, taken for absent, and
    replaced by the next ``put`` or ``write``. It never raises out of a batch of others.
    """

    stores: bool = True
    """False for a backend that only passes results on (``rpc``): then ``put``, ``begin``, ``join`` and records are
    refused, and ``get`` and ``wait`` raise UnknownResult for tasks whose results cannot come here."""

    @abstractmethod
    def __init__(self, url: BrokerURL) -> None: ...

    if not TYPE_CHECKING:  # a type checker is to report a name that is not there

        def __getattr__(self, name: str) -> object:
            from ekiden.celery_names import missing_attribute  # only for a name that is not here

            raise missing_attribute("backend", self, name)

    def expect(
        self, ids: Sequence[str], transport: Callable[[], Transport], *, deadline: float | None = None
    ) -> str | None:
        """Asked before calls are sent: the queue that their results are to be sent to; None where they are stored.

        ``transport`` opens the one that results would come over. Raises BrokerUnavailable when there can be no such
        queue now, or none by ``deadline`` (``time.monotonic()`` seconds).
        """
        return None

    @abstractmethod
    def put(self, results: Sequence[StoredResult]) -> list[bool]:
        """Store each, unless its task's stored state may not be followed by it (``states.may_follow``): then False.

        Wakes whoever waits for these tasks. Within one batch they are stored in order.
        """

    @abstractmethod
    def get(self, ids: Sequence[str]) -> list[StoredResult | None]:
        """What is stored for each task id, in their order; None for what is not there or has expired.

        A task that has begun but stored nothing yet is told as STARTED with an empty body. Where what is stored for the
        only one of ``ids`` cannot be read, BackendError may say so.
        """

    @abstractmethod
    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        """Block until at least one of ``ids`` is final, and return every final one; none after ``timeout`` seconds.

        Any number of threads may wait at once. May return early with none (``wake``, ``close``).
        """

    @abstractmethod
    def wake(self) -> None:
        """Make every ``wait`` in progress in this process return now with what is final."""

    @abstractmethod
    def forget(self, ids: Sequence[str], *, deadline: float | None = None) -> None:
        """Delete what is stored for each; unknown ids are passed over.

        ``deadline`` (``time.monotonic()`` seconds): it ends by then, where that is sooner than the backend's own.
        """

    @abstractmethod
    def begin(self, starts: Sequence[Start]) -> list[Begun]:
        """The fence: say of each whether it may run, and note that it has begun when it may.

        Nothing noted for this task, or an earlier step: noted, GO. A later step noted or stored: SECOND_COPY. This
        step: ENDED when a RETRY or final state is stored for it; else SECOND_COPY when it was begun out of another
        message; else GO (the same message, handed out again). A final state stored at any earlier step is ENDED too.
        """

    @abstractmethod
    def join(self, join_id: str, member: str, outcome: bytes, *, size: int, expires: float | None) -> Joined:
        """Note that ``member``, of ``size`` members of ``join_id``, arrived with ``outcome``; once, however often."""

    @abstractmethod
    def read(self, keys: Sequence[str]) -> list[Record | None]:
        """The record under each key, in their order; None for what is not there or has expired."""

    @abstractmethod
    def write(
        self, key: str, value: bytes | None, *, expected_version: int | None = None, expires: float | None = None
    ) -> int | None:
        """Write (or with None delete) a record, and return its new version (0 when deleted).

        With ``expected_version``, only if that is its version now (0: it must not exist); else nothing is changed
        and None is returned. ``expires``: seconds from now until it vanishes; None is never.
        """

    @abstractmethod
    def scan(self, prefix: str) -> list[Record]:
        """Every record whose key begins with ``prefix``, sorted by key."""

    def warnings(self) -> list[str]:
        """What an operator should change at this store as it is set up now: one sentence each, for ``ekiden doctor``.

        Raises BackendError when the store cannot be asked.
        """
        return []

    @abstractmethod
    def close(self) -> None:
        """Close every connection and wake whoever waits. May be called again."""

    @abstractmethod
    def forget_connections(self) -> None:
        """In a forked child: drop every connection and lock without touching the parent's sockets or files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def refuse_unstorable(texts: Iterable[str]) -> None:
    """Raise BackendRefused if one of ``texts`` (ids, keys) is none that a store can hold; for every backend's doors.

    That is a lone surrogate, which UTF-8 cannot carry, or a zero byte, where many stores end a text.
    """
    for text in texts:
        if "\0" in text:
            raise BackendRefused(f"{text!r} holds a zero byte, and no result or record can be stored under that.")
        if not is_storable(text):
            raise BackendRefused(f"{text!r} holds a lone surrogate, and no result or record can be stored under that.")


def each_apart(do: Callable[[list[Item]], Sequence[Answer]], items: Sequence[Item]) -> list[Answer | BackendRefused]:
    """Do a batch, and where the store refuses it for good, its halves, until every culprit stands alone.

    ``do`` does some of ``items``, in their order, and answers for each. Returns its answers, and the refusal in place
    of the answer for what is refused. Raises every other BackendError.
    """
    if not items:
        return []
    try:
        return list(do(list(items)))
    except BackendRefused as refusal:
        if len(items) == 1:
            return [refusal]
    middle = len(items) // 2
    return each_apart(do, items[:middle]) + each_apart(do, items[middle:])


class ResultSource(Protocol):
    """Where an AsyncResult asks: an app."""

    def opened_backend(self) -> Backend:
        """The backend. Raises ConfigurationError for a URL that cannot work."""
        ...

    def waiting_thread(self) -> WaitingThread:
        """The thread that waits for all who await."""
        ...

    def revoke(self, task_id: str | Sequence[str], *, terminate: bool = False) -> None:
        """Have tasks not run, or end."""
        ...

    def return_kind(self, task_name: str | None) -> Kind | None:
        """What a task's function is annotated to return; None where that says nothing."""
        ...

    def check_may_wait(self, allow_join: bool) -> None:
        """Raise MisuseError when called inside a task."""
        ...


_LONGEST_WAIT = 60.0
_MAYBE_LOST = (
    " Or it has ended and its reply was lost: that is so when the broker lost the reply queue of this process (it was "
    "restarted, the queue deleted) or the connection to it for long. A backend that stores loses none."
)


known_sources: weakref.WeakSet[ResultSource] = weakref.WeakSet()
"""The apps of this process, so that ``AsyncResult(id)`` finds the one there is."""


def _only_source() -> ResultSource:
    sources = list(known_sources)
    if len(sources) == 1:
        return sources[0]
    there = "there is none" if not sources else f"there are {len(sources)}"
    raise MisuseError(f"AsyncResult(id) asks the app of this process, and {there}: write app.AsyncResult(id).")


class AsyncResult(Generic[R_co]):
    """The result of a task, now or later. ``get()`` or ``await`` it.

    Made by sending a call, by ``app.AsyncResult(id)``, or by ``AsyncResult(id)`` where the process has one app.

    Asking costs a trip to the backend; a final state is remembered and asked for once. Of a call whose result is
    ``ignored`` nothing is ever stored: ``get()`` and ``await`` give None at once.
    """

    def __init__(
        self,
        id: str,  # noqa: A002
        app: ResultSource | None = None,
        *,
        parent: AsyncResult[Any] | None = None,
        ignored: bool = False,
    ) -> None:
        self.id = id
        self.parent = parent
        self.ignored = ignored
        self._source = app if app is not None else _only_source()
        self._final: StoredResult | None = None

    def __repr__(self) -> str:
        return f"<AsyncResult {self.id}>"

    if not TYPE_CHECKING:  # a type checker is to report a name that is not there

        def __getattr__(self, name: str) -> object:
            from ekiden.celery_names import missing_attribute  # only for a name that is not here

            raise missing_attribute("result", self, name)

    def __str__(self) -> str:
        return self.id

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, AsyncResult) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    TimeoutError = ResultTimeout

    @property
    def app(self) -> ResultSource:
        """The app that it asks."""
        return self._source

    @property
    def backend(self) -> Backend:
        """The backend, opened when first asked for."""
        return self._source.opened_backend()

    @property
    def task_id(self) -> str:
        """The task's id."""
        return self.id

    @property
    def state(self) -> str:
        """PENDING (or never heard of), STARTED, RETRY, SUCCESS, FAILURE, REVOKED, EXPIRED, or a state of its own."""
        stored = self._stored()
        return State.PENDING.value if stored is None else stored.state

    status = state

    @property
    def result(self) -> Any:
        """What it returned; the exception if it failed; what it last told with ``update_state``; None before."""
        stored = self._stored()
        return None if stored is None else self._value_of(stored)

    info = result

    @property
    def traceback(self) -> str | None:
        """The worker's traceback as text, if it failed."""
        failure = self._record().failure
        return None if failure is None else failure.traceback

    @property
    def name(self) -> str | None:
        """The task's name, once something is stored."""
        return self._record().task

    @property
    def worker(self) -> str | None:
        """The worker process that ran it."""
        return self._record().worker

    @property
    def queue(self) -> str | None:
        """The queue that its message came from."""
        return self._record().queue

    @property
    def retries(self) -> int:
        """How many tries came before the last one."""
        return self._record().retries

    @property
    def date_done(self) -> datetime | None:
        """When its outcome was stored, in UTC."""
        done = self._record().done
        return None if done is None else datetime.fromtimestamp(done, UTC)

    @property
    def runtime(self) -> float | None:
        """How many seconds the body ran."""
        return self._record().runtime

    @property
    def children(self) -> list[AsyncResult[Any]]:
        """The results of the tasks that its body sent, and of those that followed it."""
        return [AsyncResult(each, self._source, parent=self) for each in self._record().children]

    def ready(self) -> bool:
        """Whether nothing more will happen to it."""
        return is_final(self.state)

    def successful(self) -> bool:
        """Whether it has returned."""
        return self.state == State.SUCCESS

    def failed(self) -> bool:
        """Whether it has failed for good."""
        return self.state == State.FAILURE

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float | None = None,
        *,
        allow_join: bool = False,
        disable_sync_subtasks: bool = True,
    ) -> R_co:
        """Wait for the result and return it.

        Raises what the task raised (unless ``propagate`` is False: then it is returned), TaskRevoked or TaskExpired
        for what never ran, and ResultTimeout after ``timeout`` seconds; 0 or less asks once. Inside a task it raises
        MisuseError unless ``allow_join``: tasks that wait for tasks can fill a worker and wait for ever.

        ``disable_sync_subtasks=False`` is Celery's way to say ``allow_join=True``; ``interval`` needs no value, since
        nothing polls.
        """
        if self.ignored:
            return cast("R_co", None)
        self._source.check_may_wait(allow_join or not disable_sync_subtasks)
        value: R_co = self._returned(self._waited(timeout), propagate)
        return value

    wait = get

    def __await__(self) -> Generator[Any, None, R_co]:
        if self.ignored:
            return cast("R_co", None)
        stored = self._final
        if stored is None:
            self._check_can_come()
            stored = yield from self._source.waiting_thread().wait(self.id).__await__()
            self._final = stored
        value: R_co = self._returned(stored, propagate=True)
        return value

    def then(self, callback: Callable[[AsyncResult[R_co]], object]) -> AsyncResult[R_co]:
        """Call ``callback(self)`` once it is ready, in the thread that waits for results; quick callbacks only.

        A callback that fails is logged: the thread waits for others, too, and nobody is there to be told. So is one
        that will not be called: the store cannot be asked, or 100,000 others came after it. None is called once the
        app is closed.
        """

        def finish(stored: StoredResult | None, error: Exception | None) -> None:
            if isinstance(error, MisuseError):
                return  # the app was closed
            if stored is None:
                logger.warning("%s: the callback %r will not be called: %s", self.id, callback, error)
            else:
                self._final = stored
                try:
                    callback(self)
                except BaseException:  # sys.exit(), too: it is the thread of all who wait
                    logger.exception("%s: the callback %r failed", self.id, callback)

        self._check_can_come()
        self._source.waiting_thread().call_when_final(self.id, finish)
        return self

    def collect(
        self, timeout: float | None = None, *, propagate: bool = True
    ) -> Iterator[tuple[AsyncResult[Any], Any]]:
        """Wait for this result, then for those of its children, and theirs: (result, value), breadth first."""
        seconds = checked_timeout(timeout)
        deadline = None if seconds is None else time.monotonic() + seconds
        waiting: list[AsyncResult[Any]] = [self]
        while waiting:
            result = waiting.pop(0)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            yield result, result.get(left, propagate=propagate)
            waiting.extend(result.children)

    def forget(self) -> None:
        """Delete what is stored of it."""
        self._source.opened_backend().forget([self.id])
        self._final = None

    def revoke(self, *, terminate: bool = False, signal: str | None = None) -> None:
        """Have it not run; with ``terminate``, end it if it is running.

        ``signal`` is Celery's and changes nothing: a worker ends a body by the means of where it runs.
        """
        self._source.revoke(self.id, terminate=terminate)

    def maybe_throw(self) -> Any:
        """Raise what the task raised, if it has failed; else return its result, or None before there is one."""
        stored = self._stored()
        return None if stored is None else self._returned(stored, propagate=True)

    maybe_reraise = maybe_throw

    def _stored(self) -> StoredResult | None:
        if self._final is not None:
            return self._final
        (stored,) = self._source.opened_backend().get([self.id])
        if stored is not None and is_final(stored.state):
            self._final = stored
        return stored

    def _check_can_come(self) -> None:
        """Raise UnknownResult, here rather than in the thread that waits, where no result can come."""
        backend = self._source.opened_backend()
        if not backend.stores:
            backend.get([self.id])

    def _record(self) -> OutcomeRecord:
        stored = self._stored()
        return OutcomeRecord() if stored is None else decode_outcome(stored.body)

    def _waited(self, timeout: float | None) -> StoredResult:
        if self._final is not None:
            return self._final
        backend = self._source.opened_backend()
        seconds = checked_timeout(timeout)
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = _LONGEST_WAIT if deadline is None else deadline - time.monotonic()
            for stored in backend.wait([self.id], min(max(left, 0.0), _LONGEST_WAIT)):
                self._final = stored
                return stored
            if deadline is not None and time.monotonic() >= deadline:
                raise ResultTimeout(
                    f"task {self.id} had not ended after {seconds:g} s; it is {self.state} and goes on; ask later."
                    + ("" if backend.stores else _MAYBE_LOST)
                )

    def _value_of(self, stored: StoredResult) -> Any:
        record = decode_outcome(stored.body)
        if record.failure is not None and stored.state in EXCEPTION_STATES:
            return rebuild_exception(record.failure)
        # A function may return what its annotation does not say.
        return decode_value(
            record.value, self._source.return_kind(record.task) if stored.state == State.SUCCESS else None
        )

    def _returned(self, stored: StoredResult, propagate: bool) -> Any:
        value = self._value_of(stored)
        if propagate and stored.state in PROPAGATE_STATES:
            error = value if isinstance(value, BaseException) else TaskError(f"task {self.id} is {stored.state}")
            text = decode_outcome(stored.body).failure
            if text is not None and text.traceback:
                # A class of a user's may have an add_note() of its own, or refuse notes.
                with suppress(Exception):
                    BaseException.add_note(error, f"In the worker:\n{text.traceback}")
            raise error
        return value


class EagerResult(AsyncResult[R_co]):
    """The result of ``task.apply()``: there already."""

    def __init__(self, id: str, app: ResultSource, stored: StoredResult) -> None:  # noqa: A002
        super().__init__(id, app)
        self._final = stored

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float | None = None,
        *,
        allow_join: bool = False,
        disable_sync_subtasks: bool = True,
    ) -> R_co:
        """What it returned, or raise what it raised; never waits."""
        assert self._final is not None
        value: R_co = self._returned(self._final, propagate)
        return value

    def forget(self) -> None:
        """Nothing is stored of it."""

    def revoke(self, *, terminate: bool = False, signal: str | None = None) -> None:
        """It has run already."""
