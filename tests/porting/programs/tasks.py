"""What a task can be told when it is declared, and do while it runs."""

import json
import threading
from pathlib import Path

from ekiden import Ekiden as Celery
from ekiden import Task, states
from ekiden.exceptions import Ignore, Reject

app = Celery("tasks", broker="memory://tasks", backend="memory://tasks")

handled = []
"""What the handlers and bodies below have noted, in this process."""

may_go_on = threading.Event()


class Unreachable(Exception):
    """A service does not answer."""


# Names and the task itself.


@app.task(name="sum-of-two-numbers")
def add(x, y):
    return x + y


@app.task(bind=True)
def describe(self, x, *, y=2):
    request = self.request
    return {
        "name": self.name,
        "id": request.id,
        "task": request.task,
        "args": request.args,
        "kwargs": request.kwargs,
        "retries": request.retries,
        "called_directly": request.called_directly,
        "hostname": request.hostname,
        "queue": request.delivery_info["routing_key"],
        "root_id": request.root_id,
        "parent_id": request.parent_id,
        "eta": request.eta,
        "expires": request.expires is not None,
        "is_eager": request.is_eager,
        "correlation_id": request.correlation_id,
    }


@app.task(bind=True)
def call_describe(self):
    return describe.delay(1).id


# Retries.


@app.task(bind=True, default_retry_delay=0.01)
def retry_by_hand(self, succeed_at):
    try:
        if self.request.retries < succeed_at:
            raise Unreachable(f"try {self.request.retries}")
    except Unreachable as exc:
        raise self.retry(exc=exc, max_retries=2)  # noqa: B904 - as many write it
    return self.request.retries


@app.task(bind=True)
def retry_with_other_arguments(self, number):
    if number < 3:
        raise self.retry(args=(number + 1,), countdown=0)
    return number


@app.task(bind=True, max_retries=1)
def retry_without_a_reason(self):
    raise self.retry(countdown=0)


@app.task(autoretry_for=(Unreachable,), retry_backoff=0.01, retry_backoff_max=0.02, retry_jitter=True, max_retries=3)
def retry_by_itself():
    handled.append("tried")
    if handled.count("tried") < 3:
        raise Unreachable
    return handled.count("tried")


@app.task(autoretry_for=(Exception,), dont_autoretry_for=(KeyError,), retry_backoff=True)
def retry_most():
    handled.append("tried")
    raise KeyError("missing")


class RetryingTask(Task):
    """What many tasks have in common, as attributes of their base class."""

    autoretry_for = (Unreachable,)
    max_retries = 2
    retry_backoff = 0.01
    retry_jitter = False


@app.task(base=RetryingTask, bind=True)
def retry_as_its_base_says(self):
    handled.append("tried")
    raise Unreachable(f"after {self.max_retries} retries")


# Endings by exception.


@app.task(bind=True)
def ignore(self):
    self.update_state(state=states.FAILURE, meta="not wanted")
    raise Ignore


@app.task(acks_late=True)
def reject():
    raise Reject("out of paper", requeue=False)


@app.task(bind=True, acks_late=True)
def requeue_once(self):
    handled.append("seen")
    if len(handled) == 1:
        raise Reject("not now", requeue=True)
    return "done"


@app.task(throws=(KeyError,))
def fail_as_declared():
    raise KeyError("unknown customer")


# States.


@app.task(bind=True)
def import_files(self, names):
    for position, _name in enumerate(names):
        self.update_state(state="IMPORTING", meta={"current": position + 1, "total": len(names)})
    handled.append("told")
    may_go_on.wait(20)
    return len(names)


@app.task(ignore_result=True)
def forgetful():
    handled.append("ran")
    return "nobody asks"


@app.task(track_started=True)
def patient():
    handled.append("started")
    may_go_on.wait(20)


# Base classes.


class FileTask(Task):
    """Opens its file once in a process, and keeps it for every call."""

    _lines = None

    @property
    def lines(self):
        if self._lines is None:
            handled.append("read")
            self._lines = json.loads(Path(__file__).with_name("lines.json").read_text("utf-8"))
        return self._lines


@app.task(base=FileTask, bind=True)
def line(self, number):
    return self.lines[number]


@app.task(base=FileTask)
def count_lines():
    return len(count_lines.lines)


class TellingTask(Task):
    """Notes how its calls went."""

    def before_start(self, task_id, args, kwargs):
        handled.append(("before_start", task_id, list(args), dict(kwargs)))

    def on_success(self, retval, task_id, args, kwargs):
        handled.append(("on_success", retval, task_id))

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        handled.append(("on_failure", repr(exc), task_id, "Traceback" in str(einfo)))

    def on_retry(self, exc, task_id, args, kwargs, einfo):
        handled.append(("on_retry", repr(exc), task_id))

    def after_return(self, status, retval, task_id, args, kwargs, einfo):  # noqa: PLR0917 - the handler that is overridden
        handled.append(("after_return", status, task_id))


@app.task(base=TellingTask)
def half(number):
    if number % 2:
        raise ValueError(number)
    return number // 2


@app.task(base=TellingTask, bind=True)
def half_at_second_try(self, number):
    if self.request.retries == 0:
        raise self.retry(exc=ValueError("later"), countdown=0)
    return number // 2


class LoudTask(Task):
    """Notes each call, and makes it."""

    def __call__(self, *args, **kwargs):
        handled.append(f"starting {self.name}[{self.request.id}]")
        return self.run(*args, **kwargs)


@app.task(base=LoudTask)
def whisper(text):
    return text.lower()
