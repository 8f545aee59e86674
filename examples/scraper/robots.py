"""What a site asks of robots, and where a crawl of it begins."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urljoin
from urllib.robotparser import RobotFileParser

import urllib3

from .page import USER_AGENT, FetchError, address

ALLOW_ALL = ""
ALLOW_NOTHING = "User-agent: *\nDisallow: /\n"


@dataclass(frozen=True, slots=True)
class Entrance:
    """The address at which a site really begins, its redirects followed, and the text of its robots.txt."""

    start: str
    robots: str


def knock(url: str) -> Entrance:
    """Find out how to crawl the site at this address.

    Blocks for the time of a few requests. Raises FetchError when the site does not answer, ValueError for an address
    that is not one of the web.
    """
    if address(url) is None:
        raise ValueError(f"{url!r} is no address to crawl; write one such as https://example.org/")
    try:
        with urllib3.PoolManager(headers={"User-Agent": USER_AGENT}, timeout=10.0, retries=2) as http:
            found = http.request("GET", address(url) or url, preload_content=False)
            found.close()
            start = address(found.geturl() or url, origin=url) or url
            robots = http.request("GET", urljoin(start, "/robots.txt"))
    except urllib3.exceptions.HTTPError as error:
        raise FetchError(f"{url} does not answer: {error}") from error
    return Entrance(start, robots_text(robots.status, robots.data))


def robots_text(status: int, body: bytes) -> str:
    """The rules that an answer for robots.txt stands for: a site that has none allows all, one in trouble nothing."""
    if status == HTTPStatus.OK:
        return body.decode("utf-8", errors="replace")
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN} or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return ALLOW_NOTHING
    return ALLOW_ALL


def read_robots(text: str) -> RobotFileParser:
    """The standard library's parser, fed with text instead of left to fetch it."""
    robots = RobotFileParser()
    robots.parse(text.splitlines())
    return robots


def polite_rate(pages_per_second: float, robots: RobotFileParser) -> float:
    """Pages a second: as many as wanted, or fewer when robots.txt sets a crawl delay or a request rate."""
    limits = [pages_per_second]
    if delay := robots.crawl_delay(USER_AGENT):
        limits.append(1 / float(delay))
    if rate := robots.request_rate(USER_AGENT):
        limits.append(rate.requests / rate.seconds)
    return min(limits)
