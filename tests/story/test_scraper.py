"""The demo from its first line to its summary, with a real worker; and the promise that a kill loses no page."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from examples.scraper.server import SiteServer, serving
from examples.scraper.site import read_site
from examples.scraper.store import Counts, Store
from tests.servers.places import BROKERS, place_at

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 120.0
"""MongoDB keeps what a killed worker had in a transaction for a minute; nothing else takes nearly so long."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Demo:
    """A running demo. ``line`` waits for a line of its output that fits; ``end`` for its end."""

    def __init__(self, *arguments: str | Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EKIDEN_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "examples.scraper", *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""

    def line(self, pattern: str) -> re.Match[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if found := re.search(pattern, line):
                return found
        pytest.fail(f"no line fits {pattern!r}:\n{self.output}")

    def end(self) -> int:
        rest, _ = self.process.communicate(timeout=DEADLINE_SECONDS)
        self.output += rest
        return self.process.returncode


@pytest.fixture
def start() -> Iterator[Callable[..., Demo]]:
    """Starts demos, and leaves none behind."""
    demos: list[Demo] = []

    def started(*arguments: str | Path) -> Demo:
        demos.append(Demo(*arguments))
        return demos[-1]

    yield started
    for demo in demos:
        demo.process.terminate()
        demo.end()


@pytest.fixture(params=BROKERS)
def broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The broker that the demo is told to use."""
    with place_at(request.param, request, tmp_path) as url:
        yield url


def is_running(process_group: int) -> bool:
    try:
        os.killpg(process_group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_demo_visits_its_whole_site_and_says_so(
    tmp_path: Path, start: Callable[..., Demo], broker_url: str
) -> None:
    demo = start("--pages", "60", "--directory", tmp_path, "--broker", broker_url)
    worker = int(demo.line(r"worker is process (\d+)")[1])

    assert demo.end() == 0, demo.output

    with Store(tmp_path) as store:
        rows, links = store.rows(), store.links()
    assert [row.state for row in rows] == ["visited"] * 60
    assert f"60 pages visited, {len(links)} links between them" in demo.output
    assert f"{sum(1 for row in rows if row.tries > 1)} answered only after another try" in demo.output
    assert (tmp_path / "links.svg").read_text().count("<circle") >= 60
    assert not is_running(worker)


@pytest.mark.parametrize("victim", ["worker", "demo and worker"])
def test_after_kill_9_the_crawl_ends_with_the_same_pages(
    tmp_path: Path, start: Callable[..., Demo], broker_url: str, victim: str
) -> None:
    site = read_site(120)
    with serving(site) as server:
        arguments = ("--url", server.url, "--rate", "60", "--directory", tmp_path, "--broker", broker_url)
        demo = start(*arguments)
        worker = int(demo.line(r"worker is process (\d+)")[1])
        wait_for_pages(server, demo, count=40)

        if victim == "demo and worker":
            demo.process.kill()
            demo.end()
        os.killpg(worker, signal.SIGKILL)
        with Store(tmp_path) as store:
            counts, in_hand = store.counts(), {row.url for row in store.rows() if row.state == "waiting" and row.tries}
        if victim == "demo and worker":
            demo = start(*arguments)

        assert demo.end() == 0, demo.output
        assert 0 < counts.visited < len(site.paths)
        with Store(tmp_path) as store:
            assert store.counts() == Counts(visited=len(site.paths))
        served = {server.url.removesuffix("/") + path: server.served[path] for path in site.paths}
        assert min(served.values()) == 1
        assert {url for url, times in served.items() if times > 1} - {server.url} <= in_hand


def wait_for_pages(server: SiteServer, demo: Demo, *, count: int) -> None:
    """Return when the site has served so many pages; the demo's own end would be too early."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while server.served.total() < count:
        assert time.monotonic() < deadline, f"{server.served.total()} pages were served"
        with pytest.raises(subprocess.TimeoutExpired):
            demo.process.wait(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_stopped_stops_its_worker(
    tmp_path: Path, start: Callable[..., Demo], number: signal.Signals
) -> None:
    demo = start("--pages", "300", "--rate", "5", "--directory", tmp_path)
    worker = int(demo.line(r"worker is process (\d+)")[1])

    demo.process.send_signal(number)

    assert demo.end() == 130, demo.output
    assert "To continue: " in demo.output
    assert not is_running(worker)


def test_a_demo_under_nohup_outlives_its_terminal(tmp_path: Path, start: Callable[..., Demo]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does, for what it starts
    try:
        demo = start("--pages", "20", "--directory", tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    demo.line(r"worker is process (\d+)")

    demo.process.send_signal(signal.SIGHUP)

    assert demo.end() == 0, demo.output
