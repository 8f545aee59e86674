"""The call that is being executed, as its body sees it, and the one ambient state there is: which one that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from ekiden.message import HeaderValue
from ekiden.options import Policy
from ekiden.replies import reply_queue
from ekiden.signature import Call


class Request(msgspec.Struct, frozen=True, gc=False):
    """The call that is being executed, as the task sees it: ``self.request``. The names are Celery's.

    ``called_directly`` is True where the function was simply called, outside any worker, ``is_eager`` under ``apply``.
    """

    call: Call
    queue: str | None = None
    priority: int | None = None
    attempt: int = 1
    headers: Mapping[str, HeaderValue] = {}
    hostname: str | None = None
    called_directly: bool = False
    is_eager: bool = False
    limits: tuple[float | None, float | None] = (None, None)

    if not TYPE_CHECKING:  # a type checker is to report a name that is not there

        def __getattr__(self, name: str) -> object:
            from ekiden.celery_names import missing_attribute  # only for a name that is not here

            raise missing_attribute("request", self, name)

    def get(self, name: str, default: object = None) -> object:
        """An attribute by its name, or ``default``."""
        return getattr(self, name, default)

    @property
    def id(self) -> str:
        """The task's id."""
        return self.call.id

    @property
    def correlation_id(self) -> str:
        """The task's id, as brokers' tools call it."""
        return self.call.id

    @property
    def task(self) -> str:
        """The task's name."""
        return self.call.task

    @property
    def args(self) -> list[Any]:
        """The positional arguments, as the message brought them."""
        return list(self.call.args)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments, as the message brought them."""
        return dict(self.call.kwargs)

    @property
    def retries(self) -> int:
        """How many tries came before this one."""
        return self.call.retries

    @property
    def eta(self) -> datetime | None:
        """When the call was due, if it was sent for later."""
        return None if self.call.eta is None else datetime.fromtimestamp(self.call.eta, UTC)

    @property
    def expires(self) -> datetime | None:
        """After when it would not have been started."""
        return None if self.call.expires is None else datetime.fromtimestamp(self.call.expires, UTC)

    @property
    def timelimit(self) -> tuple[float | None, float | None]:
        """The hard and the soft time limit in seconds: the call's own, else the task's, else the setting's."""
        return self.limits

    @property
    def time_limit(self) -> float | None:
        """Seconds after which the body is ended."""
        return self.limits[0]

    @property
    def soft_time_limit(self) -> float | None:
        """Seconds after which SoftTimeLimitExceeded is raised in the body."""
        return self.limits[1]

    @property
    def argsrepr(self) -> str:
        """The positional arguments as text."""
        return repr(tuple(self.call.args))

    @property
    def kwargsrepr(self) -> str:
        """The keyword arguments as text."""
        return repr(dict(self.call.kwargs))

    @property
    def ignore_result(self) -> bool | None:
        """Whether the call said that its result is not to be stored; None where it said nothing."""
        return self.call.ignore_result

    @property
    def root_id(self) -> str:
        """The id of the task that the whole run began with."""
        return self.call.root or self.call.id

    @property
    def parent_id(self) -> str | None:
        """The id of the task that sent this one, or that this one follows."""
        return self.call.parent

    @property
    def reply_to(self) -> str | None:
        """The queue at which the sender waits for replies, if its results are not stored."""
        return reply_queue(self.headers)

    @property
    def delivery_info(self) -> dict[str, Any]:
        """Queue, priority, and whether the message had been handed out before."""
        return {
            "routing_key": self.queue,
            "queue": self.queue,
            "priority": self.priority,
            "redelivered": self.attempt > 1,
        }


def limits_of(call: Call, policy: Policy) -> tuple[float | None, float | None]:
    """The hard and the soft time limit of a call, in seconds: its own, else its task's."""
    return (call.time_limit or policy.time_limit, call.soft_time_limit or policy.soft_time_limit)


MOST_CHILDREN = 1000
"""A result knows so many of the tasks that its body and its ending sent: the first ones."""


class Execution(msgspec.Struct):
    """A body that is running: its request, and the ids of the tasks it has sent so far. Owned by the running thread."""

    request: Request
    children: list[str]

    def note_children(self, ids: Iterable[str]) -> None:
        """The body has sent these tasks; no more than ``MOST_CHILDREN`` are kept."""
        room = MOST_CHILDREN - len(self.children)
        if room > 0:
            self.children.extend(islice(ids, room))


running: ContextVar[Execution | None] = ContextVar("ekiden_running", default=None)
"""The execution that the current code is part of: the only ambient state there is."""
