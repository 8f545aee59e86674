"""A task: a function, its name, and its options as declared. Call it, send it, sign it.

``@app.task`` returns a Task at once. Nothing is looked up when it is made: settings are merged when a call is sent.

    add(1, 2)              calls the function, here
    add.delay(1, 2)        sends a message; a worker calls it
    add.apply_async(...)   the same, with options
    add.apply((1, 2))      calls it here, the way a worker would
    add.s(1, 2)            a signature: a call to send later, or after another one
"""

from __future__ import annotations

import inspect
import random
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from copy import copy
from datetime import datetime
from itertools import islice
from types import MethodType
from typing import TYPE_CHECKING, Any, Generic, Never, NoReturn, ParamSpec, Protocol, Self, TypeVar, overload

import msgspec
from msgspec import UNSET, UnsetType

from ekiden import hooks
from ekiden.codec import OutcomeRecord, Parameters, encode_call, encode_outcome, encode_value
from ekiden.errors import (
    BrokerUnavailable,
    ConfigurationError,
    MaxRetriesExceededError,
    MisuseError,
    Retry,
    TaskArgumentsError,
)
from ekiden.kinds import Kind
from ekiden.message import STORED, HeaderValue, Message, Published, new_id
from ekiden.modules import ModuleNamedAsAFunction
from ekiden.options import (
    NOTHING_SAID,
    CallOptions,
    Policy,
    Publishing,
    Sending,
    TaskOptions,
    annotated,
    call_options,
    check_call_options,
    check_limits_of_call,
    merge,
    policy,
    publishing,
)
from ekiden.publisher import Publisher, refusal
from ekiden.replies import REPLY_TO_HEADER, reply_message, wanted_results
from ekiden.request import Request, running
from ekiden.results import AsyncResult, Backend, EagerResult, ResultSource, StoredResult
from ekiden.retry import retry_delay, tries_left
from ekiden.safe_text import repr_of, text_of
from ekiden.settings import Settings
from ekiden.signature import Call, Sender, Signature, call_arguments, check_links, due_of_retry, seconds_until
from ekiden.states import State, is_final
from ekiden.times import shown
from ekiden.transport import Transport

NO_OPTIONS = TaskOptions()

P = ParamSpec("P")
R = TypeVar("R")

_BATCH_SIZE = 500
_TEXT = frozenset({str})
_SAYING_NOTHING = (None, None, None, None, None, None, None, (), (), None)
_FIVE_NONE = (None, None, None, None, None)
_LONGEST_STATE = 100
_HANDLERS = ("before_start", "on_success", "on_failure", "on_retry", "after_return")
_DIRECT = Request(Call(task="", id="", sent=0.0), called_directly=True)


class TaskApp(ResultSource, Sender, Protocol):
    """What a task asks of its app."""

    conf: Settings
    publisher: Publisher
    wants_replies: bool | None
    """Whether results come as replies, because no backend stores them; None until ``stores_results`` was asked."""

    def apply_message(self, message: Message) -> StoredResult:
        """Execute a message here and now, the way a worker would."""
        ...

    def opened_transport(self) -> Transport:
        """The transport."""
        ...

    def opened_backend(self) -> Backend:
        """The backend."""
        ...

    def stores_results(self) -> bool:
        """Whether it stores results; else they come as replies."""
        ...


def _of_no_app(task_name: str) -> TaskApp:
    raise MisuseError(f"{task_name} belongs to no app: app.register_task() declares it.")


class _Declared:
    """An option as it holds for a task: what was declared, else the setting, under Celery's name."""

    def __init__(self, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, task: None, kind: type) -> Self: ...
    @overload
    def __get__(self, task: Task[..., Any], kind: type) -> Any: ...
    def __get__(self, task: Task[..., Any] | None, kind: type) -> Any:
        if task is None:
            return self
        return task._holds(self._name)

    def __set__(self, task: Task[..., Any], value: object) -> NoReturn:
        raise AttributeError(
            f"{self._name} of a task is declared, not assigned: write @app.task({self._name}=...), an attribute of the "
            "class, or the setting task_annotations."
        )


class Task(Generic[P, R]):
    """A task of one app. Subclass it, and declare with ``base=``, to add handlers or attributes.

    ``run`` is the declared function (bound to the task with ``bind=True``), and ``function`` what a worker calls: the
    same, or the task itself where a subclass has a ``__call__`` of its own. ``options`` is what was declared.
    """

    is_async = False
    MaxRetriesExceededError = MaxRetriesExceededError
    OperationalError = BrokerUnavailable

    max_retries = _Declared("max_retries")
    """Tries after the first; None is without end."""
    default_retry_delay = _Declared("default_retry_delay")
    rate_limit = _Declared("rate_limit")
    time_limit = _Declared("time_limit")
    soft_time_limit = _Declared("soft_time_limit")
    ignore_result = _Declared("ignore_result")
    acks_late = _Declared("acks_late")
    track_started = _Declared("track_started")
    throws = _Declared("throws")
    typing = _Declared("typing")
    priority = _Declared("priority")
    expires = _Declared("expires")

    def __init__(
        self,
        function: Callable[..., Any] | None = None,
        *,
        name: str = "",
        options: TaskOptions = NO_OPTIONS,
        bind: bool = False,
        find_app: Callable[[str], TaskApp] = _of_no_app,
    ) -> None:
        if function is None:
            return  # an object of a class with a run method: register_task() makes a task of it
        self.name = name
        self.options = options
        self.bind = bind
        self._declared_function = function
        self._bind_function()
        self.parameters = Parameters(function, skip_first=bind)
        self.declared_at = _place_of(function)
        self.is_async = inspect.iscoroutinefunction(function)
        self.has_hooks = any(getattr(type(self), each) is not getattr(Task, each) for each in _HANDLERS)
        self._find_app = find_app
        self._return_kind: Kind | UnsetType | None = UNSET
        self.__name__ = getattr(function, "__name__", name)
        self.__qualname__ = getattr(function, "__qualname__", name)
        self.__module__ = getattr(function, "__module__", __name__)
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    def __repr__(self) -> str:
        return f"<Task {self.name}>"

    if not TYPE_CHECKING:  # a type checker is to report a name that is not there

        def __getattr__(self, name: str) -> object:
            from ekiden.celery_names import missing_attribute  # only for a name that is not here

            raise missing_attribute("task", self, name)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function here, as if it were no task."""
        return self.run(*args, **kwargs)  # type: ignore[no-any-return]

    def _bind_function(self) -> None:
        self.run: Callable[..., Any] = (
            MethodType(self._declared_function, self) if self.bind else self._declared_function
        )
        wraps_calls = type(self).__call__ not in (Task.__call__, AsyncTask.__call__)
        self.function: Callable[..., Any] = self if wraps_calls else self.run

    @property
    def app(self) -> TaskApp:
        """The app that sends it. Raises MisuseError for a task of a TaskSet that no app, or several, included."""
        return self._find_app(self.name)

    def for_app(self, find_app: Callable[[str], TaskApp]) -> Self:
        """A copy of this task that belongs to another app."""
        copied = copy(self)
        copied._find_app = find_app
        copied._bind_function()
        return copied

    # Sending.

    def delay(self, /, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Send a call with these arguments; a worker makes it. Returns its result to come.

        Raises TaskArgumentsError (a TypeError) for arguments that do not fit, BrokerUnavailable or BrokerRefused
        when the broker does not take it within ``task_publish_timeout``.
        """
        return self.apply_async(args, kwargs)

    def apply_async(
        self,
        args: Sequence[Any] | None = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        countdown: float | None = None,
        eta: datetime | None = None,
        expires: float | datetime | None = None,
        queue: str | None = None,
        priority: int | None = None,
        task_id: str | None = None,
        headers: Mapping[str, HeaderValue] | None = None,
        link: Signature | Sequence[Signature] | None = (),
        link_error: Signature | Sequence[Signature] | None = (),
        ignore_result: bool | None = None,
        time_limit: float | None = None,
        soft_time_limit: float | None = None,
        retry: bool | None = None,
        retry_policy: Mapping[str, Any] | None = None,
        publish_timeout: float | None = None,
        **unknown: Never,
    ) -> AsyncResult[R]:
        """Send a call, with options that go over what is declared and configured.

        ``countdown``: seconds until it may start; ``eta``: the same as an aware datetime. ``expires``: seconds (or an
        aware datetime) after which it is not started any more. ``queue``, ``priority`` (9 is most urgent).
        ``task_id``: an id of your own; while the queue still holds a message of that id, a second one is not added.
        ``headers``: travel beside the arguments. ``link``/``link_error``: called with the result, or with the task id
        when it failed. ``time_limit``/``soft_time_limit``: seconds. ``retry``: whether to try again while the broker is
        unavailable, ``retry_policy`` how, ``publish_timeout`` for how many seconds in all. Raises as ``delay`` does.
        """
        if unknown:
            call_options(self.name, unknown)
        app = self._find_app(self.name)
        said = (countdown, eta, expires, queue, priority, task_id, headers, link, link_error, ignore_result)
        if (
            said == _SAYING_NOTHING
            and (time_limit, soft_time_limit, retry, retry_policy, publish_timeout) == _FIVE_NONE
        ):
            options = NOTHING_SAID
        else:
            options = CallOptions(
                countdown=countdown,
                eta=eta,
                expires=expires,
                queue=queue,
                priority=priority,
                task_id=task_id,
                headers=headers,
                link=link,
                link_error=link_error,
                ignore_result=ignore_result,
                time_limit=time_limit,
                soft_time_limit=soft_time_limit,
                retry=retry,
                retry_policy=retry_policy,
                publish_timeout=publish_timeout,
            )
        conf = app.conf
        declared = self.declared(conf) if conf.task_annotations else self.options
        return send(app, self._message(app, args, kwargs, options), options, declared)

    async def adelay(self, /, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """``delay`` for ``async`` callers: the event loop runs on until the broker has the message."""
        return await self.aapply_async(args, kwargs)

    async def aapply_async(
        self, args: Sequence[Any] | None = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[R]:
        """``apply_async`` for ``async`` callers, with the same options."""
        app = self._find_app(self.name)
        checked = call_options(self.name, options)
        messages: Sequence[Message] = (self._message(app, args, kwargs, checked),)
        how = checked.publishing(app.conf)
        deadline = time.monotonic() + how.timeout
        if not app.stores_results():
            import asyncio  # 40 ms to import, and not every program awaits

            # A reply queue may have to be opened, which waits for the broker.
            messages = await asyncio.to_thread(_addressed, app, messages, self.declared(app.conf), how, deadline)
        elif checked.task_id is not None:
            import asyncio

            await asyncio.to_thread(_forget_earlier, app, checked.chosen_ids(), deadline)
        if hooks.before_task_publish.receivers:
            _signal_before(messages)
        answers = await app.publisher.publish_async(messages, how, deadline)
        _check_and_note(messages, answers)
        return AsyncResult(messages[0].id, app, ignored=self._ignores(app.conf, checked))

    def enqueue_many(
        self, calls: Iterable[Sequence[Any] | Mapping[str, Any] | Signature], **options: Any
    ) -> list[AsyncResult[R]]:
        """Send many calls in few round trips: each a tuple of arguments, a mapping of keywords, or a signature.

        ``options`` are those of ``apply_async`` and hold for all but signatures, which bring their own. ``calls`` may
        be a generator of any length; what was sent before an error stays sent. The publish timeout is that of each
        round trip.
        """
        app = self._find_app(self.name)
        shared = call_options(self.name, options)
        if shared.task_id is not None:
            raise ConfigurationError(f"{self.name}.enqueue_many() cannot give one task_id to many calls; leave it out.")
        how = shared.publishing(app.conf)
        results: list[AsyncResult[R]] = []
        for batch in _batches(calls, _BATCH_SIZE):
            messages: Sequence[Message] = [self._message_of(app, call, shared) for call in batch]
            chosen = [call.id for call in batch if isinstance(call, Signature) and call.id is not None]
            deadline = time.monotonic() + how.timeout
            if not app.stores_results():
                messages = _addressed(app, messages, self.declared(app.conf), how, deadline)
            _make_ready(app, messages, chosen, deadline)
            _check_and_note(messages, app.publisher.publish(messages, how, deadline))
            ignored = self._ignores(app.conf, shared)
            results.extend(AsyncResult(message.id, app, ignored=ignored) for message in messages)
        return results

    def apply(
        self, args: Sequence[Any] | None = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> EagerResult[R]:
        """Execute a call here and now, the way a worker would: encoded, decoded, tried again, with its handlers.

        Further tries and what is linked run at once, whatever their delay. Nothing is sent or stored.
        """
        app = self._find_app(self.name)
        message = self._message(app, args, kwargs, call_options(self.name, options))
        return EagerResult(message.id, app, app.apply_message(message))

    def _ignores(self, conf: Settings, options: CallOptions) -> bool:
        """Whether nothing is stored of a call with these options."""
        return is_ignored(conf, self.declared(conf), options)

    def _message_of(self, app: TaskApp, call: object, shared: CallOptions) -> Message:
        """The message of one of many calls."""
        match call:
            case tuple() | list():
                return self._message(app, call, {}, shared)
            case Signature() if call.task != self.name:
                raise TaskArgumentsError(f"{self.name}.enqueue_many() sends its own calls, not one of {call.task}.")
            case Signature():
                return self._message(app, call.args, call.kwargs, call_options(self.name, options_of(call)))
            case Mapping():
                return self._message(app, (), call, shared)
            case _:
                raise TaskArgumentsError(
                    f"{self.name}.enqueue_many() takes a tuple or mapping of arguments, or a signature, for each call, "
                    f"not {call!r}; write ({call!r},)."
                )

    def _message(
        self, app: TaskApp, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None, options: CallOptions
    ) -> Message:
        """The message of one call, its arguments checked."""
        if type(args) is not tuple or type(kwargs) is not dict or (kwargs and not _TEXT.issuperset(map(type, kwargs))):
            args, kwargs = call_arguments(self.name, args, kwargs)
        conf, name = app.conf, self.name
        declared = self.declared(conf) if conf.task_annotations else self.options
        if conf.task_typing if declared.typing is UNSET else declared.typing:
            self.parameters.check(name, args, kwargs)
        return compose(conf, name, declared, args=args, kwargs=kwargs, options=options)

    # Signing.

    def s(self, /, *args: Any, **kwargs: Any) -> Signature:
        """A signature: this call, to be sent later or after another one, whose result then comes before ``args``."""
        return self.signature(args, kwargs)

    def si(self, /, *args: Any, **kwargs: Any) -> Signature:
        """An immutable signature: it is not given the result of what it follows."""
        return self.signature(args, kwargs, immutable=True)

    def signature(
        self,
        args: Sequence[Any] | None = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        immutable: bool = False,
        **options: Any,
    ) -> Signature:
        """A signature with options of ``apply_async``."""
        call_options(self.name, options)
        args, kwargs = call_arguments(self.name, args, kwargs)
        return Signature(self.name, tuple(args), kwargs, options, immutable, sender=_LateSender(self))

    def AsyncResult(self, task_id: str) -> AsyncResult[R]:  # noqa: N802 - Celery's name
        """The result of a call of this task by its id."""
        return AsyncResult(task_id, self.app)

    def return_kind(self) -> Kind | None:
        """What the function is annotated to return; None where that says nothing."""
        if self._return_kind is UNSET:
            self._return_kind = self.parameters.return_kind()
        return self._return_kind

    # Its options.

    def declared(self, conf: Settings) -> TaskOptions:
        """What was declared for this task, where it is defined and in the setting ``task_annotations``."""
        return annotated(conf.task_annotations, self.name, self.options) if conf.task_annotations else self.options

    def _policy(self) -> Policy:
        conf = self.app.conf
        return policy(conf, self.declared(conf))

    def _holds(self, option: str) -> Any:
        """What an option is for this task; of one that no app has included, by the settings' defaults."""
        try:
            conf = self.app.conf
        except MisuseError:
            conf = Settings()
        declared = self.declared(conf)
        match option:
            case "acks_late":
                return not policy(conf, declared).acks_early
            case "rate_limit":
                return conf.task_default_rate_limit if declared.rate_limit is UNSET else declared.rate_limit
            case "priority" | "expires":
                said = getattr(declared, option)
                return None if said is UNSET else said
            case _:
                return getattr(policy(conf, declared), option)

    @property
    def backend(self) -> Backend:
        """The backend of its app, opened when first asked for."""
        return self.app.opened_backend()

    # Inside a body.

    @property
    def request(self) -> Request:
        """The call that is being executed; outside a worker one with ``called_directly``."""
        execution = running.get()
        return _DIRECT if execution is None else execution.request

    def retry(  # noqa: PLR0917 - Celery's order
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        exc: BaseException | None = None,
        throw: bool = True,
        eta: datetime | None = None,
        countdown: float | None = None,
        max_retries: int | UnsetType | None = UNSET,
        **options: Any,
    ) -> NoReturn:
        """End this try and have one more: ``raise self.retry(exc=error)``, or without the ``raise``, which reads worse.

        ``countdown``: seconds until then; else the task's backoff or ``default_retry_delay`` says. ``args``/``kwargs``:
        what the next try is called with instead; ``options`` of ``apply_async`` (``queue``, ``priority``, ``expires``,
        ...): how it is sent instead. When no tries are left ``exc`` is raised, or
        MaxRetriesExceededError. With ``throw=False`` the Retry is returned for the body to raise.
        """
        request = self.request
        if request.called_directly:
            raise exc or MisuseError(f"{self.name} was called as a function, so there is no call to retry.")
        declared = self._policy()
        limit = declared.max_retries if max_retries is UNSET else max_retries
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise MisuseError(f"{self.name}.retry(): max_retries cannot be {shown(limit)}; it is a number of tries.")
        if not tries_left(limit, request.retries):
            raise exc or MaxRetriesExceededError(
                f"{self.name}[{request.id}] has been tried {request.retries + 1} times; no tries are left."
            )
        if countdown is None and eta is None:
            countdown = retry_delay(declared, request.retries, random.random())
        when: float | datetime = eta if eta is not None else countdown or 0.0
        due_of_retry(when, time.time())  # so that the line of the body is named where it cannot be
        args, kwargs = self.parameters.retried_with((request.args, request.kwargs), args, kwargs)
        retry = Retry(
            exc=exc,
            when=when,
            args=None if args is None else tuple(args),
            kwargs=None if kwargs is None else dict(kwargs),
            options=options,
        )
        if throw:
            raise retry from exc
        return retry  # type: ignore[misc]  # throw=False: the body raises it itself

    def update_state(self, task_id: str | None = None, state: str = "PROGRESS", meta: Any = None) -> None:
        """Tell whoever asks for the result how far it is: ``state`` and ``meta`` become its state and result.

        ``state`` is a word of at most 100 characters, ``meta`` what a result may be. Of another task (``task_id``) it
        can only be told where results are stored.
        """
        _check_state(self.name, state)
        value = _told_value(self.name, meta, self.app.conf.result_max_bytes)
        request = self.request
        target = task_id or (None if request.called_directly else request.id)
        if target is None:
            raise MisuseError(f"{self.name}.update_state() outside a running task needs a task_id.")
        record = OutcomeRecord(
            value=value,
            task=self.name,
            worker=request.hostname,
            queue=request.queue,
            retries=request.retries,
            parent=request.call.parent,
            root=request.call.root,
        )
        app = self.app
        stored = StoredResult(target, state, request.retries, encode_outcome(record), app.conf.result_expires)
        if app.stores_results():
            app.opened_backend().put([stored])
        reply_to = request.reply_to if target == request.id else None
        if reply_to is not None:
            messages = (reply_message((stored,), reply_to, new_id()),)
            error = refusal(messages, app.publisher.publish(messages, publishing(app.conf)))
            if error is not None:
                raise error

    # Handlers: override them in a subclass and declare with base=.

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Called by the worker before the body."""

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        """Called by the worker after the body returned."""

    def on_failure(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Called by the worker after the last try failed; ``einfo`` is the traceback as text."""

    def on_retry(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Called by the worker when there will be one more try."""

    def after_return(  # noqa: PLR0917 - Celery's order
        self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        """Called by the worker last, after the body and the handler for how it ended."""


class AsyncTask(Task[P, R]):
    """A task whose function is ``async def``: calling it gives a coroutine, its result is what that returns."""

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:  # type: ignore[override]
        """The coroutine, not yet running."""
        return self.run(*args, **kwargs)  # type: ignore[no-any-return]


class _LateSender:
    """Sends a task's signature through the app that the task belongs to when it is sent."""

    def __init__(self, task: Task[..., Any]) -> None:
        self._task = task

    def send(self, signature: Signature) -> AsyncResult[Any]:
        """Publish the call."""
        return self._task.app.send(signature)

    def __repr__(self) -> str:
        return f"<sender of {self._task.name}>"


def _check_state(task_name: str, state: object) -> None:
    if type(state) is State:
        return
    if type(state) is not str or not 0 < len(state) <= _LONGEST_STATE or not state.isprintable():
        raise MisuseError(
            f"{task_name}.update_state(): a state is text of 1 to {_LONGEST_STATE} printable characters, not "
            f"{repr_of(state)[:_LONGEST_STATE]}."
        )


def _told_value(task_name: str, meta: object, most_bytes: int) -> msgspec.Raw:
    try:
        body = encode_value(meta)
    except (TypeError, ValueError) as error:
        raise MisuseError(f"{task_name}.update_state(): its meta cannot be stored: {text_of(error)}.") from error
    if len(body) > most_bytes:
        raise MisuseError(
            f"{task_name}.update_state(): its meta has {len(body)} bytes; result_max_bytes allows {most_bytes}."
        )
    return msgspec.Raw(body)


def options_of(signature: Signature) -> dict[str, Any]:
    """The options of ``apply_async`` that a signature stands for, what follows it included."""
    options = dict(signature.options)
    options["link"] = signature.links
    options["link_error"] = signature.error_links
    return options


def compose(
    conf: Settings,
    task_name: str,
    declared: TaskOptions | None,
    *,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: CallOptions,
) -> Message:
    """The message of one call: options merged, ids given, arguments encoded. Raises what is wrong with any of them."""
    if options is not NOTHING_SAID and options != NOTHING_SAID:
        check_call_options(task_name, options)
        if options.time_limit is not None or options.soft_time_limit is not None:
            check_limits_of_call(conf, task_name, declared, options)
        check_links(options.link)
        check_links(options.link_error)
    now = time.time()
    sending = merge(conf, task_name, declared, options.queue, options.priority, args, kwargs)
    if options is NOTHING_SAID and (declared is None or declared.expires is None):
        return _composed_plainly(task_name, sending, now, args, kwargs)
    task_id = options.task_id or new_id()
    countdown = options.countdown if options.eta is None else seconds_until(options.eta, now)
    due = float(now + countdown) if countdown is not None and countdown > 0 else None
    expires = options.expires
    if expires is None and declared is not None:
        expires = declared.expires
    execution = running.get()
    call = Call(
        task=task_name,
        id=task_id,
        sent=now,
        args=args,
        kwargs=kwargs,
        eta=due,
        expires=None if expires is None else max(0.0, now + seconds_until(expires, now)),
        root=None if execution is None else execution.request.root_id,
        parent=None if execution is None else execution.request.id,
        on_success=_steps(options.link, now) if options.link else (),
        on_error=_steps(options.link_error, now) if options.link_error else (),
        ignore_result=options.ignore_result,
        time_limit=options.time_limit,
        soft_time_limit=options.soft_time_limit,
        sending=None if options.task_id is None else new_id(),
    )
    return Message(
        task_id,
        sending.queue,
        encode_call(call),
        dict(options.headers) if options.headers else {},
        sending.priority,
        due,
    )


def _composed_plainly(
    task_name: str, sending: Sending, now: float, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Message:
    """The message of a call of which nothing is said: most are so, and every step less is a tenth of its time."""
    task_id = new_id()
    execution = running.get()
    if execution is None:
        call = Call(task_name, task_id, now, args, kwargs)
    else:
        request = execution.request
        call = Call(task_name, task_id, now, args, kwargs, root=request.root_id, parent=request.id)
    return Message(task_id, sending.queue, encode_call(call), {}, sending.priority)


def send(app: TaskApp, message: Message, options: CallOptions, declared: TaskOptions | None = None) -> AsyncResult[Any]:
    """Publish one call's message and return its result to come. Raises as ``delay`` does."""
    messages: Sequence[Message] = (message,)
    conf = app.conf
    how = options.publishing(conf)
    deadline = time.monotonic() + how.timeout
    if app.wants_replies is not False and not app.stores_results():
        messages = _addressed(app, messages, declared, how, deadline)
    if options.task_id is not None or hooks.before_task_publish.receivers:
        _make_ready(app, messages, options.chosen_ids(), deadline)
    _check_and_note(messages, app.publisher.publish(messages, how, deadline))
    return AsyncResult(message.id, app, ignored=is_ignored(conf, declared, options))


def is_ignored(conf: Settings, declared: TaskOptions | None, options: CallOptions) -> bool:
    """Whether nothing is stored of a call: it says so itself, else its task, else the setting."""
    if options.ignore_result is not None:
        return options.ignore_result
    if declared is None or declared.ignore_result is UNSET:
        return conf.task_ignore_result
    return declared.ignore_result


def _addressed(
    app: TaskApp, messages: Sequence[Message], declared: TaskOptions | None, how: Publishing, deadline: float
) -> Sequence[Message]:
    """The same messages, with where replies are to be sent for those that will bring any; they are expected from now.

    Raises BrokerUnavailable when the reply queue cannot be opened by the deadline.
    """
    ignored = is_ignored(app.conf, declared, NOTHING_SAID)
    wanted = [wanted_results(message.body, ignored_by_default=ignored) for message in messages]
    ids = [task_id for each in wanted for task_id in each]
    if not ids:
        return messages
    backend = app.opened_backend()
    queue = app.publisher.persist(lambda by: backend.expect(ids, app.opened_transport, deadline=by), how, deadline)
    if queue is None:
        return messages
    return [
        msgspec.structs.replace(message, headers={**message.headers, REPLY_TO_HEADER: queue}) if each else message
        for message, each in zip(messages, wanted, strict=True)
    ]


def _make_ready(app: TaskApp, messages: Sequence[Message], chosen_ids: Sequence[str], deadline: float) -> None:
    """What comes before publishing: a call under an id of the user's own starts anew; who listens is told."""
    if chosen_ids and app.stores_results():
        _forget_earlier(app, chosen_ids, deadline)
    if hooks.before_task_publish.receivers:
        _signal_before(messages)


def _forget_earlier(app: TaskApp, chosen_ids: Sequence[str], deadline: float) -> None:
    """Forget what is stored of earlier calls under ids of the user's own.

    Otherwise an earlier call's result would be taken for this one's, and a further try of this one for a second copy
    of what has ended. Where the broker adds a second message of an id, what is stored of a call that has not ended
    stays: by it the worker knows this one for a second copy.
    """
    backend = app.opened_backend()
    if not app.opened_transport().description.names_duplicates:
        chosen_ids = [each.task_id for each in backend.get(chosen_ids) if each is not None and is_final(each.state)]
    backend.forget(chosen_ids, deadline=deadline)


def _signal_before(messages: Sequence[Message]) -> None:
    for message in messages:
        _signal(hooks.before_task_publish, message)


def _check_and_note(messages: Sequence[Message], answers: Sequence[Published]) -> None:
    """Raise the first refusal; else note the tasks as children of the one that sends them, and tell who listens."""
    if answers.count(STORED) != len(messages):
        error = refusal(messages, answers)
        if error is not None:
            raise error
    execution = running.get()
    if execution is not None:
        execution.note_children(message.id for message in messages)
    if hooks.after_task_publish.receivers:
        for message in messages:
            _signal(hooks.after_task_publish, message)


def _signal(signal: hooks.Signal, message: Message) -> None:
    task_name = msgspec.json.decode(message.body)["task"]
    signal.send(
        task_name,
        body=message.body,
        headers={**message.headers, "id": message.id, "task": task_name},
        routing_key=message.queue,
        eta=message.due,
        task_id=message.id,
    )


def _steps(link: Signature | Sequence[Signature], now: float) -> tuple[Any, ...]:
    return tuple(each.step(now) for each in ((link,) if isinstance(link, Signature) else link))


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _place_of(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return "?" if code is None else f"{code.co_filename}:{code.co_firstlineno}"


sys.modules[__name__].__class__ = ModuleNamedAsAFunction
