"""The command: crawl a site with a real worker process, show how it goes, say what was found."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit
from uuid import uuid4

import click
from ekiden.errors import EkidenError

from . import tasks
from .page import FetchError, host
from .picture import draw
from .progress import Progress, progress
from .robots import knock, polite_rate, read_robots
from .server import serving
from .site import read_site
from .store import Crawl, Store
from .summary import summary
from .worker import Worker

MOST_WORKERS = 5
TICK_SECONDS = 0.1
OWN_SITE_PAGES_PER_SECOND, OTHER_SITE_PAGES_PER_SECOND = 100.0, 5.0


@click.command(name="demo")
@click.option("--url", help="The site to crawl. Without it: one made of Python's standard library, served here.")
@click.option("--pages", default=300, show_default=True, type=click.IntRange(1), help="Visit at most so many pages.")
@click.option("--depth", default=30, show_default=True, type=click.IntRange(0), help="Follow at most so many links.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Pages a second.  [default: 5; 100 at home]")
@click.option("--broker", envvar="EKIDEN_BROKER_URL", help="The broker's URL.  [default: a file in the directory]")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the crawl is kept. One that has not ended is continued.  [default: a new one in .ekiden/]",
)
@click.option("--kill", is_flag=True, help="kill -9 the worker half way, to see that nothing is lost.")
def demo(
    *,
    url: str | None,
    pages: int,
    depth: int,
    rate: float | None,
    broker: str | None,
    directory: Path | None,
    kill: bool,
) -> None:
    """Crawl a site with ekiden: fetch its pages in parallel, once each, and draw how they are linked."""
    directory = (directory or Path(".ekiden") / time.strftime("crawl-%Y%m%d-%H%M%S")).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        tasks.app.conf.broker_url = broker or f"sqlite:///{quote(str(directory / 'broker.db'))}"
        with stop_signals_interrupt(), tasks.app, Store(directory) as store:
            if store.has_begun and url not in {None, store.crawl().url}:
                raise click.UsageError(
                    f"{directory} holds a crawl of {store.crawl().start}; choose another --directory"
                )
            with entrance(store, url=url, pages=pages, depth=depth) as crawl:
                run(store, crawl, directory, rate=rate, kill=kill)
            report(store, crawl, directory)
    except (EkidenError, FetchError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo(f"\nInterrupted. To continue: ekiden demo --directory {directory}", err=True)
        raise click.exceptions.Exit(130) from None


@contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a closed terminal, end the block as Ctrl-C does, so that the worker is stopped too.

    What is ignored stays so: ``nohup`` has a program outlive its terminal.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    heard = [number for number in numbers if before[number] is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


@contextmanager
def entrance(store: Store, *, url: str | None, pages: int, depth: int) -> Iterator[Crawl]:
    """The crawl of this store, begun now or earlier; while it lasts, its site is served if it is our own."""
    known = store.crawl() if store.has_begun else None
    if (url := known.url if known else url) is not None:
        yield known or begin(store, url=url, start=url, pages=pages, depth=depth)
        return
    click.echo("Making a site out of Python's standard library ...")
    site = read_site(known.max_pages if known else pages)
    # A crawl goes on where it began: its pages have their port in their names.
    with serving(site, port=urlsplit(known.start).port or 0 if known else 0) as server:
        yield known or begin(store, url=None, start=server.url, pages=pages, depth=depth)


def begin(store: Store, *, url: str | None, start: str, pages: int, depth: int) -> Crawl:
    found = knock(start)
    store.begin(Crawl(uuid4().hex, url, found.start, pages, depth, found.robots))
    return store.crawl()


def run(store: Store, crawl: Crawl, directory: Path, *, rate: float | None, kill: bool) -> None:
    """Crawl until no page waits any more."""
    wanted = rate or (OTHER_SITE_PAGES_PER_SECOND if crawl.url else OWN_SITE_PAGES_PER_SECOND)
    pages_per_second = polite_rate(wanted, read_robots(crawl.robots))
    click.echo(f"Crawling {crawl.start}, at most {pages_per_second:g} pages a second, into {directory}")
    environment = {
        "EKIDEN_BROKER_URL": tasks.app.conf.broker_url or "",
        "SCRAPER_PAGES_PER_SECOND": f"{pages_per_second:f}",
        "PYTHONPATH": str(Path(__file__).parents[tasks.__name__.count(".")]),
    }
    if store.counts().known == 1 or queue_is_empty():
        tasks.enqueue(str(directory), crawl.id, store.waiting())
    worker = Worker(directory, target=f"{tasks.__name__}:app", name=f"scraper-{crawl.id}", environment=environment)
    with worker, progress() as shown:
        follow(store, worker, shown, kill=kill)


def follow(store: Store, worker: Worker, shown: Progress, *, kill: bool) -> None:
    """Show how the crawl goes until it ends, and start the worker again whenever it dies."""
    started = 1
    shown.say(f"The worker is process {worker.pid}. Kill it, if you like: kill -9 {worker.pid}")
    while (counts := store.counts()).waiting:
        shown.show(counts, tasks.app.transport.depth("fetch"))
        if queue_is_empty() and store.counts().waiting:
            shown.say("The queue is empty: the rest went to the dead letters (ekiden dead list).")
            return
        if kill and counts.visited > counts.known / 2:
            kill = False
            worker.kill()
        code = worker.wait(TICK_SECONDS)
        if code is not None and started == MOST_WORKERS:
            raise OSError(f"worker after worker died; the last one said:\n{worker.last_words()}")
        if code is not None:
            started += 1
            worker.start()
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            shown.say(f"The worker died {how}. Nothing is lost: process {worker.pid} takes over.")
    shown.show(counts, tasks.app.transport.depth("fetch"))


def queue_is_empty() -> bool:
    """Whether no task of any crawl is ready, delayed or running; False, too, where the broker cannot tell."""
    depth = tasks.app.transport.depth("fetch")
    return (depth.ready, depth.delayed, depth.leased) == (0, 0, 0)


def report(store: Store, crawl: Crawl, directory: Path) -> None:
    """Draw the picture and print the summary."""
    rows, links = store.rows(), store.links()
    picture = directory / "links.svg"
    picture.write_text(draw(rows, links, heading=rows[0].title or host(crawl.start)), encoding="utf-8")
    click.echo(f"\n{summary(rows, link_count=len(links))}\n\nPicture  {picture}\nStore    {store.path}")
