"""A place of a test's own at a server that it shares: everything there begins with a prefix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from ekiden.message import new_id

BROKERS = ("sqlite", "redis", "amqp", "mongodb", "couchdb")
"""By the schemes of their URLs: those that several processes can share."""


@contextmanager
def place_at(broker: str, request: pytest.FixtureRequest, directory: Path) -> Iterator[str]:
    """The URL of an empty place at one of ``BROKERS``, for one test and for longer than a moment; a file, or shared."""
    prefix = f"long-{new_id()}-"  # see IDLE_QUEUES_GO_AFTER_SECONDS of tests.servers.rabbitmq
    match broker:
        case "sqlite":
            yield f"sqlite:///{directory}/broker.db"
        case "redis":
            from tests.servers.discovery import remove_redis_keys

            url = request.getfixturevalue("redis_url")
            yield with_prefix(url, prefix)
            remove_redis_keys(url, prefix)
        case "amqp":
            yield with_prefix(request.getfixturevalue("rabbitmq_url"), prefix)
        case "mongodb":
            from tests.servers.mongodb import remove_collections

            found = request.getfixturevalue("mongodb")
            yield with_prefix(found.url, prefix)
            remove_collections(found.url, prefix, alone=found.alone)
        case "couchdb":
            from tests.servers.couchdb import remove_databases

            url = request.getfixturevalue("couchdb_url")
            yield with_path(url, prefix)
            remove_databases(url, prefix)
        case _:
            raise ValueError(broker)


def own_prefix() -> str:
    """A prefix that nobody else uses."""
    return f"test-{new_id()}"


def with_prefix(url: str, prefix: str) -> str:
    """``url`` with the option that says what comes before every name there."""
    return f"{url}{'&' if '?' in url else '?'}prefix={prefix}"


def with_path(url: str, path: str) -> str:
    """``url`` with ``path`` in the place of its own."""
    address, mark, query = url.partition("?")
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}/{quote(path, safe='')}{mark}{query}"
