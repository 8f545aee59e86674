"""Every error that ekiden raises, classed by whose move it is.

    EkidenError
    |- ConfigurationError     yours, before anything ran: a URL, a setting, a declaration, a module
    |- TaskArgumentsError     yours, at the call (also a TypeError)
    |- TransportError         the broker's
    |  |- BrokerUnavailable   it may work when tried again: down, full, silent, locked
    |  |- BrokerRefused       it will not: no such right, too large, not a broker
    |  |- TransportCrashed    our own code failed on a thread of the transport: a bug
    |  '- TransportClosed     this side has been closed already
    |- BackendError           the result backend's
    |  |- BackendRefused      it will never take this value: too large, not storable
    |  '- UnknownResult       yours: asked in a process that the result cannot come to
    |- TaskError              the task's failure, told to whoever waits for the result
    |  |- TaskRevoked, TaskExpired, TaskRejected, WorkerLostError, TimeLimitExceeded, ...
    '- MessageError           a message that cannot be understood; it is dead-lettered

``SoftTimeLimitExceeded``, ``Ignore``, ``Reject`` and ``Retry`` are raised inside a task's body.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime


class EkidenError(Exception):
    """The root of every error that ekiden raises on purpose."""


# Yours, before anything ran.


class ConfigurationError(EkidenError):
    """A URL, setting, option or declaration that cannot work; the message says where and what to write instead."""


class NotRegistered(ConfigurationError, KeyError):
    """A task name that this app does not know."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class TaskArgumentsError(EkidenError, TypeError):
    """The arguments of a call do not fit the function that was declared, or cannot be carried in a message."""


class MisuseError(EkidenError, RuntimeError):
    """A call made where it cannot work, such as ``.get()`` inside a task or ``.delay()`` without an app."""


# The broker's and the backend's.


class TransportError(EkidenError):
    """Trouble with the broker."""


class BrokerUnavailable(TransportError):
    """The broker did not do it now, and may when tried again: unreachable, full, locked, silent."""


class BrokerRefused(TransportError):
    """The broker will not do it however often it is tried: not permitted, too large, not understood."""


class TransportCrashed(TransportError):
    """Code of the transport itself failed on a thread of its own: a bug, and not the broker's trouble.

    What was under way there may or may not have been done. A consumer or listener that raises this is of no use any
    more; what is opened or published next gets a new thread.
    """


class TransportClosed(TransportError):
    """A transport, consumer or listener was used after it had been closed."""


TRANSPORT_IS_GONE = (TransportCrashed, TransportClosed)
"""What no waiting mends: the consumer or listener that raises one of these will never do anything any more."""


class BackendError(EkidenError):
    """Trouble with the result backend: unreachable, full, or asked for what it cannot do."""


class BackendRefused(BackendError):
    """The result backend will never take this value, whoever tries and however often: too large, or not storable.

    It is about the value alone. What an operator can mend (a missing right, a wrong password, a full or read-only
    store) is a plain BackendError: the same value may be stored afterwards.
    """


class UnknownResult(BackendError):
    """No result of these tasks can come to this process, because its backend stores none (``rpc://``).

    ``task_ids``: which ones.
    """

    def __init__(self, *args: object, task_ids: Sequence[str] = ()) -> None:
        super().__init__(*args)
        self.task_ids = tuple(task_ids)


# Messages.


class MessageError(EkidenError):
    """A message that cannot be understood. It is never dropped: it goes to the dead letters with this reason."""


class NewerFormat(MessageError):
    """A message written by a newer ekiden than this one; it waits for a newer worker."""


# What happened to a task, told to whoever waits for its result.


class TaskError(EkidenError):
    """The task failed. Raised by ``AsyncResult.get()`` where the original class is not at hand in this process.

    ``type_name`` is the dotted name of the original class; ``traceback_text`` the worker's traceback or None.
    """

    def __init__(self, *args: object, type_name: str | None = None, traceback_text: str | None = None) -> None:
        super().__init__(*args)
        self.type_name = type_name
        self.traceback_text = traceback_text


class TaskRevoked(TaskError):
    """The task was revoked before it started, or terminated while it ran."""


class TaskExpired(TaskRevoked):
    """The task's ``expires`` had passed before a worker could start it: it was revoked by the time."""


class TaskRejected(TaskError):
    """The task raised ``Reject(requeue=False)``; its message is in the dead letters."""


class WorkerLostError(TaskError):
    """The process that ran the body died (killed, out of memory, crashed), or its message did that to too many."""


class TimeLimitExceeded(TaskError):
    """The body ran longer than its hard ``time_limit`` and was ended."""


class MaxRetriesExceededError(TaskError):
    """``self.retry()`` was called without an exception when no tries were left."""


class ResultTimeout(EkidenError, TimeoutError):
    """``AsyncResult.get(timeout=...)`` ended before the result was there. The task is not affected."""


# Raised inside a body.


class SoftTimeLimitExceeded(Exception):
    """Raised in the body when its ``soft_time_limit`` (seconds) has passed, so that it can clean up."""


class TaskPredicate(Exception):
    """Raised by a body to say what becomes of the call, instead of failing it."""


class Ignore(TaskPredicate):
    """Settle the message and store nothing: the task looks after its own state."""


class Reject(TaskPredicate):
    """Give the message back (``requeue=True``), or send it to the dead letters with ``reason``.

    What was given back is handed out again after a second, and ``delivery_info["redelivered"]`` is true then. It is
    bounded by ``max_deliveries``: after the last hand-out it goes to the dead letters.
    """

    def __init__(self, reason: object = None, requeue: bool = False) -> None:
        super().__init__(reason, requeue)
        self.reason = reason
        self.requeue = requeue


class Retry(TaskPredicate):
    """Run the call once more later. Made and raised by ``self.retry(...)``.

    ``when``: seconds from now, or the aware datetime at which the next try is due. ``exc``: what went wrong, if
    something did. ``args``/``kwargs``: what the next try is called with, if not the same as now. ``options``: of
    ``apply_async``, for the next try: ``queue``, ``priority``, ``expires``, ``headers``, limits, ``ignore_result``.
    """

    def __init__(
        self,
        message: str | None = None,
        exc: BaseException | None = None,
        when: float | datetime = 0.0,
        *,
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, exc, when)
        self.message = message
        self.exc = exc
        self.when = when
        self.new_args = args
        self.new_kwargs = kwargs
        self.new_options = options

    def __str__(self) -> str:
        if self.message:
            return self.message
        reason = f": {self.exc!r}" if self.exc is not None else ""
        return f"retry at {self.when}{reason}"
