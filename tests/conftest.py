"""The rules for every test: on CI (CI=true) nothing may be skipped, and no thread of ekiden's outlives a test."""

import os
import threading
import time
from collections.abc import Generator, Iterator
from typing import TypeVar

import pytest

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return refuse_a_skip(report)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return refuse_a_skip(report)


def refuse_a_skip(report: Report) -> Report:
    """The same report, as a failure where it was a skip on CI. An expected failure is not a skip."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        _, _, reason = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"On CI no test may be skipped. {reason}"
    return report


_THREADS_END_WITHIN = 2.0


@pytest.fixture(autouse=True)
def no_thread_of_ekiden_outlives_a_test() -> Iterator[None]:
    """What a test starts, it stops: a thread that stays behind works on while other tests run."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + _THREADS_END_WITHIN
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("ekiden-"):
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"the thread {thread.name} has outlived its test"
