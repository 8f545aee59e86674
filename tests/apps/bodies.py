"""An app at the top level of a module, so that its tasks can run in body processes, too."""

import asyncio
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ekiden import Ekiden, Ignore, Reject, SoftTimeLimitExceeded, Task
from ekiden.errors import TimeLimitExceeded, WorkerLostError

app = Ekiden("bodies", broker="memory://bodies")
logger = logging.getLogger(__name__)


class Noting(Task[..., Any]):
    """Writes down which handlers were called, where the test looks for it: the task's first argument."""

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        note(args[0], f"on_success {retval} {self.request.id == task_id}")

    def on_failure(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(args[0], f"on_failure {type(exc).__name__} {self.request.id == task_id}")

    def on_retry(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(args[0], f"on_retry {type(exc).__name__} {self.request.id == task_id}")


def note(path: str, line: str) -> None:
    """Add a line to a file."""
    with Path(path).open("a") as file:
        file.write(f"{line}\n")


def work_for_ever() -> None:
    """Work in small steps."""
    while True:
        time.sleep(0.005)


async def await_for_ever() -> None:
    """Wait in small steps."""
    while True:
        await asyncio.sleep(0.005)


# Where it ran.


@app.task
def pid() -> int:
    return os.getpid()


@app.task
async def pid_async() -> int:
    return os.getpid()


@app.task(pool="process")
def pid_in_process() -> int:
    return os.getpid()


@app.task(time_limit=60)
def pid_with_limit() -> int:
    return os.getpid()


# Limits. Each has three bodies: in a thread, in the event loop, in a process.


@app.task(name="tidy.thread", soft_time_limit=0.2)
def tidy_thread(path: str) -> str:
    try:
        note(path, "started")
        work_for_ever()
    except SoftTimeLimitExceeded:
        return "tidied up"
    return "never"


@app.task(name="tidy.loop", soft_time_limit=0.2)
async def tidy_loop(path: str) -> str:
    try:
        note(path, "started")
        await await_for_ever()
    except SoftTimeLimitExceeded:
        return "tidied up"
    return "never"


tidy_process = app.task(name="tidy.process", soft_time_limit=0.2, pool="process")(tidy_thread.function)


@app.task(name="endless.thread", base=Noting)
def endless_thread(path: str) -> None:
    note(path, "started")
    work_for_ever()


@app.task(name="endless.loop", base=Noting)
async def endless_loop(path: str) -> None:
    note(path, "started")
    await await_for_ever()


endless_process = app.task(name="endless.process", base=Noting, pool="process")(endless_thread.function)
limited_process = app.task(name="limited.process", base=Noting, time_limit=0.3)(endless_thread.function)
limited_loop = app.task(name="limited.loop", base=Noting, time_limit=0.3)(endless_loop.function)
tried_again_process = app.task(
    name="again.process",
    base=Noting,
    time_limit=0.3,
    autoretry_for=(TimeLimitExceeded,),
    max_retries=1,
    default_retry_delay=0,
)(endless_thread.function)
tried_again_loop = app.task(
    name="again.loop",
    base=Noting,
    time_limit=0.3,
    autoretry_for=(TimeLimitExceeded,),
    max_retries=1,
    default_retry_delay=0,
)(endless_loop.function)


@app.task(time_limit=0.3)
def stubborn_process(path: str) -> None:
    while True:
        try:
            work_for_ever()
        except BaseException:  # noqa: BLE001 - that is what is stubborn about it
            note(path, "caught")


@app.task(time_limit=0.3)
async def stubborn_loop(path: str) -> str:
    for _ in range(1000):
        try:
            await await_for_ever()
        except Exception:  # noqa: BLE001 - that is what is stubborn about it
            note(path, "caught")
    return "never"


@app.task(time_limit=0.3)
async def with_children(path: str) -> None:
    async def child() -> None:
        try:
            await await_for_ever()
        finally:
            note(path, "child ended")

    async with asyncio.TaskGroup() as group:
        group.create_task(child())
        group.create_task(child())


# How a process ends.


@app.task(pool="process", base=Noting)
def die(path: str) -> None:
    note(path, "started")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(pool="process", base=Noting, autoretry_for=(Exception,), max_retries=1, default_retry_delay=0)
def die_once(path: str) -> list[int]:
    note(path, "started")
    if die_once.request.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return [die_once.request.attempt, die_once.request.retries]


@app.task(pool="process", base=Noting, acks="early")
def die_settled(path: str) -> None:
    note(path, "started")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(base=Noting, max_deliveries=2, dead_letter=False)
async def die_async(path: str) -> None:
    note(path, "started")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(pool="process", base=Noting, autoretry_for=(WorkerLostError,), max_retries=2, default_retry_delay=0)
def die_first(path: str) -> str:
    if die_first.request.retries < 2:
        os._exit(3)
    return "alive"


# What a body can do wherever it runs.


@app.task
def add(x: int, y: int) -> int:
    return x + y


@app.task(max_deliveries=1)
def once() -> int:
    return once.request.attempt


@app.task
def wait_for_file(path: str) -> None:
    Path(f"{path}.begun").touch()
    while not Path(path).exists():
        time.sleep(0.005)


@app.task
def send_one() -> None:
    add.delay(1, 2)


def everything(self: Any, x: int, *, to: str) -> dict[str, Any]:
    """Everything that a body asks of ekiden."""
    print("a body prints")
    sys.stdout.write("and writes\n")
    logger.warning("and logs")
    child = add.delay(x, 1)
    more = add.enqueue_many([(1, 1), (2, 2)])
    self.update_state(state="SENT", meta={"child": child.id})
    return {
        "id": self.request.id,
        "queue": self.request.queue,
        "priority": self.request.priority,
        "headers": dict(self.request.headers),
        "hostname": self.request.hostname,
        "child": child.id,
        "children": len(more) + 1,
        "state": app.AsyncResult(self.request.id).state,
        "value": child.get(10, allow_join=True),
        "depth": app.transport.depth("default").leased,
        "to": to,
    }


everything_thread = app.task(name="everything.thread", bind=True)(everything)
everything_process = app.task(name="everything.process", bind=True, pool="process")(everything)


@app.task(name="everything.loop", bind=True)
async def everything_loop(self: Any, x: int, *, to: str) -> dict[str, Any]:
    return await asyncio.to_thread(everything, self, x, to=to)


@app.task(pool="process", bind=True)
def outcome(self: Any, what: str) -> Any:
    match what:
        case "ignore":
            raise Ignore
        case "reject":
            raise Reject("not mine")
        case "fail":
            raise ValueError("wrong", what)
        case "exit":
            sys.exit("bye")
        case "object":
            return object()
        case "retry":
            if self.request.retries:
                return "again"
            self.retry(countdown=0)
        case "changed":
            self.retry(("retry",), countdown=0)
        case "unsendable":
            self.retry((object(),), countdown=0)
        case "large":
            return "x" * 5_000_000
        case "consume":
            app.transport.consumer(["default"], lease=1.0, prefetch=1, name="x")
    return what


class Slow(Task[..., Any]):
    """A handler that takes long."""

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        note(args[0], "handler")
        for _ in range(60):
            time.sleep(0.01)
        note(args[0], "handled")


@app.task(base=Slow)
def slow_handler(path: str) -> str:
    return "returned"


@app.task(soft_time_limit=0.1)
def at_the_end(seconds: float) -> str:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pass
    return "returned"


@app.task
def close_all() -> None:
    """Close every descriptor but the standard ones, as programs do that become daemons."""
    os.closerange(3, 256)
