"""What a crawl found, as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

from .store import Row

LONGEST_LIST = 5


def summary(rows: Sequence[Row], *, link_count: int) -> str:
    """A few lines for people: how much there was, what everybody links to, what was slow, what did not work."""
    visited = [row for row in rows if row.state == "visited"]
    return "\n".join(
        [
            f"{plural(len(visited), 'page')} visited, {plural(link_count, 'link')} between them, "
            f"{sum(row.size_bytes for row in visited) / 1000:,.0f} kB",
            *counted(visited, "answered only after another try", lambda row: row.tries > 1),
            *counted(rows, "given up", lambda row: row.state == "given up"),
            *counted(rows, "never answered for", lambda row: row.state == "waiting"),
            *ranking("Most linked to", rows, lambda row: row.linked_from, "{:6.0f} times"),
            *ranking("Slowest", visited, lambda row: row.seconds, "{:10.2f} s"),
            *failures(rows),
        ]
    )


def counted(rows: Sequence[Row], what: str, is_meant: Callable[[Row], bool]) -> Iterator[str]:
    if number := sum(1 for row in rows if is_meant(row)):
        yield f"{number} {what}"


def ranking(heading: str, rows: Sequence[Row], weight: Callable[[Row], float], unit: str) -> Iterator[str]:
    """The first few by weight, heaviest first; nothing when there are none."""
    ranked = sorted((row for row in rows if weight(row) > 0), key=weight, reverse=True)
    if ranked:
        yield f"\n{heading}"
        for row in ranked[:LONGEST_LIST]:
            yield f"  {unit.format(weight(row))}  {path(row.url)}"


def failures(rows: Sequence[Row]) -> Iterator[str]:
    """Pages that do not exist, and pages that were given up, with the reason."""
    failed = [row for row in rows if row.state == "given up" or (row.status or 0) >= 400]
    if failed:
        yield "\nNot to be had"
        for row in failed[:LONGEST_LIST]:
            yield f"  {path(row.url)}: {row.error or row.status}"
        if len(failed) > LONGEST_LIST:
            yield f"  and {len(failed) - LONGEST_LIST} more"


def path(url: str) -> str:
    """A page without its host, which all pages of a crawl share."""
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
