"""Keeps pymongo's deadlines from outliving a call.

``pymongo.timeout`` notes its deadline in context variables and takes it back at its end. An exception out of a signal
handler (Ctrl-C, an alarm) may come in between: the deadline would then stay for all that the thread ever asks, and once
it is over, each question fails at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import copy_context
from typing import Concatenate, ParamSpec, TypeVar

Owner = TypeVar("Owner")
P = ParamSpec("P")
R = TypeVar("R")


def in_own_context(method: Callable[Concatenate[Owner, P], R]) -> Callable[Concatenate[Owner, P], R]:
    """Run ``method`` in a copy of its caller's context: what it leaves in context variables ends with the call."""

    @functools.wraps(method)
    def run(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return copy_context().run(method, self, *args, **kwargs)

    return run
