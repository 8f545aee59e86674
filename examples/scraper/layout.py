"""Where the pages of a link graph go on a plane.

The layout starts as a tree, every page in the arms of the page that found it. Then it relaxes: pages that are linked
pull each other closer, pages that are crowded push each other apart. There is no chance in it: the same graph gives
the same picture.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .store import Row

MOST_PAGES = 600
ROUNDS = 90
REACH = 3.0

Point = complex


@dataclass(frozen=True, slots=True)
class Graph:
    """What is drawn: pages, the links between them, and who found whom."""

    rows: tuple[Row, ...]
    links: tuple[tuple[str, str], ...]
    parents: Mapping[str, str]

    @classmethod
    def of(cls, rows: Sequence[Row], links: Sequence[tuple[str, str]]) -> Graph:
        """The graph without what makes a picture unreadable: pages beyond the most linked few hundred, and links to
        pages that nearly everybody links to, such as a site's navigation."""
        kept = sorted(rows, key=lambda row: (row.depth > 0, -row.linked_from))[:MOST_PAGES]
        urls = {row.url for row in kept}
        everywhere = {row.url for row in kept if row.linked_from > max(12, len(rows) / 2)}
        parents = {row.url: row.found_by for row in kept if row.found_by is not None and row.found_by in urls}
        shown = {(source, target) for source, target in links if source in urls and target in urls - everywhere}
        shown |= {(parent, url) for url, parent in parents.items()}
        return cls(tuple(kept), tuple(sorted(shown)), parents)


def spread(graph: Graph) -> dict[str, Point]:
    """A place for every page. Takes about half a second for three hundred pages."""
    rings = 1 + max((row.depth for row in graph.rows), default=0)
    width = 0.8 * math.sqrt(len(graph.rows)) / rings
    places = {url: place * width for url, place in tree_places(graph).items()}
    degrees = Counter(url for link in graph.links for url in link)
    # The links of a hub are weak each, or it would pull the whole site into one ball.
    strengths = {link: 1.2 / math.sqrt(degrees[link[0]] * degrees[link[1]]) for link in graph.links}
    for number in range(ROUNDS):
        longest_step = 1.2 * (1 - number / ROUNDS)
        for url, force in forces(places, strengths, degrees).items():
            places[url] += 0.5 * force if abs(force) <= longest_step else force / abs(force) * longest_step
    return places


def tree_places(graph: Graph) -> dict[str, Point]:
    """Every page on the ring of its depth, in the sector of the page that found it."""
    children: dict[str | None, list[str]] = defaultdict(list)
    for row in graph.rows:
        children[graph.parents.get(row.url)].append(row.url)
    depths = {row.url: row.depth for row in graph.rows}
    sizes = dict.fromkeys(depths, 1)
    for url in sorted(depths, key=depths.__getitem__, reverse=True):
        if url in graph.parents:
            sizes[graph.parents[url]] += sizes[url]
    places: dict[str, Point] = {}
    sectors = [(children[None], 0.0, math.tau)]
    for urls, begin, width in sectors:
        share = width / max(1, sum(sizes[url] for url in urls))
        for url in urls:
            angle = begin + sizes[url] * share / 2
            # A little further out for every page, or two of them could share a point and never come apart.
            radius = depths[url] + len(places) * 1e-3
            places[url] = radius * complex(math.cos(angle), math.sin(angle))
            sectors.append((children[url], begin, sizes[url] * share))
            begin += sizes[url] * share
    return places


def forces(
    places: Mapping[str, Point], strengths: Mapping[tuple[str, str], float], degrees: Mapping[str, int]
) -> dict[str, Point]:
    """What moves each page: the centre, its neighbours, its links."""
    found = {url: -0.02 * place for url, place in places.items()}
    for url, other in neighbours(places):
        away = places[url] - places[other]
        push = away / (abs(away) ** 2 + 0.01) * (1 + 0.3 * math.log1p(min(degrees.get(url, 0), degrees.get(other, 0))))
        found[url] += push
        found[other] -= push
    for (source, target), strength in strengths.items():
        pull = (places[target] - places[source]) * strength
        found[source] += pull
        found[target] -= pull
    return found


def neighbours(places: Mapping[str, Point]) -> Iterator[tuple[str, str]]:
    """Every pair of pages within reach of each other, once, found through a grid as wide as the reach."""
    grid: dict[tuple[int, int], list[str]] = defaultdict(list)
    for url, place in places.items():
        grid[math.floor(place.real / REACH), math.floor(place.imag / REACH)].append(url)
    for (column, line), urls in grid.items():
        for number, url in enumerate(urls):
            for other in urls[number + 1 :]:
                yield url, other
        for cell in ((column + 1, line - 1), (column + 1, line), (column + 1, line + 1), (column, line + 1)):
            for other in grid.get(cell, ()):
                for url in urls:
                    if abs(places[url] - places[other]) < REACH:
                        yield url, other
