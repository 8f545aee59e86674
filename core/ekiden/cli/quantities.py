"""Numbers as options of the command take them: within the bounds that the settings have, too."""

from __future__ import annotations

import math
from typing import Any

import click

from ekiden.bounds import MOST, MOST_IN_HAND, MOST_THREADS
from ekiden.times import LONGEST_SECONDS


class _Finite(click.FloatRange):
    """A range, which NaN is in no part of."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or the complaint of the range."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


SECONDS = _Finite(min=0, max=LONGEST_SECONDS)
POSITIVE_SECONDS = _Finite(min=0, min_open=True, max=LONGEST_SECONDS)
AT_LEAST_ONE = click.IntRange(min=1, max=MOST)
THREADS = click.IntRange(min=1, max=MOST_THREADS)
IN_HAND = click.IntRange(min=1, max=MOST_IN_HAND)
