"""ekiden: tasks and messages over any broker, chosen by URL.

    from ekiden import Ekiden

    app = Ekiden("shop")

    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    add.delay(2, 2).get()      # with `ekiden worker shop:app` running

``connect(url)`` gives queues and topics without tasks.

A name is imported when it is first asked for: the supervisor of a worker needs none of them, and starts its processes
60 ms earlier without.
"""

import importlib

TYPE_CHECKING = False  # a type checker takes it for true; to import ``typing`` takes as long as the rest of this
if TYPE_CHECKING:
    from ekiden import errors as errors
    from ekiden import signals as signals
    from ekiden.app import Ekiden as Ekiden
    from ekiden.errors import ConfigurationError as ConfigurationError
    from ekiden.errors import EkidenError as EkidenError
    from ekiden.errors import Ignore as Ignore
    from ekiden.errors import Reject as Reject
    from ekiden.errors import Retry as Retry
    from ekiden.errors import SoftTimeLimitExceeded as SoftTimeLimitExceeded
    from ekiden.errors import TaskError as TaskError
    from ekiden.messaging import connect as connect
    from ekiden.results import AsyncResult as AsyncResult
    from ekiden.signature import Signature as Signature
    from ekiden.states import State as State
    from ekiden.task import Task as Task
    from ekiden.taskset import TaskSet as TaskSet
    from ekiden.taskset import shared_task as shared_task

__version__ = "0.1.0"

_MODULES = {
    "AsyncResult": "results",
    "ConfigurationError": "errors",
    "Ekiden": "app",
    "EkidenError": "errors",
    "Ignore": "errors",
    "Reject": "errors",
    "Retry": "errors",
    "Signature": "signature",
    "SoftTimeLimitExceeded": "errors",
    "State": "states",
    "Task": "task",
    "TaskError": "errors",
    "TaskSet": "taskset",
    "connect": "messaging",
    "shared_task": "taskset",
}
"""Each name that users import from here, and the module that has it."""

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


def __getattr__(name: str) -> object:
    """Import a name when it is first asked for.

    For a name that only Celery has: an ImportError that says what to use instead. It is no AttributeError, because
    ``from ekiden import name`` would replace that with a sentence of its own.
    """
    if name in _MODULES:
        found: object = getattr(importlib.import_module(f"ekiden.{_MODULES[name]}"), name)
        globals()[name] = found
        return found
    if name in {"errors", "exceptions", "result", "schedules", "signals", "states"}:
        return importlib.import_module(f"ekiden.{name}")
    from ekiden.celery_names import missing_name  # only for a name that is not here

    raise missing_name(__name__, name)
