"""Pages of the scraper: what it fetches, which links it takes, how it writes them."""

from __future__ import annotations

import pytest

from examples.scraper.page import FetchError, Response, address, fetch, parse
from examples.scraper.server import Temper, serving, temper
from examples.scraper.site import read_site


def response(html: str, *, url: str = "http://example.org/a/b", location: str | None = None) -> Response:
    return Response(url, 200, html.encode(), charset=None, location=location, seconds=0.0)


def test_title_and_links_are_read_in_their_order_each_once() -> None:
    page = parse(
        response(
            "<title> Two\n words </title><a href='c'>1</a><a href='/d?x=1#part'>2</a><a href='./c'>3</a><a name='n'>"
        )
    )

    assert page.title == "Two words"
    assert page.links == ("http://example.org/a/c", "http://example.org/d?x=1")


def test_links_to_other_hosts_and_other_schemes_are_left_out() -> None:
    page = parse(
        response(
            "<a href='http://example.com/'>1</a><a href='http://example.org:8080/'>2</a><a href='mailto:a@b'>3</a>"
            "<a href='javascript:void(0)'>4</a><a href='http://[broken/'>5</a><a href='http://example.org:x/'>6</a>"
            "<a href='//example.org/kept'>7</a>"
        )
    )

    assert page.links == ("http://example.org/kept",)


def test_a_base_element_moves_relative_links() -> None:
    page = parse(response("<base href='/elsewhere/'><a href='c'>1</a>"))

    assert page.links == ("http://example.org/elsewhere/c",)


def test_a_redirect_is_a_page_whose_only_link_is_where_it_leads() -> None:
    page = parse(response("<a href='c'>moved</a>", location="/new"))

    assert page.links == ("http://example.org/new",)


@pytest.mark.parametrize(
    "html",
    ["", "<a href", "<a href=''>itself</a>", "<title></title>", "\x00\ufffd<p", "<a href=x><a href=y><title>z"],
)
def test_broken_html_is_still_a_page(html: str) -> None:
    page = parse(response(html))

    assert all(link.startswith("http://example.org/") for link in page.links)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("HTTP://Example.ORG", "http://example.org/"),
        ("http://example.org:80/a", "http://example.org/a"),
        ("https://example.org:443/a", "https://example.org/a"),
        ("https://example.org:80/a", "https://example.org:80/a"),
        ("http://[::1]:8000/a#b", "http://[::1]:8000/a"),
        (" http://example.org/a?b ", "http://example.org/a?b"),
        ("ftp://example.org/", None),
        ("http:///nowhere", None),
        ("http://[", None),
        ("", None),
    ],
)
def test_an_address_is_written_in_one_way(target: str, expected: str | None) -> None:
    assert address(target) == expected


def test_a_page_is_fetched_with_its_title_and_status() -> None:
    with serving(read_site(3)) as server:
        page = parse(fetch(server.url))

    assert page.status == 200
    assert page.title.startswith("Python 3.")
    assert f"{server.url}asyncio" in page.links


def test_a_page_that_does_not_exist_is_an_answer_and_no_error() -> None:
    with serving(read_site(1)) as server:
        missing = fetch(f"{server.url}missing")

    assert missing.status == 404
    assert missing.body == b""


@pytest.mark.parametrize("mood", [Temper.BUSY, Temper.RUDE])
@pytest.mark.slow
def test_trouble_that_passes_is_a_fetch_error_and_then_a_page(mood: Temper) -> None:
    site = read_site(60)
    path = next(path for path in site.paths if temper(path) is mood)

    with serving(site) as server:
        url = server.url.removesuffix("/") + path
        with pytest.raises(FetchError, match=path):
            fetch(url)
        again = fetch(url)

    assert again.status == 200


def test_a_server_that_is_gone_is_a_fetch_error() -> None:
    with serving(read_site(1)) as server:
        url = server.url

    with pytest.raises(FetchError, match=r"127\.0\.0\.1"):
        fetch(url)
