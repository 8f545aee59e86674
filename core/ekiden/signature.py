"""A call described but not made: of which task, with what, sent how, and what follows it.

    Signature   what ``task.s(...)`` returns; immutable, every method returns a changed copy
    Step        the same as it stands in a message: a call that follows another one
    Call        the call that a message carries; the wire format, version 1

A signature made by a task remembers its sender, which never enters a message; one read from a message has none.
"""

from __future__ import annotations

import dis
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Protocol, overload

import msgspec
from msgspec import Meta

from ekiden.bounds import MOST
from ekiden.errors import MisuseError, TaskArgumentsError
from ekiden.message import LONGEST_TASK_ID, LONGEST_TASK_NAME, HeaderValue, derived_id
from ekiden.modules import ModuleNamedAsAFunction
from ekiden.options import Priority, call_options, check_call_options, check_task_name
from ekiden.safe_text import repr_of
from ekiden.times import LONGEST_SECONDS, Moment, Offset, PositiveSeconds, check_moment, check_seconds

if TYPE_CHECKING:
    from ekiden.results import AsyncResult

FORMAT_VERSION = 1
_LONGEST_SHOWN = 80

Retries = Annotated[int, Meta(ge=0, le=MOST)]
"""Every result store can hold it."""


TaskId = Annotated[str, Meta(min_length=1, max_length=LONGEST_TASK_ID)]
TaskName = Annotated[str, Meta(max_length=LONGEST_TASK_NAME)]
"""What a message of somebody else's says is bounded like what a call may say: it goes into records and logs."""


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call that is made when another one ended.

    Unless ``immutable``, it is called with the other's result (or, following an error, its task id) before ``args``.
    ``countdown`` is in seconds from when it is sent, ``expires`` too.
    """

    task: TaskName
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    task_id: TaskId | None = None
    queue: str | None = None
    priority: Priority | None = None
    countdown: Offset | None = None
    expires: Offset | None = None
    headers: dict[str, HeaderValue] = {}
    ignore_result: bool | None = None
    time_limit: PositiveSeconds | None = None
    soft_time_limit: PositiveSeconds | None = None
    immutable: bool = False
    on_success: tuple[Step, ...] = ()
    on_error: tuple[Step, ...] = ()


def follow_up_id(step: Step, task_id: str, why: str) -> str:
    """The id of the task that ``step`` of ``task_id`` makes; ``why`` says which step: "success 0", "error 1", ..."""
    return step.task_id or derived_id(task_id, why)


class Call(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag_field="v", tag=FORMAT_VERSION):
    """What the body of a task's message holds.

    Times are wall-clock seconds since the epoch; ``sent`` is that of the first try. ``retries`` counts the tries before
    this one, and ``last_error`` is the text of what the last of them raised. ``root`` is the task id that the whole run
    began with, ``parent`` the task whose body or ending sent this call. ``fenced`` marks a call that ekiden sent as a
    consequence of another: such a step may be repeated after a crash, so the backend is asked first. ``sending`` tells
    calls apart that were sent under one id of the user's own.
    """

    task: TaskName
    id: TaskId
    sent: Moment
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = {}
    retries: Retries = 0
    eta: Moment | None = None
    expires: Moment | None = None
    root: TaskId | None = None
    parent: TaskId | None = None
    on_success: tuple[Step, ...] = ()
    on_error: tuple[Step, ...] = ()
    ignore_result: bool | None = None
    time_limit: PositiveSeconds | None = None
    soft_time_limit: PositiveSeconds | None = None
    fenced: bool = False
    last_error: str | None = None
    sending: str | None = None


class Sender(Protocol):
    """Sends signatures: an app."""

    def send(self, signature: Signature) -> AsyncResult[Any]:
        """Publish a call as ``signature`` describes it."""
        ...


class Signature(msgspec.Struct, frozen=True):
    """A call that can be sent later, or follow another one: ``add.s(2, 2)``.

    ``options`` are the keyword arguments of ``apply_async`` other than the arguments and what follows.
    """

    task: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}
    immutable: bool = False
    on_success: tuple[Signature, ...] = ()
    on_error: tuple[Signature, ...] = ()
    sender: Sender | None = None

    if not TYPE_CHECKING:  # a type checker is to report a name that is not there

        def __getattr__(self, name: str) -> object:
            from ekiden.celery_names import missing_attribute  # only for a name that is not here

            raise missing_attribute("signature", self, name)

    def delay(self, /, *args: Any, **kwargs: Any) -> AsyncResult[Any]:
        """Send it now, with ``args`` before its own and ``kwargs`` over its own."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self, args: Sequence[Any] | None = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[Any]:
        """Send it now; ``options`` go over its own. Raises MisuseError for a signature that no app made."""
        if self.sender is None:
            raise MisuseError(
                f"the signature of {self.task} was not made by a task of an app, so nothing can send it; make it with "
                "task.s() or app.signature()."
            )
        return self.sender.send(self.clone(args, kwargs, **options))

    def clone(
        self, args: Sequence[Any] | None = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Signature:
        """A copy with ``args`` before its own, and ``kwargs`` and ``options`` over its own.

        An immutable signature keeps its arguments as they are.
        """
        args, kwargs = call_arguments(self.task, args, kwargs)
        if self.immutable:
            args, kwargs = (), {}
        return msgspec.structs.replace(
            self,
            args=(*args, *self.args),
            kwargs={**self.kwargs, **kwargs},
            options={**self.options, **options},
        )

    def set(self, *, immutable: bool | None = None, **options: Any) -> Signature:
        """A copy with these options over its own. Warns where the copy is dropped: Celery changes it in place."""
        _warn_if_dropped("set")
        changed = self if immutable is None else msgspec.structs.replace(self, immutable=immutable)
        return msgspec.structs.replace(changed, options={**self.options, **options})

    def link(self, *signatures: Signature) -> Signature:
        """A copy that calls ``signatures``, too, with its result when it succeeded. Warns where it is dropped."""
        _warn_if_dropped("link")
        return msgspec.structs.replace(self, on_success=(*self.on_success, *signatures))

    def link_error(self, *signatures: Signature) -> Signature:
        """A copy that calls ``signatures``, too, with its task id when it failed. Warns where it is dropped."""
        _warn_if_dropped("link_error")
        return msgspec.structs.replace(self, on_error=(*self.on_error, *signatures))

    @property
    def links(self) -> tuple[Signature, ...]:
        """What follows its success: what ``link`` added, and its option of that name."""
        return (*self.on_success, *_signatures(self.options.get("link", ())))

    @property
    def error_links(self) -> tuple[Signature, ...]:
        """What follows its failure, as above."""
        return (*self.on_error, *_signatures(self.options.get("link_error", ())))

    @property
    def id(self) -> str | None:
        """The task id it will have, if one was set."""
        return self.options.get("task_id")

    def step(self, now: float) -> Step:
        """This signature as it stands in a message sent at ``now`` (seconds since the epoch)."""
        options = dict(self.options)
        countdown = seconds_until(options.pop("eta", None), now)
        if countdown is None:
            countdown = seconds_until(options.pop("countdown", None), now)
        return Step(
            task=self.task,
            args=self.args,
            kwargs=dict(self.kwargs),
            task_id=options.pop("task_id", None),
            queue=options.pop("queue", None),
            priority=options.pop("priority", None),
            countdown=countdown,
            expires=seconds_until(options.pop("expires", None), now),
            headers=options.pop("headers", None) or {},
            ignore_result=options.pop("ignore_result", None),
            time_limit=options.pop("time_limit", None),
            soft_time_limit=options.pop("soft_time_limit", None),
            immutable=self.immutable,
            on_success=tuple(each.step(now) for each in self.links),
            on_error=tuple(each.step(now) for each in self.error_links),
        )


_POP_TOP, _CACHE = dis.opmap["POP_TOP"], dis.opmap.get("CACHE", 0)


def _warn_if_dropped(method: str) -> None:
    """Warn if the caller of a signature's method drops what it returns: the instruction after the call says so."""
    caller = sys._getframe(2)
    code, at = caller.f_code.co_code, caller.f_lasti + 2
    while at < len(code) and code[at] == _CACHE:
        at += 2
    if at < len(code) and code[at] == _POP_TOP:
        warnings.warn(
            f"signatures do not change: {method}() returns a changed copy, which is dropped here; write "
            f"signature = signature.{method}(...).",
            stacklevel=3,
        )


def _signatures(link: Signature | Sequence[Signature] | None) -> tuple[Signature, ...]:
    if link is None:
        return ()
    return tuple(link) if isinstance(link, list | tuple) else (link,)  # type: ignore[return-value]  # check_links refuses it


def check_links(link: Signature | Sequence[Signature] | None) -> None:
    """Raise for what cannot be linked, and for options of a linked call that cannot be."""
    if link is None:
        return
    if not isinstance(link, Signature | list | tuple):
        raise MisuseError(f"link takes signatures, such as add.s(1), not {link!r}.")
    for each in (link,) if isinstance(link, Signature) else link:
        if not isinstance(each, Signature):
            raise MisuseError(f"link takes signatures, such as add.s(1), not {each!r}.")
        check_task_name(each.task)
        options = call_options(each.task, each.options)
        check_call_options(each.task, options)
        for following in (options.link, options.link_error, each.on_success, each.on_error):
            check_links(following)


def call_arguments(task_name: str, args: Any, kwargs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments of a call as they were given; None is none. Raises TaskArgumentsError for what holds none."""
    if args is None:
        args = ()
    if kwargs is None:
        kwargs = {}
    if isinstance(args, str | bytes | bytearray) or not isinstance(args, Sequence):
        shown = repr_of(args)[:_LONGEST_SHOWN]
        raise TaskArgumentsError(
            f"{task_name}: args is a list or tuple of arguments, not {shown}; for one argument write ({shown},)."
        )
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise TaskArgumentsError(
            f"{task_name}: kwargs is a mapping of arguments by their names, not {repr_of(kwargs)[:_LONGEST_SHOWN]}."
        )
    return args if isinstance(args, list | tuple) else tuple(args), kwargs


def due_of_retry(when: float | datetime, now: float) -> float:
    """When the next try is due that a body asks for. Raises what is wrong with ``when``, in words for that body."""
    if isinstance(when, datetime):
        seconds = seconds_until(when, now)
        check_moment("the eta of a retry", when)
    else:
        check_seconds("the countdown of a retry", when, least=-LONGEST_SECONDS)
        seconds = when
    return max(0.0, now + seconds)


@overload
def seconds_until(moment: float | datetime, now: float) -> float: ...
@overload
def seconds_until(moment: float | datetime | None, now: float) -> float | None: ...
def seconds_until(moment: float | datetime | None, now: float) -> float | None:
    """``moment`` as seconds from ``now``: a number is that already; a datetime must say its time zone."""
    if not isinstance(moment, datetime):
        return None if moment is None else float(moment)
    if moment.tzinfo is None:
        raise MisuseError(
            f"{moment!r} does not say its time zone; write datetime.now(UTC) + timedelta(...) or use countdown=seconds."
        )
    return moment.timestamp() - now


sys.modules[__name__].__class__ = ModuleNamedAsAFunction
