"""The crawler, as far as ekiden is concerned: one app, a task that visits a page, and one for pages that never answer.

Run workers for it, as many as you like, with ``ekiden worker examples.scraper.tasks:app``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from uuid import NAMESPACE_URL, uuid5

from ekiden import Ekiden
from ekiden.exceptions import TimeLimitExceeded

from .page import FetchError, fetch, parse
from .store import Store

PAGES_PER_SECOND = os.environ.get("SCRAPER_PAGES_PER_SECOND", "5")

app = Ekiden("scraper", lease=10)


@app.task(
    queue="fetch",
    rate_limit=f"{PAGES_PER_SECOND}/s",  # over all workers together
    autoretry_for=(FetchError, TimeLimitExceeded),
    max_retries=5,
    retry_backoff=0.3,  # after 0.3 s, 0.6 s, 1.2 s, ... and a random part of it
    time_limit=15,
    ignore_result=True,
)
def visit(directory: str, url: str) -> None:
    """Fetch one page, keep what it says, and enqueue the pages that nobody has found before."""
    with Store(directory) as store:
        if not store.begin_try(url):
            return  # a message may be delivered twice; the second time there is nothing left to do
        try:
            page = parse(fetch(url))
        except FetchError as error:
            store.note_error(url, str(error))
            raise
        enqueue(directory, store.crawl().id, store.add_links(page))
        # The last step: a worker that is killed before it leaves the page waiting, and its message comes back.
        store.finish(page)


@app.task(queue="fetch", priority=9, ignore_result=True)
def give_up(directory: str, url: str) -> None:
    """What follows when a page could not be visited, however often it was tried."""
    with Store(directory) as store:
        store.give_up(url)


def enqueue(directory: str, crawl_id: str, urls: Iterable[str]) -> None:
    """Have pages visited. A task has its id from its page, so that a page already in the queue is not added again."""
    for url in urls:
        task_id = str(uuid5(NAMESPACE_URL, f"{crawl_id} {url}"))
        visit.apply_async((directory, url), task_id=task_id, link_error=give_up.si(directory, url))
