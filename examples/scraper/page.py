"""A page of the web: fetched with urllib3, parsed with Beautiful Soup."""

from __future__ import annotations

import time
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit, urlunsplit

import urllib3
from bs4 import BeautifulSoup, SoupStrainer  # type: ignore[attr-defined]  # documented, but not in its __all__

USER_AGENT = "ekiden-scraper/1"
MOST_BYTES = 2_000_000
DEFAULT_PORTS = {"http": 80, "https": 443}
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class FetchError(Exception):
    """No answer, or one that says "not now": worth another try."""


@dataclass(frozen=True, slots=True)
class Response:
    """What a server answered. ``body`` is empty unless it is HTML, and cut off after ``MOST_BYTES``."""

    url: str
    status: int
    body: bytes
    charset: str | None
    location: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Page:
    """What a crawl keeps of a response. ``links`` stay on the page's own host, in order, each once."""

    url: str
    status: int
    title: str
    links: tuple[str, ...]
    size_bytes: int
    seconds: float


def fetch(url: str) -> Response:
    """Ask for one page. A redirect is not followed: where it leads is a page of its own.

    Blocks until the answer is there. Raises FetchError for trouble that may pass: the network's, or a status such as
    503. A server that sends a byte now and then can make this last for ever; the time limit of the task ends it.
    """
    started = time.monotonic()
    headers = {"User-Agent": USER_AGENT, "Accept": "text/html", "Accept-Encoding": "gzip, deflate"}
    try:
        with urllib3.PoolManager(headers=headers, timeout=5.0, retries=False) as http:
            answer = http.request("GET", url, redirect=False, preload_content=False)
            kind, _, parameters = answer.headers.get("Content-Type", "").lower().partition(";")
            body = answer.read(MOST_BYTES, decode_content=True) if kind.strip() == "text/html" else b""
    except urllib3.exceptions.HTTPError as error:
        raise FetchError(f"{url}: {error}") from error
    if answer.status in TRY_AGAIN:
        raise FetchError(f"{url}: the server says {answer.status}")
    return Response(
        url=url,
        status=answer.status,
        body=body,
        charset=parameters.partition("charset=")[2].strip(' "') or None,
        location=answer.headers.get("Location"),
        seconds=time.monotonic() - started,
    )


def parse(response: Response) -> Page:
    """Find the title and the links. A redirect is a page whose only link is where it leads."""
    wanted = SoupStrainer(["title", "base", "a"])
    soup = BeautifulSoup(response.body, "html.parser", from_encoding=response.charset, parse_only=wanted)
    base = soup.find("base", href=True)
    origin = urljoin(response.url, str(base["href"])) if base else response.url
    targets = [str(anchor["href"]) for anchor in soup.find_all("a", href=True)]
    if response.location is not None:
        targets = [response.location]
    links = (address(target, origin=origin) for target in targets)
    return Page(
        url=response.url,
        status=response.status,
        title=" ".join(soup.title.get_text().split()) if soup.title else "",
        links=tuple(dict.fromkeys(link for link in links if link and host(link) == host(response.url))),
        size_bytes=len(response.body),
        seconds=response.seconds,
    )


def address(target: str, *, origin: str = "") -> str | None:
    """The one way to write where a link leads, so that a page has one address; None unless that is http or https.

    >>> address("../a?b=1#part", origin="HTTP://Example.org:80/x/y")
    'http://example.org/a?b=1'
    """
    try:
        parts = urlsplit(urljoin(origin, target.strip()))
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        return None
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    authority = name if port in {None, DEFAULT_PORTS[parts.scheme]} else f"{name}:{port}"
    return urlunsplit((parts.scheme, authority, parts.path or "/", parts.query, ""))


def host(url: str) -> str:
    """Whom a page belongs to: the host and its port."""
    return urlsplit(url).netloc
