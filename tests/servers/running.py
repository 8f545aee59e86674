"""How a fixture has servers of its own: started, given to the tests, and gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import pytest

from tests.servers.processes import CannotStart


class Servers(Protocol):
    """One or several servers."""

    def start(self) -> None:
        """Start them, and wait until they answer."""
        ...

    def kill(self) -> None:
        """End them all."""
        ...


Made = TypeVar("Made", bound=Servers)


@contextmanager
def running(make: Callable[[], Made]) -> Iterator[Made]:
    """What ``make`` returns, started. Skips where it is not installed, with a line that says what to install."""
    try:
        servers = make()
    except CannotStart as error:
        pytest.skip(str(error))
    try:
        servers.start()
        yield servers
    finally:
        servers.kill()
