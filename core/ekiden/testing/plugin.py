"""The pytest plugin: apps on throw-away brokers, and workers for them. Installed with ekiden; nothing to switch on.

    def test_a_welcome_mail_is_sent(ekiden_use_broker, ekiden_worker):
        app = ekiden_use_broker(shop.app)       # your app, on a broker of this test's own
        ekiden_worker(app)                      # a worker for it, in this process
        assert shop.welcome.delay("ada").get(timeout=5) == "sent"

    ekiden_broker_url       the URL of a broker that is empty and this test's own; memory:// if nothing else is said
    ekiden_app              a fresh app on that broker; override it in your conftest.py to return your own
    ekiden_use_broker       puts an app of yours on that broker for the length of the test
    ekiden_worker           starts a worker in the test's process
    ekiden_worker_process   starts ``ekiden worker`` in processes of its own, for an app that is in a module

    pytest --ekiden-broker sqlite:// --ekiden-broker redis://localhost:6379/0

runs every test that uses one of them on each of these brokers. Every pytest of an environment that ekiden is installed
in imports this module (``-p no:ekiden`` keeps it out), so it loads nothing beyond ``import ekiden`` itself: no broker,
no worker, no asyncio before a fixture needs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from ekiden.app import Ekiden
    from ekiden.inprocess import InProcessWorker

_OPTION = "--ekiden-broker"
_STOP_SECONDS = 15.0
_POLL_SECONDS = 0.02

# What a worker process imports instead of the app's own module: the same app, on the test's broker.
_APP_UNDER_TEST = '''"""The app under test, on the broker of the test."""

from ekiden.app import load_app

app = load_app({target!r})
app.conf.broker_url = {url!r}
app.conf.result_backend = None
'''


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--ekiden-broker``."""
    parser.getgroup("ekiden").addoption(
        _OPTION,
        action="append",
        metavar="URL",
        help="Run the tests that use ekiden's fixtures on this broker, in a place of each test's own. Repeat it to run "
        "them on several. [default: memory://]",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark that tests of the conformance kit carry, so that it may be run under ``--strict-markers``."""
    config.addinivalue_line("markers", "slow: takes more than a few seconds; `pytest -m 'not slow'` leaves these out")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make each test that needs a broker one test per ``--ekiden-broker``."""
    urls: list[str] | None = metafunc.config.getoption(_OPTION)
    if urls and "ekiden_broker_url" in metafunc.fixturenames:
        schemes = [url.partition("://")[0] for url in urls]  # the rest of a URL may hold a password
        metafunc.parametrize("ekiden_broker_url", urls, indirect=True, ids=schemes)


@pytest.fixture
def ekiden_broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a broker that holds nothing and that no other test uses: by ``--ekiden-broker``, else ``memory://``.

    What lives in one process cannot serve several: a test that uses ``ekiden_worker_process`` gets ``sqlite://`` where
    the others get ``memory://``.
    """
    from ekiden import memory
    from ekiden.urls import parse_url

    url: str = getattr(request, "param", "memory://")
    if url.startswith("memory:") and "ekiden_worker_process" in request.fixturenames:
        url = "sqlite://"
    own_url = throw_away_url(url, tmp_path)
    yield own_url
    parsed = parse_url(own_url)
    if parsed.scheme == "memory":
        memory.discard(parsed.hosts[0].name)


@pytest.fixture
def ekiden_use_broker(ekiden_broker_url: str) -> Iterator[Callable[[Ekiden], Ekiden]]:
    """``ekiden_use_broker(app)`` puts an app on the broker of this test, until the test ends; it returns the app."""
    with ExitStack() as used:

        def use(app: Ekiden) -> Ekiden:
            return used.enter_context(use_broker(app, ekiden_broker_url))

        yield use


@pytest.fixture
def ekiden_app(ekiden_use_broker: Callable[[Ekiden], Ekiden]) -> Ekiden:
    """A fresh app on the broker of this test. Override it to have ``ekiden_worker`` work for your own app:

    @pytest.fixture
    def ekiden_app(ekiden_use_broker):
        return ekiden_use_broker(shop.app)
    """
    from ekiden.app import Ekiden

    return ekiden_use_broker(Ekiden("tests"))


class StartWorker(Protocol):
    """What ``ekiden_worker`` is."""

    def __call__(self, app: Ekiden | None = None, **options: object) -> InProcessWorker:
        """Start a worker in this process for ``app`` (else for ``ekiden_app``); ``options`` as for ``app.worker``."""
        ...


@pytest.fixture
def ekiden_worker(ekiden_app: Ekiden) -> Iterator[StartWorker]:
    """``ekiden_worker()`` starts a worker in this process. It is stopped, and waited for, when the test ends."""
    with ExitStack() as workers:

        def start(app: Ekiden | None = None, **options: object) -> InProcessWorker:
            return workers.enter_context((app or ekiden_app).worker(**options))

        yield start


class StartWorkerProcess(Protocol):
    """What ``ekiden_worker_process`` is."""

    def __call__(self, target: str, *arguments: str) -> WorkerProcess:
        """Start ``ekiden worker TARGET ARGUMENTS`` on the broker of this test."""
        ...


@pytest.fixture
def ekiden_worker_process(ekiden_broker_url: str, tmp_path: Path) -> Iterator[StartWorkerProcess]:
    """``ekiden_worker_process("shop:app", "--threads", "2")`` starts a supervisor with one worker process.

    They are stopped, and waited for, when the test ends. The test fails if one of them had ended by itself with an
    error, and shows what it wrote.
    """
    with ExitStack() as processes:

        def start(target: str, *arguments: str) -> WorkerProcess:
            process = WorkerProcess(target, ekiden_broker_url, tmp_path, arguments)
            processes.callback(process.stop)
            return process

        yield start


class WorkerProcess:
    """``ekiden worker`` in a process of its own. What it writes is in ``log``."""

    def __init__(self, target: str, url: str, directory: Path, arguments: Sequence[str] = ()) -> None:
        number = len(list(directory.glob("ekiden_under_test_*.py")))
        module = f"ekiden_under_test_{number}"
        (directory / f"{module}.py").write_text(_APP_UNDER_TEST.format(target=target, url=url))
        self.log = directory / f"{module}.log"
        search_path = os.pathsep.join([str(directory), *(each for each in sys.path if each)])
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ekiden", "worker", f"{module}:app", "--processes", "1", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": search_path},
            )

    @property
    def pid(self) -> int:
        """The supervisor's process id; its worker processes are its children."""
        return self.process.pid

    def wait_for_log(self, text: str, *, timeout: float = 15.0) -> str:
        """Wait until it has written ``text``, such as "is ready", and return all that it has written."""
        deadline = time.monotonic() + timeout
        while text not in (written := self.log.read_text(errors="replace")):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"ekiden worker did not write {text!r} within {timeout:g} s, but:\n{written}")
            time.sleep(_POLL_SECONDS)
        return written

    def kill(self) -> None:
        """Kill the supervisor (SIGKILL). Its worker process notices, drains and ends."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stop it as SIGTERM does, and wait for its end. Fails if it had ended by itself with an error."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(
                    f"ekiden worker did not stop within {_STOP_SECONDS:g} s:\n{self._written()}"
                ) from None
        elif self.process.returncode > 0:
            raise AssertionError(f"ekiden worker exited with {self.process.returncode}:\n{self._written()}")

    def _written(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def use_broker(app: Ekiden, url: str) -> Iterator[Ekiden]:
    """Have ``app`` send to ``url`` and keep its results there, and then again to where it did before."""
    broker, backend = app.conf.broker_url, app.conf.result_backend
    app.close()
    app.conf.broker_url, app.conf.result_backend = url, None
    try:
        yield app
    finally:
        app.close()
        app.conf.broker_url, app.conf.result_backend = broker, backend


def throw_away_url(url: str, directory: Path) -> str:
    """``url`` as a place of its own at the same broker, which nobody has used before.

    memory://    another name               sqlite://    a new file in ``directory``
    others       the option ``prefix``: what such a transport puts before the name of all that it makes at its broker
    The other options of ``url`` stay.
    """
    from ekiden.message import new_id
    from ekiden.urls import parse_url

    parsed = parse_url(url)
    address, mark, query = url.partition("?")
    match parsed.scheme:
        case "memory":
            return f"memory://{new_id()}{mark}{query}"
        case "sqlite":
            return f"sqlite:///{directory}/ekiden-{new_id()}.db{mark}{query}"
        case _:
            return f"{address}?prefix=test-{new_id()}{'&' if query else ''}{query}"
