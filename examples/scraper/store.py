"""What a crawl knows, in one SQLite file: its rules, every page it has heard of, every link between them.

A page's row is made when the first link to it is seen, and its primary key decides which link that was, however many
workers see one at once. ``found_by`` names the page that won: its visit is the one that has to enqueue the new page.

    waiting -> visited     it was fetched, and every page found on it has been enqueued
    waiting -> given up    it could not be fetched, however often it was tried
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .page import USER_AGENT, Page
from .robots import read_robots

FILE_NAME = "crawl.sqlite"
SCHEMA = """
    CREATE TABLE IF NOT EXISTS crawl (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        id TEXT NOT NULL, url TEXT, start TEXT NOT NULL,
        max_pages INTEGER NOT NULL, max_depth INTEGER NOT NULL, robots TEXT NOT NULL
    );
    CREATE TABLE IF NOT EXISTS pages (
        url TEXT PRIMARY KEY, found_by TEXT, depth INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'waiting',
        status INTEGER, title TEXT NOT NULL DEFAULT '', size_bytes INTEGER NOT NULL DEFAULT 0,
        seconds REAL NOT NULL DEFAULT 0, tries INTEGER NOT NULL DEFAULT 0, error TEXT
    );
    CREATE INDEX IF NOT EXISTS pages_found_by ON pages (found_by);
    CREATE INDEX IF NOT EXISTS pages_waiting ON pages (state) WHERE state = 'waiting';
    CREATE TABLE IF NOT EXISTS links (source TEXT, target TEXT, PRIMARY KEY (source, target)) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Crawl:
    """The rules of a crawl: where it starts, how far it goes, and what the site's robots.txt says.

    ``id`` is like no other crawl's, so that crawls may share a broker. ``url`` is what was asked for: ``start`` before
    redirects, or None for the site that the demo serves itself.
    """

    id: str
    url: str | None
    start: str
    max_pages: int
    max_depth: int
    robots: str


@dataclass(frozen=True, slots=True)
class Counts:
    """How many pages are in each state."""

    waiting: int = 0
    visited: int = 0
    given_up: int = 0

    @property
    def known(self) -> int:
        return self.waiting + self.visited + self.given_up


@dataclass(frozen=True, slots=True)
class Row:
    """A page as the store knows it. ``linked_from`` counts the other pages that link to it."""

    url: str
    found_by: str | None
    depth: int
    state: str
    status: int | None
    title: str
    size_bytes: int
    seconds: float
    tries: int
    error: str | None
    linked_from: int


class Store:
    """One connection to a crawl's file. For the thread that opened it; other threads and processes open their own."""

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / FILE_NAME
        self._database = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        self._database.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;" + SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    def begin(self, crawl: Crawl) -> None:
        """Write down a new crawl, its start page waiting. A crawl that has begun already keeps its own rules."""
        with self._transaction() as database:
            database.execute(
                "INSERT OR IGNORE INTO crawl VALUES (1, ?, ?, ?, ?, ?, ?)",
                (crawl.id, crawl.url, crawl.start, crawl.max_pages, crawl.max_depth, crawl.robots),
            )
            database.execute("INSERT OR IGNORE INTO pages (url, depth) SELECT start, 0 FROM crawl")

    @property
    def has_begun(self) -> bool:
        """Whether this is the store of a crawl already."""
        return self._database.execute("SELECT 1 FROM crawl").fetchone() is not None

    def crawl(self) -> Crawl:
        """The rules of the crawl. Raises LookupError when none has begun here."""
        row = self._database.execute("SELECT id, url, start, max_pages, max_depth, robots FROM crawl").fetchone()
        if row is None:
            raise LookupError(f"no crawl has begun in {self.path}")
        return Crawl(*row)

    def begin_try(self, url: str) -> bool:
        """Count another try of a page that waits; False when there is nothing left to do for it."""
        query = "UPDATE pages SET tries = tries + 1 WHERE url = ? AND state = 'waiting'"
        return self._database.execute(query, (url,)).rowcount == 1

    def note_error(self, url: str, error: str) -> None:
        """Why the last try of a page failed."""
        self._database.execute("UPDATE pages SET error = ? WHERE url = ?", (error, url))

    def add_links(self, page: Page) -> list[str]:
        """Keep the links of a page and make rows for pages never heard of, as far as the rules of the crawl go.

        Returns the pages found by this one that still wait: at its first delivery the new ones, at a later delivery
        also those which a killed worker had found and perhaps not enqueued.
        """
        crawl = self.crawl()
        robots = read_robots(crawl.robots)
        links = [link for link in page.links if robots.can_fetch(USER_AGENT, link)]
        with self._transaction() as database:
            database.executemany(
                "INSERT OR IGNORE INTO links VALUES (?, ?)", [(page.url, link) for link in links if link != page.url]
            )
            # Counted and inserted in one transaction, so that no two workers fill the same last place.
            (known,) = database.execute("SELECT count(*) FROM pages").fetchone()
            (depth,) = database.execute("SELECT depth FROM pages WHERE url = ?", (page.url,)).fetchone()
            for link in links if depth < crawl.max_depth else ():
                if known >= crawl.max_pages:
                    break
                query = "INSERT OR IGNORE INTO pages (url, found_by, depth) VALUES (?, ?, ?)"
                known += database.execute(query, (link, page.url, depth + 1)).rowcount
            query = "SELECT url FROM pages WHERE found_by = ? AND state = 'waiting' ORDER BY rowid"
            return [url for (url,) in database.execute(query, (page.url,))]

    def finish(self, page: Page) -> None:
        """The page has been visited and nothing is left to do for it."""
        self._database.execute(
            """
            UPDATE pages SET state = 'visited', status = ?, title = ?, size_bytes = ?, seconds = ?, error = NULL
            WHERE url = ? AND state = 'waiting'
            """,
            (page.status, page.title, page.size_bytes, page.seconds, page.url),
        )

    def give_up(self, url: str) -> None:
        """The page will not be tried again."""
        self._database.execute("UPDATE pages SET state = 'given up' WHERE url = ? AND state = 'waiting'", (url,))

    def waiting(self) -> list[str]:
        """The pages that have not been visited yet, in the order in which they were found."""
        query = "SELECT url FROM pages WHERE state = 'waiting' ORDER BY rowid"
        return [url for (url,) in self._database.execute(query)]

    def counts(self) -> Counts:
        numbers = dict(self._database.execute("SELECT state, count(*) FROM pages GROUP BY state").fetchall())
        return Counts(numbers.get("waiting", 0), numbers.get("visited", 0), numbers.get("given up", 0))

    def rows(self) -> list[Row]:
        """Every page, in the order in which they were found."""
        query = """
            SELECT url, found_by, depth, state, status, title, size_bytes, seconds, tries, error,
                   coalesce(linked_from, 0)
            FROM pages LEFT JOIN (SELECT target, count(*) AS linked_from FROM links GROUP BY target) ON target = url
            ORDER BY pages.rowid
        """
        return [Row(*row) for row in self._database.execute(query)]

    def links(self) -> list[tuple[str, str]]:
        """Source and target of every link between two pages of this crawl."""
        query = "SELECT source, target FROM links JOIN pages ON url = target ORDER BY source, target"
        return self._database.execute(query).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            yield self._database
