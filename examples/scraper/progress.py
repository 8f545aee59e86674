"""How a crawl is going: a moving bar on a terminal with rich, else a line now and then."""

from __future__ import annotations

import importlib.util
import sys
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from ekiden.message import Depth

    from .store import Counts

SECONDS_BETWEEN_LINES = 1.0


class Progress(ABC):
    """Shows a crawl while the ``with`` block lasts. For one thread."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @abstractmethod
    def show(self, counts: Counts, depth: Depth) -> None:
        """How far the store has come, and what the queue holds."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Tell of an event, once."""


class Lines(Progress):
    """A line a second, while something changes."""

    def __init__(self) -> None:
        self._shown: Counts | None = None
        self._next_line = 0.0

    def show(self, counts: Counts, depth: Depth) -> None:
        if counts != self._shown and (counts.waiting == 0 or time.monotonic() >= self._next_line):
            self._shown = counts
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            self.say(f"{counts.visited} of {counts.known} pages visited; {queue_text(depth)}")

    def say(self, text: str) -> None:
        print(text, flush=True)


class Bar(Progress):
    """A bar that grows at both ends: pages visited, of pages found so far."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._rich = RichProgress(
            SpinnerColumn(),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("pages  [dim]{task.description}"),
            TimeElapsedColumn(),
        )
        self._task = self._rich.add_task("", total=None)

    def __enter__(self) -> Self:
        self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._rich.stop()

    def show(self, counts: Counts, depth: Depth) -> None:
        self._rich.update(
            self._task,
            completed=counts.visited + counts.given_up,
            total=counts.known,
            description=queue_text(depth),
        )

    def say(self, text: str) -> None:
        self._rich.console.print(text, markup=False, highlight=False)


def progress() -> Progress:
    """What fits this program's output."""
    has_rich = importlib.util.find_spec("rich") is not None
    return Bar() if has_rich and sys.stdout.isatty() else Lines()


def queue_text(depth: Depth) -> str:
    """The queue in words, without what the broker cannot count."""
    numbers = {"ready": depth.ready, "not yet due": depth.delayed, "in hand": depth.leased}
    return ", ".join(f"{number} {what}" for what, number in numbers.items() if number is not None)
