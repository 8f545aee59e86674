"""The scraper's manners: where a crawl may go, and how fast."""

from __future__ import annotations

import pytest

from examples.scraper.page import USER_AGENT, FetchError
from examples.scraper.robots import knock, polite_rate, read_robots, robots_text
from examples.scraper.server import serving
from examples.scraper.site import read_site

HOME = "https://example.org/"


@pytest.mark.parametrize(
    ("status", "body", "may_enter"),
    [
        (200, b"User-agent: *\nDisallow: /private/\n", True),
        (200, b"User-agent: *\nDisallow: /\n", False),
        (200, b"User-agent: ekiden-scraper\nDisallow: /\n\nUser-agent: *\nAllow: /\n", False),
        (200, b"\xff\xfe not text", True),
        (404, b"Disallow: /", True),
        (401, b"", False),
        (403, b"", False),
        (503, b"", False),
    ],
)
def test_a_site_says_whether_it_may_be_entered(status: int, body: bytes, may_enter: bool) -> None:
    robots = read_robots(robots_text(status, body))

    assert robots.can_fetch(USER_AGENT, HOME) is may_enter


@pytest.mark.parametrize(
    ("robots", "expected"),
    [
        ("", 5.0),
        ("User-agent: *\nCrawl-delay: 4\n", 0.25),
        ("User-agent: *\nRequest-rate: 2/10\n", 0.2),
        ("User-agent: *\nCrawl-delay: 0\n", 5.0),
        ("User-agent: another\nCrawl-delay: 4\n", 5.0),
    ],
)
def test_a_crawl_is_never_faster_than_the_site_asks(robots: str, expected: float) -> None:
    assert polite_rate(5.0, read_robots(robots)) == pytest.approx(expected)


@pytest.mark.parametrize("url", ["", "example.org", "ftp://example.org/", "http://", "file:///etc/passwd"])
def test_what_is_no_address_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(ValueError, match="no address to crawl; write one such as https://"):
        knock(url)


def test_a_site_that_does_not_answer_is_named() -> None:
    with serving(read_site(1)) as server:
        url = server.url

    with pytest.raises(FetchError, match=f"{url} does not answer"):
        knock(url)
