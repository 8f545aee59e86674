"""The scraper's store: who finds a page first, what comes back after a crash, where a crawl ends."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from examples.scraper.page import Page
from examples.scraper.store import Counts, Crawl, Store

HOME = "http://example.org/"


def crawl(*, max_pages: int = 100, max_depth: int = 10, robots: str = "") -> Crawl:
    return Crawl("crawl-1", None, HOME, max_pages, max_depth, robots)


def page(url: str, *links: str) -> Page:
    return Page(url, 200, f"Title of {url}", links, size_bytes=10, seconds=0.1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path) as opened:
        opened.begin(crawl())
        yield opened


def test_a_new_crawl_waits_for_its_start_page(store: Store) -> None:
    assert store.waiting() == [HOME]
    assert store.counts() == Counts(waiting=1)


def test_a_crawl_that_has_begun_keeps_its_rules(store: Store) -> None:
    store.begin(Crawl("crawl-2", None, "http://example.com/", 1, 1, ""))

    assert store.crawl() == crawl()
    assert store.waiting() == [HOME]


def test_a_directory_without_a_crawl_says_so(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        assert not store.has_begun
        with pytest.raises(LookupError, match=r"no crawl has begun in .*crawl\.sqlite"):
            store.crawl()


def test_only_the_first_to_find_a_page_has_to_enqueue_it(store: Store) -> None:
    first = store.add_links(page(HOME, f"{HOME}a", f"{HOME}b"))
    second = store.add_links(page(f"{HOME}a", f"{HOME}b", f"{HOME}c", HOME))

    assert first == [f"{HOME}a", f"{HOME}b"]
    assert second == [f"{HOME}c"]


def test_pages_found_at_once_by_many_are_enqueued_by_one(tmp_path: Path) -> None:
    sources = [f"{HOME}source{number}" for number in range(8)]
    targets = [f"{HOME}target{number}" for number in range(40)]
    with Store(tmp_path) as store:
        store.begin(crawl())
        store.add_links(page(HOME, *sources))

    def visit(source: str) -> list[str]:
        with Store(tmp_path) as own:
            return own.add_links(page(source, *targets))

    with ThreadPoolExecutor(len(sources)) as threads:
        found = [url for urls in threads.map(visit, sources) for url in urls]

    assert sorted(found) == sorted(targets)


def test_a_second_delivery_after_a_crash_names_what_may_not_have_been_enqueued(store: Store) -> None:
    store.add_links(page(HOME, f"{HOME}a", f"{HOME}b"))
    store.finish(page(f"{HOME}a"))

    again = store.add_links(page(HOME, f"{HOME}a", f"{HOME}b"))

    assert again == [f"{HOME}b"]


def test_a_finished_page_is_not_tried_again(store: Store) -> None:
    assert store.begin_try(HOME)
    store.finish(page(HOME))

    assert not store.begin_try(HOME)
    assert store.rows()[0].tries == 1


def test_a_page_that_was_never_found_is_not_tried(store: Store) -> None:
    assert not store.begin_try("http://example.org/unheard-of")


def test_giving_up_keeps_the_reason_and_changes_no_visited_page(store: Store) -> None:
    store.add_links(page(HOME, f"{HOME}a"))
    store.finish(page(HOME))
    store.note_error(f"{HOME}a", "no answer")
    store.give_up(f"{HOME}a")
    store.give_up(HOME)

    assert [(row.state, row.error) for row in store.rows()] == [("visited", None), ("given up", "no answer")]
    assert store.counts() == Counts(visited=1, given_up=1)


def test_no_more_pages_than_allowed_become_known(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.begin(crawl(max_pages=3))

        found = store.add_links(page(HOME, *(f"{HOME}{number}" for number in range(10))))

        assert found == [f"{HOME}0", f"{HOME}1"]
        assert store.counts().known == 3


def test_no_link_is_followed_beyond_the_depth(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.begin(crawl(max_depth=1))
        store.add_links(page(HOME, f"{HOME}a"))

        found = store.add_links(page(f"{HOME}a", f"{HOME}b"))

        assert found == []
        assert [row.depth for row in store.rows()] == [0, 1]


def test_what_robots_txt_forbids_is_neither_visited_nor_linked(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.begin(crawl(robots="User-agent: *\nDisallow: /private/\n"))

        found = store.add_links(page(HOME, f"{HOME}private/a", f"{HOME}public"))

        assert found == [f"{HOME}public"]
        assert store.links() == [(HOME, f"{HOME}public")]


def test_links_are_counted_once_and_never_from_a_page_to_itself(store: Store) -> None:
    for _ in range(2):
        store.add_links(page(HOME, HOME, f"{HOME}a"))
    store.add_links(page(f"{HOME}a", HOME))

    assert store.links() == [(HOME, f"{HOME}a"), (f"{HOME}a", HOME)]
    assert [row.linked_from for row in store.rows()] == [1, 1]
