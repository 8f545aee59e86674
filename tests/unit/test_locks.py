"""Waits and threads that an exception out of a signal handler leaves in order, wherever it comes."""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
from ekiden import locks
from ekiden.locks import Flag, call_holding, start_thread
from ekiden.testing.interruptions import Signals

from tests.interruptions import Interrupted, signals_every
from tests.working import PATIENCE, eventually


@pytest.fixture
def signals() -> Iterator[Signals]:
    signals = Signals()
    with signals.handled():
        yield signals


Thing = TypeVar("Thing")


def at_every_instruction(
    signals: Signals, make: Callable[[], Thing], call: Callable[[Thing], object], check: Callable[[Thing], None]
) -> None:
    """Interrupt ``call`` at each instruction, in Python's own module too. Nothing else comes out of it."""
    for file in (threading.__file__, locks.__file__):
        number = 0
        was_interrupted: bool | None = True
        while was_interrupted is not None:
            number += 1
            thing = make()
            was_interrupted = signals.interrupt(functools.partial(call, thing), number, within=file)
            check(thing)


def test_a_thread_that_is_started_amid_signals_runs(signals: Signals) -> None:
    started: list[threading.Thread] = []
    ran: list[threading.Thread] = []

    at_every_instruction(
        signals,
        lambda: threading.Thread(target=lambda: ran.append(threading.current_thread()), daemon=True),
        start_thread,
        started.append,
    )

    eventually(lambda: {each for each in started if each.ident is not None} == set(ran), what="what has begun has run")
    assert len(ran) == len(set(ran)) > 5
    assert len(ran) < len(started)


def test_a_wait_that_is_interrupted_holds_up_nobody(signals: Signals) -> None:
    def can_be_used(flag: Flag) -> None:
        setting = threading.Thread(target=flag.set, daemon=True)
        setting.start()
        assert flag.wait(PATIENCE)
        setting.join(PATIENCE)
        assert not setting.is_alive()

    at_every_instruction(signals, Flag, lambda flag: flag.wait(0.001), can_be_used)


def test_who_sets_and_is_interrupted_can_set_again(signals: Signals) -> None:
    def can_be_set(flag: Flag) -> None:
        flag.set()
        assert flag.wait(PATIENCE)

    at_every_instruction(signals, Flag, Flag.set, can_be_set)


def test_what_is_called_with_a_lock_and_interrupted_leaves_it_free(signals: Signals) -> None:
    def is_free(lock: threading.RLock) -> None:
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(call_holding, lock, int).result(PATIENCE)

    at_every_instruction(signals, threading.RLock, lambda lock: call_holding(lock, threading.Lock), is_free)


def test_a_lock_that_another_thread_has_is_waited_for_so_long() -> None:
    lock, called = threading.RLock(), []

    with lock, ThreadPoolExecutor(1) as thread:
        assert not thread.submit(call_holding, lock, int).result(PATIENCE)
        waiting = thread.submit(call_holding, lock, lambda: called.append(1), timeout=0.05)
        assert not waiting.result(PATIENCE)
    assert call_holding(lock, lambda: called.append(2))
    with pytest.raises(ZeroDivisionError):
        call_holding(lock, lambda: 1 / 0)

    assert called == [2]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(call_holding, lock, int).result(PATIENCE)


def test_a_flag_ends_all_waits_until_it_is_cleared() -> None:
    flag = Flag()
    ended: list[bool] = []
    threads = [threading.Thread(target=lambda: ended.append(flag.wait(PATIENCE))) for _ in range(10)]
    for thread in threads:
        thread.start()

    flag.set()
    flag.set()
    for thread in threads:
        thread.join(PATIENCE)

    assert ended == [True] * 10
    assert flag.wait(0)
    flag.clear()
    started = time.monotonic()
    assert not flag.wait(0.05)
    assert time.monotonic() - started >= 0.05
    flag.set()
    assert flag.wait()


def test_a_storm_of_signals_comes_out_of_waits_and_starts_as_itself() -> None:
    flag, count = Flag(), 0
    over = threading.Event()

    def keep_setting() -> None:
        while not over.wait(0.0001):
            flag.set()

    setting = threading.Thread(target=keep_setting, daemon=True)
    setting.start()
    give_up = time.monotonic() + PATIENCE
    with signals_every(0.0003, inside="ekiden.locks"):
        while count < 200 and time.monotonic() < give_up:
            try:
                flag.clear()
                flag.wait(0.001)
                start_thread(threading.Thread(target=int, daemon=True))
            except Interrupted:
                count += 1

    assert count == 200
    assert setting.is_alive()
    over.set()
    setting.join(PATIENCE)
    assert not setting.is_alive()
