"""A picture of the link graph, as SVG.

Pages are discs, the larger the more pages link to them. The largest parts of the site have a colour each. The pages
that most others link to carry their names; the others tell theirs when pointed at.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import takewhile
from urllib.parse import urlsplit

from .layout import Graph, Point, spread
from .store import Row
from .summary import plural

WIDTH, HEIGHT, MARGIN = 1200, 900, 60
MOST_LABELS = 28
LABELLED_HUBS = 8
PALETTE = ("#e4572e", "#2e86ab", "#f2a541", "#5fad56", "#9b5de5", "#00b4a0", "#d6589f", "#7a6c5d")
OTHER_COLOUR = "#9aa5b1"
PAPER, INK, FAINT_INK = "#fbfaf7", "#1f2933", "#7b8794"


def draw(rows: Sequence[Row], links: Sequence[tuple[str, str]], *, heading: str) -> str:
    """The link graph of a crawl as an SVG document."""
    graph = Graph.of(rows, links)
    places = fit(spread(graph))
    parts = parts_of_site(graph.rows)
    colours = colours_of(parts)
    detail = f"{plural(len(rows), 'page')}, {plural(len(links), 'link')}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
        '<g fill="none" stroke-width="0.8">',
        *curves(graph.links, places, colours),
        f'</g><g stroke="{PAPER}" stroke-width="1">',
        *discs(graph.rows, places, colours),
        '</g><g text-anchor="middle">',
        *labels(graph.rows, places, parts),
        "</g>",
        f'<text x="{MARGIN}" y="52" font-size="26" font-weight="bold" fill="{INK}">{escape(heading)}</text>',
        f'<text x="{MARGIN}" y="76" font-size="15" fill="{FAINT_INK}">{detail}</text>',
        *legend(parts, colours),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def fit(places: Mapping[str, Point]) -> dict[str, Point]:
    """The same places, stretched to fill the paper between heading and legend."""
    xs, ys = [place.real for place in places.values()], [place.imag for place in places.values()]
    across = (WIDTH - 2 * MARGIN) / max(max(xs) - min(xs), 1e-9)
    down = (HEIGHT - 3 * MARGIN) / max(max(ys) - min(ys), 1e-9)
    return {
        url: complex(MARGIN + (place.real - min(xs)) * across, 2 * MARGIN + (place.imag - min(ys)) * down)
        for url, place in places.items()
    }


def parts_of_site(rows: Sequence[Row]) -> dict[str, str]:
    """The part of the site that each page belongs to: the first part of its path that not all pages share."""
    paths = {row.url: urlsplit(row.url).path.strip("/").split("/") for row in rows if row.depth > 0}
    shared = shared_length(paths.values())
    return {row.url: "".join(paths.get(row.url, ())[shared : shared + 1]) for row in rows}


def colours_of(parts: Mapping[str, str]) -> dict[str, str]:
    """A colour for every page of the largest parts; all other pages have one together."""
    largest = [part for part, count in Counter(parts.values()).most_common() if part and count > 2]
    colours = dict(zip(largest, PALETTE, strict=False))
    return {url: colours.get(part, OTHER_COLOUR) for url, part in parts.items()}


def curves(links: Sequence[tuple[str, str]], places: Mapping[str, Point], colours: Mapping[str, str]) -> Iterator[str]:
    """The links, slightly bent so that both directions can be seen; those inside one part of the site stand out."""
    faint = min(0.7, max(0.15, 10 / math.sqrt(len(links) + 1)))
    for source, target in links:
        begin, end = places[source], places[target]
        bend = (begin + end) / 2 + (end - begin) * 0.12j
        is_inside = colours[source] == colours[target] != OTHER_COLOUR
        colour, opacity = (colours[target], max(faint, 0.5)) if is_inside else (OTHER_COLOUR, faint)
        yield (
            f'<path stroke="{colour}" stroke-opacity="{opacity:.2f}" d="M{begin.real:.1f} {begin.imag:.1f}'
            f'Q{bend.real:.1f} {bend.imag:.1f} {end.real:.1f} {end.imag:.1f}"/>'
        )


def discs(rows: Sequence[Row], places: Mapping[str, Point], colours: Mapping[str, str]) -> Iterator[str]:
    for row in rows:
        place, hint = places[row.url], f"{row.title}\n{row.url}\nlinked from {row.linked_from} pages"
        yield (
            f'<circle cx="{place.real:.1f}" cy="{place.imag:.1f}" r="{radius(row):.1f}" fill="{colours[row.url]}">'
            f"<title>{escape(hint)}</title></circle>"
        )


def radius(row: Row) -> float:
    return min(20.0, 2.5 + 1.3 * math.sqrt(row.linked_from))


@dataclass(frozen=True, slots=True)
class Box:
    """The room that a label takes."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def labels(rows: Sequence[Row], places: Mapping[str, Point], parts: Mapping[str, str]) -> Iterator[str]:
    """Names for the hubs: of the site, then of each part of it, then whoever still finds room."""
    hubs = sorted(rows, key=lambda row: -row.linked_from)
    hub_of_part = {parts[row.url]: row for row in reversed(hubs)}
    sizes = Counter(parts.values())
    hubs_of_parts = [hub_of_part[part] for part, _ in sizes.most_common(len(PALETTE)) if part]
    names = short_titles(rows)
    taken: list[Box] = []
    for row in dict.fromkeys((*hubs[:LABELLED_HUBS], *hubs_of_parts, *hubs)):
        size = min(20.0, 10 + radius(row) / 2)
        half = len(names[row.url]) * size * 0.28
        x = min(max(places[row.url].real, half + 8), WIDTH - half - 8)
        y = places[row.url].imag - radius(row) - 4
        box = Box(x - half, y - size, x + half, y + size * 0.3)
        if len(taken) == MOST_LABELS or any(box.overlaps(other) for other in taken):
            continue
        taken.append(box)
        # Twice, first as a halo: not every viewer knows the property that paints strokes below the fill.
        for paint in (f'stroke="{PAPER}" stroke-width="4" stroke-linejoin="round"', f'fill="{INK}"'):
            yield f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:.1f}" {paint}>{escape(names[row.url])}</text>'


def short_titles(rows: Sequence[Row]) -> dict[str, str]:
    """Titles without what all of them end in, such as the site's name, and never long."""
    titles = [row.title for row in rows if row.title]
    shared = shared_length(title[::-1] for title in titles) if len(titles) > 1 else 0
    return {row.url: shorten(row.title[: len(row.title) - shared] or urlsplit(row.url).path, 28) for row in rows}


def legend(parts: Mapping[str, str], colours: Mapping[str, str]) -> Iterator[str]:
    """One entry for every part of the site that has a colour of its own."""
    names = {colours[url]: part for url, part in parts.items()}
    for number, colour in enumerate(colour for colour in PALETTE if colour in names):
        x, y = MARGIN + number * (WIDTH - 2 * MARGIN) / len(PALETTE), HEIGHT - 24
        yield f'<circle cx="{x:.1f}" cy="{y - 5}" r="6" fill="{colour}"/>'
        yield f'<text x="{x + 12:.1f}" y="{y}" font-size="14" fill="{INK}">{escape(shorten(names[colour], 15))}</text>'


def shared_length(sequences: Iterable[Sequence[str]]) -> int:
    """How many items all the sequences begin with."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False)))


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
