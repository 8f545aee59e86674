"""The pytest plugin, as somebody's own test suite uses it."""

import subprocess
import sys
from pathlib import Path

import pytest
from ekiden import Ekiden
from ekiden.testing.plugin import throw_away_url, use_broker
from ekiden.urls import parse_url

SHOP = """
from ekiden import Ekiden

app = Ekiden("shop", broker="memory://production", backend="memory://results")

@app.task(name="add")
def add(x: int, y: int) -> int:
    return x + y

@app.task(name="pid")
def pid() -> int:
    import os
    return os.getpid()
"""

TESTS_OF_AN_APP = """
import shop

def test_a_call_comes_back(ekiden_use_broker, ekiden_worker):
    ekiden_worker(ekiden_use_broker(shop.app))
    assert shop.add.delay(1, 2).get(timeout=10) == 3

def test_the_broker_is_empty(ekiden_use_broker):
    app = ekiden_use_broker(shop.app)
    assert app.transport.depth("default").ready == 0
    shop.add.delay(1, 2)
    assert app.transport.depth("default").ready == 1

def test_afterwards_the_app_is_as_it_was():
    assert shop.app.conf.broker_url == "memory://production"
    assert shop.app.conf.result_backend == "memory://results"
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    # A redis:// URL is only accepted where a plugin for it is installed.
    pytester.makepyfile(
        shop=SHOP.replace("redis://production", "memory://production").replace("/0", "").replace("/1", "")
    )
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return pytester


def own_tests(text: str) -> str:
    return text


def test_a_users_app_runs_on_a_broker_of_the_tests_own(suite: pytest.Pytester) -> None:
    suite.makepyfile(TESTS_OF_AN_APP)

    result = suite.runpytest_inprocess("-W", "error")

    result.assert_outcomes(passed=3)


def test_one_option_runs_every_test_on_several_brokers(suite: pytest.Pytester) -> None:
    suite.makepyfile(TESTS_OF_AN_APP)

    result = suite.runpytest_inprocess("-v", "--ekiden-broker", "memory://", "--ekiden-broker", "sqlite://")

    result.assert_outcomes(passed=5)
    result.stdout.fnmatch_lines(["*test_a_call_comes_back[[]memory[]]*", "*test_a_call_comes_back[[]sqlite[]]*"])


def test_a_password_in_a_broker_url_is_not_shown(suite: pytest.Pytester) -> None:
    suite.makepyfile("def test_it(ekiden_broker_url): ...")

    result = suite.runpytest_inprocess("-v", "--ekiden-broker", "other://user:secret@host")

    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*secret*")


def test_an_app_and_a_worker_need_nothing_but_their_names(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        def test_it(ekiden_app, ekiden_worker):
            worker = ekiden_worker(threads=2)

            @ekiden_app.task
            def double(x: int) -> int:
                return 2 * x

            assert worker.worker.threads == 2
            assert double.delay(21).get(timeout=10) == 42

        def test_it_again(ekiden_app):
            assert not ekiden_app.tasks
        """
    )

    result = suite.runpytest_inprocess("-W", "error")

    result.assert_outcomes(passed=2)


def test_the_fixture_of_the_app_can_be_the_users_app(suite: pytest.Pytester) -> None:
    suite.makeconftest(
        """
        import pytest, shop

        @pytest.fixture
        def ekiden_app(ekiden_use_broker):
            return ekiden_use_broker(shop.app)
        """
    )
    suite.makepyfile(
        """
        import shop

        def test_it(ekiden_worker):
            ekiden_worker()
            assert shop.add.delay(1, 2).get(timeout=10) == 3
        """
    )

    result = suite.runpytest_inprocess("-W", "error")

    result.assert_outcomes(passed=1)


@pytest.mark.slow
def test_a_worker_process_serves_the_broker_of_the_test(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        import os, shop

        def test_it(ekiden_use_broker, ekiden_worker_process):
            app = ekiden_use_broker(shop.app)
            worker = ekiden_worker_process("shop:app", "--threads", "1")
            assert app.conf.broker_url.startswith("sqlite:///")
            assert shop.add.delay(1, 2).get(timeout=20) == 3
            assert shop.pid.delay().get(timeout=20) not in {os.getpid(), worker.pid}
            assert "is ready" in worker.wait_for_log("is ready")
        """
    )

    result = suite.runpytest_inprocess("-W", "error")

    result.assert_outcomes(passed=1)


@pytest.mark.slow
def test_a_worker_process_that_cannot_start_fails_its_test(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        """
        def test_it(ekiden_worker_process):
            ekiden_worker_process("no_such_module:app").process.wait(20)
        """
    )

    result = suite.runpytest_inprocess()

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*no module 'no_such_module'*"])


@pytest.mark.slow
def test_a_pytest_that_uses_none_of_it_loads_no_broker_no_worker_and_no_asyncio() -> None:
    code = "import sys, ekiden.testing.plugin; print(*sys.modules)"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not {"ekiden.memory", "ekiden.worker", "ekiden.sqlite", "stevedore", "sqlite3", "asyncio"} & set(loaded)


@pytest.mark.parametrize("url", ["memory://", "memory://shop", "sqlite://", "sqlite:////var/lib/shop.db"])
def test_no_two_throw_away_urls_are_the_same(url: str, tmp_path: Path) -> None:
    first, second = throw_away_url(url, tmp_path), throw_away_url(url, tmp_path)

    assert first != second
    assert parse_url(first).scheme == parse_url(url).scheme
    assert "shop" not in first.replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("memory://?max_messages=5", {"max_messages": "5"}),
        ("sqlite://?synchronous=full", {"synchronous": "full"}),
        ("redis://user:pass@host/3?ssl=1", {"ssl": "1"}),
    ],
)
def test_a_throw_away_url_keeps_the_options(url: str, expected: dict[str, str], tmp_path: Path) -> None:
    options = dict(parse_url(throw_away_url(url, tmp_path)).options)

    assert options.items() >= expected.items()


def test_a_broker_of_another_kind_gets_a_prefix_of_the_tests_own(tmp_path: Path) -> None:
    found = parse_url(throw_away_url("redis://user:pass@host:6380/3", tmp_path))

    assert (found.username, found.password, found.path) == ("user", "pass", "3")
    assert found.options["prefix"].startswith("test-")


def test_an_open_app_changes_its_broker_and_back(tmp_path: Path) -> None:
    app = Ekiden("shop", broker=throw_away_url("memory://", tmp_path))
    app.send_task("before")

    with use_broker(app, throw_away_url("memory://", tmp_path)):
        app.send_task("within")
        app.send_task("within")
        within = app.transport.depth("default").ready
    after = app.transport.depth("default").ready
    app.close()

    assert (within, after) == (2, 1)
