"""Which of these tests are for every day: those of the embedded brokers and of Redis, which answers at once."""

from __future__ import annotations

from pathlib import Path

import pytest

_SLOW_SERVERS = ("test_rabbitmq", "test_mongodb", "test_couchdb")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A server that takes milliseconds for each answer takes minutes for a whole kit."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.path.name.startswith(_SLOW_SERVERS):
            item.add_marker(pytest.mark.slow)
