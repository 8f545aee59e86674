"""The site that the scraper's demo serves: it hangs together, and the server behaves as badly as it says."""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import urllib3

from examples.scraper.page import USER_AGENT, Response, parse
from examples.scraper.robots import knock, read_robots
from examples.scraper.server import Temper, serving, temper
from examples.scraper.site import Site, read_site

HOST = "http://127.0.0.1"


def reachable(site: Site) -> set[str]:
    """Every path that links lead to, from the front page on."""
    found, waiting = {"/"}, ["/"]
    robots = read_robots("User-agent: *\nDisallow: /source/\n")
    for path in waiting:
        html = site.page(path)
        assert html is not None, path
        page = parse(Response(HOST + path, 200, html.encode(), charset=None, location=None, seconds=0.0))
        for link in page.links:
            if robots.can_fetch(USER_AGENT, link) and (linked := link.removeprefix(HOST)) not in found:
                found.add(linked)
                waiting.append(linked)
    return found


@pytest.mark.parametrize("page_count", [1, 2, 30, 100])
@pytest.mark.slow
def test_a_site_has_as_many_pages_as_wanted_and_links_lead_to_all(page_count: int) -> None:
    site = read_site(page_count)

    assert len(site.paths) == page_count
    assert reachable(site) == set(site.paths)


@pytest.mark.slow
def test_the_whole_library_is_several_hundred_pages_and_links_lead_to_all() -> None:
    site = read_site(10_000)

    assert len(site.paths) >= 300
    assert reachable(site) == set(site.paths)


def test_reading_modules_imports_none_of_them() -> None:
    before = set(sys.modules)

    site = read_site(30)

    assert set(sys.modules) - before <= {"ast"}
    assert "asyncio.windows_events" in site.modules


def test_a_module_page_shows_docstring_contents_and_both_directions() -> None:
    site = read_site(40)

    html = site.page("/heapq") or ""

    assert "Heap queue algorithm" in html
    assert "heappush" in html or "merge(*iterables" in html
    assert '<a href="/asyncio/queues">asyncio.queues</a>' in html


def test_paths_without_a_page_are_none() -> None:
    site = read_site(2)

    assert site.page("/missing") is None
    assert site.page("/../etc/passwd") is None
    assert site.source("/source/missing") is None


@pytest.mark.slow
def test_every_temper_occurs_in_the_default_site() -> None:
    tempers = Counter(temper(path) for path in read_site(300).paths)

    assert set(tempers) == set(Temper)
    assert tempers[Temper.CALM] > 150


def test_what_was_served_is_counted_from_many_threads() -> None:
    site = read_site(40)
    calm = [path for path in site.paths if temper(path) is Temper.CALM]

    with serving(site) as server, urllib3.PoolManager() as http, ThreadPoolExecutor(8) as threads:
        statuses = list(threads.map(lambda path: http.request("GET", server.url.rstrip("/") + path).status, calm * 3))

    assert set(statuses) == {200}
    assert server.served == Counter(calm * 3)


def test_the_server_forbids_sources_to_robots_and_shows_them_to_people() -> None:
    with serving(read_site(2)) as server:
        entrance = knock(server.url)
        source = urllib3.request("GET", f"{server.url}source/asyncio")

    assert entrance.start == server.url
    assert not read_robots(entrance.robots).can_fetch(USER_AGENT, f"{server.url}source/asyncio")
    assert source.status == 200
    assert b"import" in source.data


def test_a_taken_port_is_refused() -> None:
    with (
        serving(read_site(1)) as server,
        pytest.raises(OSError, match="in use"),
        serving(read_site(1), port=server.server_port),
    ):
        pass
