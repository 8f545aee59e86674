"""What a worker has in hand: a delivery, the call it carries, and how far that has come."""

from __future__ import annotations

import msgspec

from ekiden import hooks
from ekiden.message import Delivery
from ekiden.options import Policy
from ekiden.outcomes import Outcome
from ekiden.request import Request
from ekiden.signature import Call
from ekiden.task import Task


class Work(msgspec.Struct, frozen=True, gc=False):
    """What it takes to run a call: the task it is of, that task's policy, and the request its body sees."""

    call: Call
    task: Task[..., object]
    policy: Policy
    request: Request

    @property
    def soft_time_limit(self) -> float | None:
        """Seconds until SoftTimeLimitExceeded is raised in the body: the call's own word, else the task's."""
        return self.call.soft_time_limit or self.policy.soft_time_limit

    @property
    def time_limit(self) -> float | None:
        """Seconds until the body is ended: the call's own word, else the task's."""
        return self.call.time_limit or self.policy.time_limit


class Job:
    """One delivery in hand. ``call`` is None for what could not be read, ``work`` for what is not to be run here.

    Made by the receiver. ``started`` (monotonic seconds) is set by whoever runs it, ``outcome`` by whoever knows it
    first, ``given_back`` by whoever wants it released unstarted, ``terminated`` by whoever wants its body ended,
    ``lost`` and ``settled`` by the settler.
    """

    __slots__ = (
        "call",
        "delivery",
        "given_back",
        "lost",
        "outcome",
        "settled",
        "started",
        "taken",
        "terminated",
        "work",
    )

    def __init__(
        self,
        delivery: Delivery,
        *,
        taken: float,
        call: Call | None = None,
        work: Work | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        self.delivery = delivery
        self.call = call
        self.work = work
        self.outcome = outcome
        self.taken = taken
        self.started: float | None = None
        self.given_back = False
        self.terminated = False
        self.lost = False
        self.settled = False

    def __str__(self) -> str:
        if self.call is None:
            return f"message {self.delivery.message.id}"
        return f"{self.call.task}[{self.call.id}]"


def signal_revoked(work: Work, *, terminated: bool = False, expired: bool = False) -> None:
    """Tell who listens that a call was revoked, or ``terminated`` while it ran, or had expired."""
    if hooks.task_revoked.receivers:
        hooks.task_revoked.send(work.task, request=work.request, terminated=terminated, expired=expired)
