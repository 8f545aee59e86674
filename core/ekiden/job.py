"""What a worker has in hand: a delivery, the call it carries, and how far that has come."""

from __future__ import annotations

from ekiden.execution import Outcome, Request
from ekiden.message import Delivery
from ekiden.options import Policy
from ekiden.signature import Call
from ekiden.task import Task


class Job:
    """One delivery in hand.

    Made by the receiver. ``started`` (monotonic seconds) is set by whoever runs it, ``outcome`` by whoever knows it
    first, ``lost`` and ``settled`` by the settler.
    """

    __slots__ = ("call", "delivery", "lost", "outcome", "policy", "request", "settled", "started", "taken", "task")

    def __init__(
        self,
        delivery: Delivery,
        *,
        taken: float,
        call: Call | None = None,
        task: Task[..., object] | None = None,
        policy: Policy | None = None,
        request: Request | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        self.delivery = delivery
        self.call = call
        self.task = task
        self.policy = policy
        self.request = request
        self.outcome = outcome
        self.taken = taken
        self.started: float | None = None
        self.lost = False
        self.settled = False

    def __str__(self) -> str:
        if self.call is None:
            return f"message {self.delivery.message.id}"
        return f"{self.call.task}[{self.call.id}]"
