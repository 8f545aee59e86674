"""A server for a whole session of tests, or a skip that says what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


def shared_server(product: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What ``tests.servers.discovery`` finds or starts; without it, or without its transport, tests are skipped."""
    pytest.importorskip(f"ekiden_{product}", reason=f"pip install -e transports/{product}", exc_type=ImportError)
    from tests.servers.discovery import SHARED, NoServer

    try:
        with SHARED[product](tmp_path_factory.mktemp(product)) as found:
            yield found
    except NoServer as error:
        pytest.skip(str(error))
