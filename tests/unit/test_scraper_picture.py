"""The scraper's picture and summary: complete, readable, the same every time, for graphs of every shape."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from examples.scraper.layout import MOST_PAGES, Graph, neighbours, spread
from examples.scraper.picture import HEIGHT, OTHER_COLOUR, WIDTH, colours_of, draw, parts_of_site, short_titles
from examples.scraper.store import Row
from examples.scraper.summary import summary

HOME = "http://example.org/"
SVG = "{http://www.w3.org/2000/svg}"


def row(url: str, *, depth: int = 1, found_by: str | None = HOME, **changes: object) -> Row:
    values: dict[str, object] = {
        "state": "visited",
        "status": 200,
        "title": f"{url.removeprefix(HOME)} - Example",
        "size_bytes": 1000,
        "seconds": 0.1,
        "tries": 1,
        "error": None,
        "linked_from": 1,
    }
    return Row(url=url, depth=depth, found_by=found_by, **{**values, **changes})  # type: ignore[arg-type]


HOME_ROW = row(HOME, depth=0, found_by=None, title="Home - Example")


def star(count: int) -> tuple[list[Row], list[tuple[str, str]]]:
    """A start page and ``count`` pages around it."""
    urls = [f"{HOME}part{number % 5}/{number}" for number in range(count)]
    return [HOME_ROW, *map(row, urls)], [(HOME, url) for url in urls]


@pytest.mark.parametrize("count", [0, 1, 2, 50, 300])
def test_every_page_is_a_disc_within_the_paper(count: int) -> None:
    rows, links = star(count)

    svg = ElementTree.fromstring(draw(rows, links, heading="Example"))

    hints = [title.text or "" for title in svg.iterfind(f".//{SVG}circle/{SVG}title")]
    assert sorted(hint.splitlines()[1] for hint in hints) == sorted(one.url for one in rows)
    for disc in svg.iterfind(f".//{SVG}circle"):
        assert 0 <= float(disc.attrib["cx"]) <= WIDTH
        assert 0 <= float(disc.attrib["cy"]) <= HEIGHT


def test_the_same_crawl_gives_the_same_picture() -> None:
    rows, links = star(80)

    assert draw(rows, links, heading="Example") == draw(rows, links, heading="Example")


def test_no_two_pages_end_up_in_one_place() -> None:
    rows, links = star(120)

    places = spread(Graph.of(rows, links))

    assert len(places) == len(rows)
    assert min(abs(places[one] - places[other]) for one, other in neighbours(places)) > 0.05


def test_markup_in_titles_is_shown_and_not_obeyed() -> None:
    rows = [row(HOME, depth=0, found_by=None, title="</title><script>alert('&')</script>")]

    svg = draw(rows, [], heading="<b>&")

    assert "<script>" not in svg
    assert ElementTree.fromstring(svg) is not None


def test_a_huge_site_shows_its_most_linked_pages_and_always_the_start() -> None:
    rows = [HOME_ROW, *(row(f"{HOME}{number}", linked_from=number) for number in range(1, MOST_PAGES + 200))]

    graph = Graph.of(rows, [])

    assert len(graph.rows) == MOST_PAGES
    assert HOME_ROW in graph.rows
    assert f"{HOME}1" not in {one.url for one in graph.rows}


def test_links_to_pages_linked_from_everywhere_are_left_out_but_for_the_tree() -> None:
    pages = [row(f"{HOME}{number}", linked_from=1) for number in range(30)]
    rows = [row(HOME, depth=0, found_by=None, linked_from=30), *pages]
    links = [(one.url, HOME) for one in pages] + [(HOME, one.url) for one in pages]

    graph = Graph.of(rows, links)

    assert set(graph.links) == {(HOME, one.url) for one in pages}


def test_parts_of_a_site_are_where_paths_begin_to_differ() -> None:
    rows = [HOME_ROW, *(row(f"{HOME}docs/{part}/{number}") for part in "ab" for number in range(3))]
    rows.append(row(f"{HOME}docs/single"))

    parts = parts_of_site(rows)
    colours = colours_of(parts)

    assert parts[f"{HOME}docs/a/1"] == "a"
    assert colours[f"{HOME}docs/a/1"] == colours[f"{HOME}docs/a/2"] != colours[f"{HOME}docs/b/1"]
    assert colours[f"{HOME}docs/single"] == colours[HOME] == OTHER_COLOUR


def test_titles_lose_what_all_of_them_end_in() -> None:
    rows = [HOME_ROW, row(f"{HOME}about"), row(f"{HOME}untitled", title=""), row(f"{HOME}{'long' * 20}")]

    names = short_titles(rows)

    assert names[HOME] == "Home"
    assert names[f"{HOME}about"] == "about"
    assert names[f"{HOME}untitled"] == "/untitled"
    assert len(names[rows[3].url]) == 28


def test_the_summary_tells_numbers_hubs_slow_pages_and_failures() -> None:
    rows = [
        row(HOME, depth=0, found_by=None, linked_from=7),
        row(f"{HOME}slow?page=2", seconds=2.5, tries=3),
        row(f"{HOME}missing", status=404),
        row(f"{HOME}gone", state="given up", status=None, error="no answer", tries=6),
    ]

    text = summary(rows, link_count=12)

    assert "3 pages visited, 12 links between them, 3 kB" in text
    assert "1 answered only after another try" in text
    assert "1 given up" in text
    assert "7 times  /\n" in text
    assert "2.50 s  /slow?page=2" in text
    assert "/missing: 404" in text
    assert "/gone: no answer" in text


def test_the_summary_of_a_crawl_without_trouble_mentions_none() -> None:
    text = summary([HOME_ROW], link_count=0)

    assert "1 page visited, 0 links" in text
    assert "given up" not in text
    assert "Not to be had" not in text
