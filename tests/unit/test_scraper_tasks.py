"""The scraper's tasks: each page in the queue once, whatever crashed before; pages in trouble wait or are given up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.scraper.page import FetchError, Page, fetch, parse
from examples.scraper.robots import knock
from examples.scraper.server import SiteServer, Temper, serving, temper
from examples.scraper.site import read_site
from examples.scraper.store import Crawl, Store
from examples.scraper.tasks import app, enqueue, give_up, visit


@pytest.fixture
def server() -> Iterator[SiteServer]:
    with serving(read_site(40)) as running:
        yield running


@pytest.fixture
def directory(tmp_path: Path, server: SiteServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The directory of a crawl that has just begun, on a broker in this process."""
    monkeypatch.setattr(app.conf, "broker_url", f"memory://{tmp_path.name}")
    found = knock(server.url)
    with app, Store(tmp_path) as store:
        store.begin(Crawl("crawl-1", None, found.start, 100, 10, found.robots))
        yield str(tmp_path)


def queued() -> int:
    return app.transport.depth("fetch").ready or 0


def test_a_visit_stores_the_page_and_enqueues_what_it_found(directory: str, server: SiteServer) -> None:
    visit(directory, server.url)

    with Store(directory) as store:
        assert store.counts().visited == 1
        assert queued() == store.counts().waiting > 0


def test_a_second_delivery_of_a_finished_visit_asks_the_site_for_nothing(directory: str, server: SiteServer) -> None:
    visit(directory, server.url)
    served, in_queue = server.served.total(), queued()

    visit(directory, server.url)

    assert (server.served.total(), queued()) == (served, in_queue)


def test_a_visit_that_was_killed_before_it_enqueued_anything_loses_no_page(directory: str, server: SiteServer) -> None:
    with Store(directory) as store:
        store.begin_try(server.url)
        found = store.add_links(parse(fetch(server.url)))  # and here the worker is killed

    visit(directory, server.url)

    assert queued() == len(found) > 0


def test_a_visit_that_was_killed_half_way_enqueues_no_page_twice(directory: str, server: SiteServer) -> None:
    with Store(directory) as store:
        store.begin_try(server.url)
        found = store.add_links(parse(fetch(server.url)))
        enqueue(directory, store.crawl().id, found[:1])  # and here the worker is killed

    visit(directory, server.url)

    assert queued() == len(found) > 1


def test_two_crawls_may_share_a_broker(directory: str, server: SiteServer) -> None:
    enqueue(directory, "crawl-1", [server.url])
    enqueue(directory, "crawl-2", [server.url])

    assert queued() == 2


def test_a_page_in_trouble_waits_and_says_why(directory: str, server: SiteServer) -> None:
    busy = server.url.removesuffix("/") + next(path for path in server.site.paths if temper(path) is Temper.BUSY)
    with Store(directory) as store:
        store.add_links(Page(server.url, 200, "", (busy,), 0, 0.0))

        with pytest.raises(FetchError):
            visit(directory, busy)

        row = store.rows()[-1]
        assert (row.url, row.state, row.tries) == (busy, "waiting", 1)
        assert "503" in (row.error or "")


def test_a_page_that_is_given_up_does_not_keep_the_crawl_waiting(directory: str, server: SiteServer) -> None:
    give_up(directory, server.url)

    with Store(directory) as store:
        assert (store.counts().waiting, store.counts().given_up) == (0, 1)
