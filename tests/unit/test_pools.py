"""Bodies in threads: alarms at their time, and interruptions that arrive in the user's code only."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ekiden import SoftTimeLimitExceeded, execution
from ekiden.pools import ThreadBody, Watchdog, is_users_code

from tests.working import arrived, eventually


@pytest.fixture
def errors() -> list[BaseException]:
    return []


@pytest.fixture
def watchdog(errors: list[BaseException]) -> Iterator[Watchdog]:
    watchdog = Watchdog(errors.append)
    yield watchdog
    watchdog.close()


def test_an_alarm_that_fails_is_told_and_the_next_one_rings(watchdog: Watchdog, errors: list[BaseException]) -> None:
    rung = threading.Event()

    def leave() -> None:
        sys.exit(1)

    watchdog.after(0.01, leave)
    watchdog.after(0.02, rung.set)

    assert rung.wait(5)
    assert [type(error) for error in errors] == [SystemExit]


def wait_for(event: threading.Event) -> None:
    """Keep the watchdog's thread from ringing anything until a test has set all that it sets."""
    assert arrived(event)


# The watchdog.


def test_alarms_ring_in_the_order_of_their_times(watchdog: Watchdog) -> None:
    rung: list[str] = []
    all_are_set = threading.Event()
    watchdog.after(0, lambda: wait_for(all_are_set))

    alarms = {
        name: watchdog.after(seconds, lambda name=name: rung.append(name))  # type: ignore[misc]
        for seconds, name in [(0.06, "third"), (0.02, "first"), (0.04, "second")]
    }
    all_are_set.set()

    eventually(lambda: len(rung) == 3, what="all have rung")
    assert rung == sorted(alarms, key=lambda name: alarms[name].at)


def test_an_alarm_does_not_ring_before_its_time(watchdog: Watchdog) -> None:
    rung = threading.Event()
    began = time.monotonic()

    watchdog.after(0.1, rung.set)

    assert rung.wait(5)
    assert time.monotonic() - began >= 0.1


def test_a_cancelled_alarm_does_not_ring(watchdog: Watchdog) -> None:
    rung: list[str] = []
    is_cancelled = threading.Event()
    watchdog.after(0, lambda: wait_for(is_cancelled))
    alarm = watchdog.after(0, lambda: rung.append("cancelled"))
    watchdog.after(0.01, lambda: rung.append("other"))

    alarm.cancel()
    is_cancelled.set()

    eventually(lambda: rung, what="the other one rings")
    assert rung == ["other"]


def test_an_alarm_may_set_another_one(watchdog: Watchdog) -> None:
    rung = threading.Event()

    watchdog.after(0.01, lambda: watchdog.after(0.01, rung.set) and None)

    assert rung.wait(5)


def test_a_far_alarm_is_no_trouble(watchdog: Watchdog) -> None:
    rung = threading.Event()
    watchdog.after(1e300, lambda: None)

    watchdog.after(0.01, rung.set)

    assert rung.wait(5)


def test_cancelled_alarms_are_not_kept(watchdog: Watchdog) -> None:
    kept = [watchdog.after(1e6, lambda: None) for _ in range(10)]
    rung = threading.Event()
    for _ in range(10_000):
        watchdog.after(1e6, lambda: None).cancel()
    watchdog.after(0.01, rung.set)

    assert rung.wait(5)
    assert len(watchdog._alarms) < 500
    assert {id(alarm) for alarm in kept} <= {id(each[2]) for each in watchdog._alarms}


def test_a_closed_watchdog_calls_nothing_and_has_no_thread() -> None:
    watchdog = Watchdog(lambda error: None)
    rung = threading.Event()
    watchdog.after(0.05, rung.set)

    watchdog.close()
    watchdog.after(0.0, rung.set)

    assert not rung.wait(0.1)
    assert not [thread for thread in threading.enumerate() if thread.name == "ekiden-watchdog"]


# Interrupting.


class Body:
    """Runs functions as a worker's thread does, one after the other."""

    def __init__(self) -> None:
        self.body: ThreadBody | None = None
        self.started = threading.Event()
        self.ended: list[Any] = []
        self.thread: threading.Thread | None = None

    def start(self, *functions: Callable[[], Any]) -> ThreadBody:
        self.thread = threading.Thread(target=self._run, args=(functions,))
        self.thread.start()
        assert self.started.wait(5)
        assert self.body is not None
        return self.body

    def _run(self, functions: tuple[Callable[[], Any], ...]) -> None:
        self.body = ThreadBody()
        for function in functions:
            self.body.begin()
            self.started.set()
            try:
                self.ended.append(as_a_task(function))
            except SoftTimeLimitExceeded:
                self.ended.append("interrupted")
            finally:
                self.body.end()

    def join(self) -> list[Any]:
        assert self.thread is not None
        self.thread.join(5)
        assert not self.thread.is_alive()
        return self.ended


def as_a_task(function: Callable[[], Any]) -> Any:
    """Call a function from where the worker calls bodies: from ``execution.run``."""
    code = compile("def run(function):\n    return function()\n", execution.__file__, "exec")
    namespace: dict[str, Any] = {"__name__": "ekiden.execution"}
    exec(code, namespace)
    return namespace["run"](function)


def as_ekiden(function: Callable[[], Any]) -> Any:
    """Call a function from code of ekiden's that the user's code called."""
    code = compile(
        "def publish(function):\n    return function()\n", execution.__file__.replace("execution", "publisher"), "exec"
    )
    namespace: dict[str, Any] = {"__name__": "ekiden.publisher"}
    exec(code, namespace)
    return namespace["publish"](function)


def work() -> str:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        time.sleep(0.001)
    return "never interrupted"


def test_a_body_is_interrupted_in_the_users_code(watchdog: Watchdog) -> None:
    runner = Body()
    body = runner.start(work)

    body.interrupt_until_done(watchdog, SoftTimeLimitExceeded, body.turn)

    assert runner.join() == ["interrupted"]


def test_code_of_ekiden_that_the_body_called_is_let_finish(watchdog: Watchdog) -> None:
    inside, finished = threading.Event(), threading.Event()

    def hold_a_lock() -> None:
        inside.set()
        for _ in range(50):
            time.sleep(0.002)
        finished.set()

    def publish_then_work() -> str:
        as_ekiden(hold_a_lock)
        return work()

    runner = Body()
    body = runner.start(publish_then_work)
    assert inside.wait(5)

    body.interrupt_until_done(watchdog, SoftTimeLimitExceeded, body.turn)

    assert runner.join() == ["interrupted"]
    assert finished.is_set()


def test_the_next_body_is_not_met_by_what_was_meant_for_the_last(watchdog: Watchdog) -> None:
    second = threading.Event()

    def next_body() -> str:
        second.set()
        for _ in range(100):
            time.sleep(0.001)
        return "finished"

    runner = Body()
    body = runner.start(lambda: "first", next_body)
    assert second.wait(5)

    body.interrupt_until_done(watchdog, SoftTimeLimitExceeded, turn=1)

    assert runner.join() == ["first", "finished"]


def test_tracing_works_after_a_body_was_interrupted(watchdog: Watchdog) -> None:
    runner = Body()
    body = runner.start(work)
    body.interrupt_until_done(watchdog, SoftTimeLimitExceeded, body.turn)
    runner.join()
    called: list[str] = []

    sys.setprofile(lambda frame, event, _argument: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        as_a_task(lambda: None)
    finally:
        sys.setprofile(None)

    assert "run" in called


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda look: as_a_task(lambda: look()), True),  # noqa: PLW0108 - a frame of the user's
        (lambda look: as_a_task(lambda: as_ekiden(lambda: look())), False),  # noqa: PLW0108
        (lambda look: as_a_task(lambda: as_ekiden(look)), False),
        (lambda look: look(), False),
    ],
    ids=["body", "receiver called by ekiden", "ekiden", "no task"],
)
def test_user_code_is_what_a_task_calls_and_ekiden_does_not(call: Callable[[Any], bool], expected: bool) -> None:
    assert call(lambda: is_users_code(sys._getframe())) is expected
