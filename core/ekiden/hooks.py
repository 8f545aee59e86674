"""What plugins and programs can see: signals, called in this process when something happened.

A signal is a function call: connect a receiver and it is called here, in the process and thread where the event is.
A message is bytes on a broker: it reaches another process, or this one later. That is why there are two things.

A receiver that fails is logged and does not break the task; that is the one place where an error is logged and passed
over, because a receiver is a bystander. Receivers are called as ``receiver(sender, **fields)``; take ``**fields`` and
a new field will not break you. ``sender`` is the Task (or the task's name before and after publishing, and the worker's
name for worker signals), and ``connect(receiver, sender=...)`` hears one sender only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from ekiden.loggers import safe_logger

logger = safe_logger(__name__)


class Receiver(Protocol):
    """Called with the sender and the signal's fields."""

    def __call__(self, sender: Any, **fields: Any) -> object: ...


AnyReceiver = TypeVar("AnyReceiver", bound=Receiver)


class Signal:
    """A named event. ``receivers`` is replaced, never changed, so that sending needs no lock."""

    def __init__(self, name: str, meaning: str, fields: tuple[str, ...]) -> None:
        self.name = name
        self.meaning = meaning
        self.fields = fields
        self.receivers: tuple[tuple[Receiver, Any], ...] = ()
        self._uids: dict[Any, tuple[Receiver, Any]] = {}
        self._changing = threading.Lock()

    def __repr__(self) -> str:
        return f"<Signal {self.name}({', '.join(self.fields)})>"

    if not TYPE_CHECKING:  # a type checker is to report a name that is not there

        def __getattr__(self, name: str) -> object:
            from ekiden.celery_names import missing_attribute  # only for a name that is not here

            raise missing_attribute("signal", self, name)

    @overload
    def connect(
        self, receiver: AnyReceiver, sender: Any = None, weak: bool = ..., dispatch_uid: Any = ...
    ) -> AnyReceiver: ...
    @overload
    def connect(
        self, receiver: None = None, sender: Any = None, weak: bool = ..., dispatch_uid: Any = ...
    ) -> Callable[[AnyReceiver], AnyReceiver]: ...
    def connect(self, receiver: Any = None, sender: Any = None, weak: bool = False, dispatch_uid: Any = None) -> Any:
        """Call ``receiver`` from now on, for one ``sender`` or (None) for all. Also a decorator.

        ``dispatch_uid``: of several receivers that are connected under the same one, the first counts. ``weak`` is
        Celery's and changes nothing: a receiver stays connected until ``disconnect``.
        """
        if receiver is None:
            return lambda function: self.connect(function, sender, weak, dispatch_uid)
        with self._changing:
            known = dispatch_uid is not None and dispatch_uid in self._uids
            if not known and (receiver, sender) not in self.receivers:
                self.receivers = (*self.receivers, (receiver, sender))
                if dispatch_uid is not None:
                    self._uids[dispatch_uid] = (receiver, sender)
        return receiver

    def disconnect(self, receiver: Receiver, sender: Any = None) -> bool:
        """Call ``receiver`` no more for that sender; False if it was not connected."""
        with self._changing:
            left = tuple(each for each in self.receivers if each != (receiver, sender))
            found = len(left) != len(self.receivers)
            self.receivers = left
            self._uids = {uid: each for uid, each in self._uids.items() if each in left}
        return found

    def send(self, from_sender: Any, **fields: Any) -> None:
        """Call every receiver that listens to this sender, in the order of connecting."""
        for receiver, wanted in self.receivers:
            if wanted is None or wanted is from_sender or wanted == from_sender:
                try:
                    receiver(sender=from_sender, **fields)
                except BaseException as error:
                    # By its type: isinstance() asks the error itself, which may do anything.
                    is_interrupt = issubclass(type(error), KeyboardInterrupt)
                    if is_interrupt and threading.current_thread() is threading.main_thread():
                        raise  # it is not the receiver's: somebody ends the program
                    logger.exception("signal %s: the receiver %r failed", self.name, receiver)


before_task_publish = Signal(
    "before_task_publish", "A message is about to be published.", ("body", "headers", "routing_key", "eta", "task_id")
)
after_task_publish = Signal(
    "after_task_publish", "The broker has stored a message.", ("body", "headers", "routing_key", "eta", "task_id")
)
task_prerun = Signal("task_prerun", "A body is about to start.", ("task_id", "task", "args", "kwargs"))
task_postrun = Signal(
    "task_postrun", "A body has ended, however.", ("task_id", "task", "args", "kwargs", "retval", "state")
)
task_success = Signal("task_success", "A body returned.", ("result", "task_id"))
task_failure = Signal(
    "task_failure",
    "A body failed for good.",
    ("task_id", "exception", "args", "kwargs", "traceback", "einfo"),
)
task_retry = Signal("task_retry", "A call will be tried again.", ("request", "reason", "einfo"))
task_revoked = Signal("task_revoked", "A call was revoked or has expired.", ("request", "terminated", "expired"))
task_received = Signal("task_received", "A worker has a message in hand whose body it is to run.", ("request",))
worker_init = Signal("worker_init", "A worker process is about to start.", ())
worker_process_init = Signal(
    "worker_process_init", "A process that will run bodies has loaded the app: a worker's, or a body's.", ()
)
worker_process_shutdown = Signal("worker_process_shutdown", "A worker process is about to end.", ("pid", "exitcode"))
worker_shutdown = Signal("worker_shutdown", "A worker process has stopped.", ())
setup_logging = Signal(
    "setup_logging",
    "Logging is about to be configured; with a receiver, ekiden leaves it alone.",
    ("loglevel", "logfile", "format", "colorize"),
)
after_setup_logger = Signal(
    "after_setup_logger", "Logging has been configured.", ("logger", "loglevel", "logfile", "format", "colorize")
)
after_setup_task_logger = Signal(
    "after_setup_task_logger",
    "The same, of the logger of tasks.",
    ("logger", "loglevel", "logfile", "format", "colorize"),
)
worker_ready = Signal("worker_ready", "A worker process has started to receive.", ())
worker_shutting_down = Signal("worker_shutting_down", "A worker process has begun to stop.", ())

ALL = (
    before_task_publish,
    after_task_publish,
    task_prerun,
    task_postrun,
    task_success,
    task_failure,
    task_retry,
    task_revoked,
    task_received,
    worker_init,
    worker_process_init,
    worker_ready,
    worker_shutting_down,
    worker_process_shutdown,
    worker_shutdown,
    setup_logging,
    after_setup_logger,
    after_setup_task_logger,
)


def task_ended_receivers() -> bool:
    """Whether anybody listens to how bodies end: asked once per task instead of building fields for nobody."""
    return bool(task_postrun.receivers or task_success.receivers or task_failure.receivers or task_retry.receivers)
