"""ekiden: tasks and messages over any broker, chosen by URL.

    from ekiden import Ekiden

    app = Ekiden("shop")

    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    add.delay(2, 2).get()      # with `ekiden worker shop:app` running

``connect(url)`` gives queues and topics without tasks.
"""

from ekiden import errors, signals
from ekiden.app import Ekiden
from ekiden.errors import (
    ConfigurationError,
    EkidenError,
    Ignore,
    Reject,
    Retry,
    SoftTimeLimitExceeded,
    TaskError,
)
from ekiden.messaging import connect
from ekiden.results import AsyncResult
from ekiden.signature import Signature
from ekiden.states import State
from ekiden.task import Task
from ekiden.taskset import TaskSet, shared_task


def __getattr__(name: str) -> object:
    """For a name of Celery's that is not here: an ImportError that says what to use instead.

    It is no AttributeError, because ``from ekiden import name`` would replace that with a sentence of its own.
    """
    from ekiden.celery_names import MISSING  # only for a name that is not here

    if f"celery:{name}" in MISSING:
        raise ImportError(f"ekiden has no {name!r}: {MISSING[f'celery:{name}']}.")
    raise AttributeError(f"module 'ekiden' has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "AsyncResult",
    "ConfigurationError",
    "Ekiden",
    "EkidenError",
    "Ignore",
    "Reject",
    "Retry",
    "Signature",
    "SoftTimeLimitExceeded",
    "State",
    "Task",
    "TaskError",
    "TaskSet",
    "connect",
    "errors",
    "shared_task",
    "signals",
]
