"""One delivery in, one outcome out, and what that means.

    run, run_async   call a task's body and say what happened: an Outcome
    verdict          what becomes of the message and the result: a pure function, a table

The table, one row per outcome (``verdict`` is this table as code, and the tests walk it):

    outcome              stored      published                                    delivery
    Succeeded            SUCCESS     what follows on success                      settled
    Retried              RETRY       the same call, one more try, due later       settled
    Failed               FAILURE     what follows on error; a copy to .dead       settled
    Ignored              -           -                                            settled
    Rejected             FAILURE     what follows on error; a copy to .dead       settled
    Rejected, requeue    -           -                                            released, its attempt counts
    Expired              EXPIRED     what follows on error                        settled
    Revoked              REVOKED     what follows on error                        settled
    Unprocessable        FAILURE     what follows on error; a copy to .dead       settled
    Postponed            -           -                                            released with a delay
    SecondCopy           -           -                                            settled
    AlreadyEnded         -           what follows from the stored outcome         settled

Unprocessable stores nothing for a body that cannot be read: it names no task to store a result of.

Where the sender waits for a reply (``ekiden.replies``), what would be stored is told to it as well; or instead, where
the backend of the worker stores nothing.

Outcomes are plain data, because a body may run in another process.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import CoroutineType, TracebackType
from typing import TYPE_CHECKING, Any, assert_never

import msgspec

from ekiden import hooks
from ekiden.codec import (
    ARRIVES_AS_IT_IS,
    FailureRecord,
    OutcomeRecord,
    check_result,
    decode_call,
    decode_outcome,
    encode_call,
    encode_outcome,
    encode_value,
)
from ekiden.errors import (
    Ignore,
    MessageError,
    MisuseError,
    Reject,
    Retry,
    TaskArgumentsError,
    TaskError,
    TaskExpired,
    TaskRejected,
    TaskRevoked,
)
from ekiden.failures import failure_record, type_name
from ekiden.loggers import safe_logger
from ekiden.message import (
    DEAD_SUFFIX,
    RESERVED_HEADER_PREFIX,
    Delivery,
    HeaderValue,
    Message,
    derived_id,
    unsendable,
)
from ekiden.options import Policy, Sending, call_options, check_call_options
from ekiden.outcomes import (
    NULL,
    AlreadyEnded,
    Expired,
    Failed,
    Ignored,
    NextTry,
    Outcome,
    Postponed,
    Rejected,
    Retried,
    Revoked,
    SecondCopy,
    Succeeded,
    Unprocessable,
)
from ekiden.replies import REPLY_TO_HEADER, reply_queue
from ekiden.request import MOST_CHILDREN, Execution, Request, running
from ekiden.results import StoredResult
from ekiden.retry import is_retried, retry_delay, tries_left
from ekiden.routes import check_queue_name
from ekiden.safe_text import cut, storable, text_of, traceback_text
from ekiden.signature import Call, Step, due_of_retry, follow_up_id, seconds_until
from ekiden.states import State

if TYPE_CHECKING:
    from ekiden.task import Task

logger = safe_logger(__name__)

REQUEUE_DELAY = 1.0
"""Seconds after which a message that its task gave back (``Reject(requeue=True)``) is handed out again."""

_LONGEST_ERROR_HEADER = 1000
_LONGEST_LAST_ERROR = 1000
_LARGEST_NUMBER = 2**63 - 1


# Running a body.


def run(task: Task[..., Any], policy: Policy, request: Request) -> Outcome:
    """Call the body of a ``def`` task in this thread, with all that belongs to it, and say what happened."""
    execution = Execution(request, [])
    token = running.set(execution)
    started = time.perf_counter()
    value: Any = None
    try:
        args, kwargs = begin(task, policy, request)
        value = task.function(*args, **kwargs)
        if type(value) is CoroutineType:  # of an `async def` behind a decorator that is none
            value = _awaited(value)
        outcome: Outcome = Succeeded(_encoded(task, value, policy))
    except BaseException as error:  # noqa: BLE001 - whatever a body raises is its outcome, SystemExit too
        outcome = outcome_of(error, policy, request, time.time())
        value = error
    try:
        return finish(task, policy, execution, outcome, value=value, runtime=time.perf_counter() - started)
    finally:
        running.reset(token)


def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    import asyncio  # 40 ms to import, and hardly any task needs it here

    return asyncio.run(coroutine)


async def run_async(
    task: Task[..., Any],
    policy: Policy,
    request: Request,
    run_body: Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]] | None = None,
) -> Outcome:
    """Await the body of an ``async def`` task, with all that belongs to it, and say what happened.

    ``run_body`` awaits the body's coroutine, and may interrupt it.
    """
    execution = Execution(request, [])
    token = running.set(execution)
    started = time.perf_counter()
    value: Any = None
    try:
        args, kwargs = begin(task, policy, request)
        body = task.function(*args, **kwargs)
        value = await (body if run_body is None else run_body(body))
        outcome: Outcome = Succeeded(_encoded(task, value, policy))
    except BaseException as error:  # noqa: BLE001 - whatever a body raises is its outcome, CancelledError too
        outcome = outcome_of(error, policy, request, time.time())
        value = error
    try:
        return finish(task, policy, execution, outcome, value=value, runtime=time.perf_counter() - started)
    finally:
        running.reset(token)


def begin(task: Task[..., Any], policy: Policy, request: Request) -> tuple[Any, Mapping[str, Any]]:
    """What comes before the body: the arguments as its annotations say, ``before_start``, the prerun signal.

    Raises _Misfit when the arguments do not fit.
    """
    call = request.call
    args, kwargs = call.args, call.kwargs
    parameters = task.parameters
    if parameters.fit_as_they_are(args, kwargs):
        args = list(args)  # who is called below may change them, and the call is to stay as it is
    else:
        misfit = parameters.misfit(args, kwargs)
        if misfit is not None:
            raise _MisfitError(f"{task.name}: {misfit}; it is declared as {parameters.declared}")
        if policy.typing:
            try:
                args, kwargs = parameters.convert(args, kwargs)
            except (TypeError, ValueError) as error:
                raise _MisfitError(f"{task.name}: {error}; it is declared as {parameters.declared}") from error
    if task.has_hooks:
        task.before_start(call.id, args, kwargs)
    if hooks.task_prerun.receivers:
        hooks.task_prerun.send(task, task_id=call.id, task=task, args=args, kwargs=kwargs)
    return args, kwargs


class Terminated(BaseException):
    """Raised in a body from outside, to end it because its task was revoked."""


class _MisfitError(TaskArgumentsError):
    """A message brought arguments that the function cannot be called with."""


_NUMBERS = frozenset({bool, int, float})


def _encoded(task: Task[..., Any], value: Any, policy: Policy) -> msgspec.Raw:
    if value is None:
        return NULL
    try:
        body = encode_value(value)
        if type(value) not in _NUMBERS:
            kind = task.return_kind()
            if kind is not None and (kind.annotation is not type(value) or kind.annotation not in ARRIVES_AS_IT_IS):
                check_result(value, body, kind)
    except (TypeError, ValueError) as error:
        raise _UnstorableError(f"its result cannot be stored: {text_of(error)}") from error
    if len(body) > policy.result_max_bytes:
        raise _UnstorableError(
            f"its result has {len(body)} bytes; result_max_bytes allows {policy.result_max_bytes}. Store it elsewhere "
            "and return where."
        )
    return msgspec.Raw(body)


class _UnstorableError(MisuseError):
    """A body returned what cannot be stored. Never retried: the next try would return the like."""


def outcome_of(error: BaseException, policy: Policy, request: Request, now: float) -> Outcome:
    """What an exception out of a body means for its call. Raises nothing: what is wrong with ``error`` is a failure."""
    try:
        return _outcome_of(error, policy, request, now)
    except BaseException as trouble:  # noqa: BLE001 - a Retry may hold anything, and a user's exception do anything
        return Failed(_failure_of(trouble, policy))


def _outcome_of(error: BaseException, policy: Policy, request: Request, now: float) -> Outcome:
    match error:
        case Retry():
            return _asked_for(error, policy, request, now)
        case Ignore():
            return Ignored()
        case Reject():
            return _rejected(error, policy, request)
        case Terminated():
            return Revoked(terminated=True)
        case _MisfitError():
            return Unprocessable(failure_record(TaskArgumentsError(str(error)), None))
        case _UnstorableError():
            return Failed(failure_record(MisuseError(str(error)), None))
    failure = _failure_of(error, policy)
    if is_retried(policy, error) and tries_left(policy.max_retries, request.call.retries):
        return Retried(due=now + retry_delay(policy, request.call.retries, random.random()), failure=failure)
    return Failed(failure)


def _rejected(error: Reject, policy: Policy, request: Request) -> Rejected:
    """What a body gives back counts as handed out, so that one which always does so ends in the dead letters."""
    reason = cut("" if error.reason is None else text_of(error.reason), policy.result_max_bytes // 4)
    if not error.requeue or request.attempt < policy.max_deliveries:
        return Rejected(reason, bool(error.requeue))
    often = policy.max_deliveries
    why = f"it was handed out {often} times, and max_deliveries allows no more; self.retry() lets a call wait"
    return Rejected(f"{reason}; {why}" if reason else why, requeue=False)


def _failure_of(error: BaseException, policy: Policy) -> FailureRecord:
    """What is kept of an exception out of a body: no more than may be kept of its result."""
    return failure_record(error, _traceback_of(error), most_bytes=policy.result_max_bytes)


def _asked_for(retry: Retry, policy: Policy, request: Request, now: float) -> Retried:
    """The next try as the body asked for it, its arguments as a message carries them."""
    if retry.exc is not None and not isinstance(retry.exc, BaseException):
        raise MisuseError(f"Retry(exc=...) takes the exception that went wrong, not {type_name(type(retry.exc))}.")
    args, kwargs = retry.new_args, retry.new_kwargs
    changed = msgspec.structs.replace(request.call, args=args or (), kwargs=kwargs or {})
    carried = request.call if args is None and kwargs is None else decode_call(encode_call(changed), {})
    return Retried(
        due=due_of_retry(retry.when, now),
        failure=None if retry.exc is None else _failure_of(retry.exc, policy),
        args=None if args is None else list(carried.args),
        kwargs=None if kwargs is None else dict(carried.kwargs),
        options=None if not retry.new_options else _sent_with(retry.new_options, request, now),
    )


_NEXT_TRY = NextTry.__struct_fields__


def _sent_with(options: Mapping[str, Any], request: Request, now: float) -> NextTry:
    """What ``retry(queue=...)`` says of the next try. Raises ConfigurationError for what no call takes."""
    checked = call_options(request.task, options)
    check_call_options(request.task, checked)
    for name in options:
        if name not in _NEXT_TRY:
            raise MisuseError(f"retry() takes {', '.join(_NEXT_TRY)} of a call's options, not {name!r}.")
    said = {name: value for name, value in options.items() if name != "expires"}
    seconds = seconds_until(checked.expires, now)
    return NextTry(**said, expires=None if seconds is None else now + seconds)


def finish(
    task: Task[..., Any], policy: Policy, execution: Execution, outcome: Outcome, *, value: Any, runtime: float
) -> Outcome:
    """What comes after the body: the task's own handlers and the signals. ``value``: what it returned or raised."""
    request = execution.request
    if type(outcome) is Succeeded:
        outcome = Succeeded(outcome.value, tuple(execution.children), runtime)
    elif isinstance(outcome, Failed | Retried):
        outcome = msgspec.structs.replace(outcome, children=tuple(execution.children), runtime=runtime)
    if task.has_hooks:
        outcome = _call_handlers(task, policy, request, outcome, value=value)
    if hooks.task_ended_receivers():
        try:
            _send_signals(task, request, outcome, value)
        except Exception:
            logger.exception("%s[%s]: its end could not be signalled", task.name, request.id)
    return outcome


def _call_handlers(task: Task[..., Any], policy: Policy, request: Request, outcome: Outcome, *, value: Any) -> Outcome:
    call = request.call
    try:
        match outcome:
            case Succeeded():
                task.on_success(value, call.id, call.args, call.kwargs)
            case Retried():
                task.on_retry(_cause(value), call.id, call.args, call.kwargs, _einfo(outcome.failure))
            case Failed():
                task.on_failure(value, call.id, call.args, call.kwargs, _einfo(outcome.failure))
            case _:
                return outcome
        task.after_return(_state_of(outcome), value, call.id, call.args, call.kwargs, _einfo_of(outcome))
    except BaseException as error:  # noqa: BLE001 - a handler of the user's may do anything; its failure is the task's
        failure = _failure_of(error, policy)
        return Failed(failure, getattr(outcome, "children", ()), getattr(outcome, "runtime", None))
    return outcome


def _send_signals(task: Task[..., Any], request: Request, outcome: Outcome, value: Any) -> None:
    call = request.call
    match outcome:
        case Succeeded():
            hooks.task_success.send(task, result=value, task_id=call.id)
        case Retried():
            hooks.task_retry.send(task, request=request, reason=_cause(value), einfo=_einfo(outcome.failure))
        case Failed():
            hooks.task_failure.send(
                task,
                task_id=call.id,
                exception=value,
                args=call.args,
                kwargs=call.kwargs,
                traceback=_frames_of(value),
                einfo=_einfo(outcome.failure),
            )
    hooks.task_postrun.send(
        task,
        task_id=call.id,
        task=task,
        args=call.args,
        kwargs=call.kwargs,
        retval=value,
        state=_state_of(outcome),
    )


def _cause(error: Any) -> Any:
    return error.exc if isinstance(error, Retry) and error.exc is not None else error


def _einfo(failure: FailureRecord | None) -> str | None:
    return None if failure is None else failure.traceback


def _einfo_of(outcome: Outcome) -> str | None:
    return _einfo(getattr(outcome, "failure", None))


def _state_of(outcome: Outcome) -> str:
    match outcome:
        case Succeeded():
            return State.SUCCESS
        case Retried():
            return State.RETRY
        case Revoked():
            return State.REVOKED
        case Ignored():
            return "IGNORED"
        case Rejected():
            return "REJECTED"
        case _:
            return State.FAILURE


_OUR_FILES = (__file__,)


def _traceback_of(error: BaseException) -> str:
    """The traceback as text, without the frames of ours above the user's function."""
    frames = _frames_of(error)
    while frames is not None and frames.tb_frame.f_code.co_filename in _OUR_FILES and frames.tb_next is not None:
        frames = frames.tb_next
    return traceback_text(error, frames)


def _frames_of(error: Any) -> TracebackType | None:
    try:
        frames = error.__traceback__
    except BaseException:  # noqa: BLE001 - a user's exception may answer anything when it is asked for what it holds
        return None
    return frames if isinstance(frames, TracebackType) else None


# The verdict.


class Context(msgspec.Struct, frozen=True):
    """What a verdict depends on besides the outcome: the time, the worker's name, and where calls go.

    ``route(task name, queue, priority)`` says where a follow-up goes; ``result_expires`` is in seconds.
    """

    now: float
    worker: str
    route: Callable[[str, str | None, int | None], Sending]
    result_expires: float | None
    stores_results: bool = True


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """What is to be done: store ``result``; then settle the delivery with ``publish``, or release it after ``release``.

    ``release`` is None for settling, else the delay in seconds; ``keep_attempt`` says that it was started, so that its
    attempt counts. ``reply`` is to be told to who waits at ``reply_to`` before or while the delivery is settled.
    """

    result: StoredResult | None = None
    publish: tuple[Message, ...] = ()
    release: float | None = None
    keep_attempt: bool = False
    reply: StoredResult | None = None
    reply_to: str | None = None


_SETTLE = Verdict()


class _Case(msgspec.Struct, frozen=True, gc=False):
    """What a verdict is about. ``call`` and ``policy`` are None for what could not be read or is not known."""

    delivery: Delivery
    call: Call | None
    policy: Policy | None
    context: Context


def verdict(
    delivery: Delivery, call: Call | None, policy: Policy | None, outcome: Outcome, context: Context
) -> Verdict:
    """What becomes of a message. ``call`` and ``policy`` are None for what could not be read or is not known."""
    case = _Case(delivery, call, policy, context)
    match outcome:
        case Succeeded():
            return _succeeded(case, outcome)
        case Retried():
            return _retried(case, outcome)
        case Failed():
            keeps = policy is None or policy.dead_letter
            return _failed(case, State.FAILURE, outcome, keep=keeps)
        case Unprocessable(failure=failure):
            return _failed(case, State.FAILURE, Failed(failure), keep=True)
        case Rejected(requeue=True):
            return Verdict(release=REQUEUE_DELAY, keep_attempt=True)
        case Rejected(reason=reason):
            return _failed(
                case, State.FAILURE, _failure(TaskRejected(f"rejected: {reason}" if reason else "rejected")), keep=True
            )
        case Expired():
            return _failed(case, State.EXPIRED, _failure(TaskExpired(_expired_text(case))))
        case Revoked(terminated=terminated):
            text = with_last_error("terminated" if terminated else "revoked", case.call)
            return _failed(case, State.REVOKED, _failure(TaskRevoked(text)))
        case Postponed(delay=delay, keep_attempt=keep_attempt):
            return Verdict(release=delay, keep_attempt=keep_attempt)
        case Ignored() | SecondCopy():
            return _SETTLE
        case AlreadyEnded():
            return _repeated(case, outcome)
        case _:
            assert_never(outcome)


def _succeeded(case: _Case, outcome: Succeeded) -> Verdict:
    call = case.call
    assert call is not None
    follow_ups = _follow_ups(case, call, call.on_success, outcome.value, "success") if call.on_success else ()
    return _ended(case, State.SUCCESS, outcome, follow_ups, follow_ups)


def _retried(case: _Case, outcome: Retried) -> Verdict:
    assert case.call is not None
    again = _next_try(case.delivery.message, case.call, outcome, case.context)
    return _ended(case, State.RETRY, outcome, (), (again,))


def _failed(case: _Case, state: State, outcome: Failed, *, keep: bool = False) -> Verdict:
    call = case.call
    kept = (dead_letter(case.delivery, outcome.failure, case.context.now),) if keep else ()
    if call is None:
        return Verdict(None, kept)
    follow_ups = _follow_ups(case, call, call.on_error, msgspec.Raw(encode_value(call.id)), "error")
    return _ended(case, state, outcome, follow_ups, (*follow_ups, *kept))


def _repeated(case: _Case, outcome: AlreadyEnded) -> Verdict:
    """What followed from a stored outcome follows again; what arrived the first time is a duplicate to the broker."""
    stored = stored_outcome(outcome.state, outcome.body)
    if stored is None:
        return _SETTLE
    return msgspec.structs.replace(verdict(case.delivery, case.call, case.policy, stored, case.context), result=None)


def _expired_text(case: _Case) -> str:
    attempt = case.delivery.attempt
    text = "expired before a worker could start it"
    if attempt > 1:
        text += f" again; it had been handed out {attempt - 1} times before, and not ended"
    return with_last_error(text, case.call)


def with_last_error(text: str, call: Call | None) -> str:
    """``text``, which says why a call ends without having run, and what its last try raised if it was tried before."""
    if call is None or call.last_error is None:
        return text
    return f"{text}; try {call.retries} of it had failed: {call.last_error}"


def _failure(error: TaskError) -> Failed:
    return Failed(failure_record(error, None))


def stored_outcome(state: str, body: bytes) -> Outcome | None:
    """The outcome that a stored result tells of; None for one after which nothing follows."""
    record = decode_outcome(body)
    match state:
        case State.SUCCESS:
            return Succeeded(record.value)
        case State.RETRY:
            return Retried(record.due or 0.0, record.failure, record.args, record.kwargs)
        case State.FAILURE if record.failure is not None:
            return Failed(record.failure)
        case State.EXPIRED:
            return Expired()
        case State.REVOKED:
            return Revoked()
        case _:
            return None


def keeps_result(call: Call, policy: Policy | None) -> bool:
    """Whether this call's result is kept. That of a fenced one is, so that a second copy of it finds it ended."""
    if call.fenced or policy is None:
        return True
    return not (policy.ignore_result if call.ignore_result is None else call.ignore_result)


def _ended(
    case: _Case,
    state: State,
    outcome: Succeeded | Failed | Retried,
    follow_ups: tuple[Message, ...],
    publish: tuple[Message, ...],
) -> Verdict:
    """The verdict on a call that was tried: its result is stored, and told to whoever waits for a reply."""
    call, context, message = case.call, case.context, case.delivery.message
    assert call is not None
    stores = context.stores_results and keeps_result(call, case.policy)
    reply_to = wanted_reply_queue(message, call, case.policy) if REPLY_TO_HEADER in message.headers else None
    if not stores and reply_to is None:
        return Verdict(None, publish)
    children = outcome.children
    if follow_ups:
        children = (*children, *(each.id for each in follow_ups))[:MOST_CHILDREN]
    succeeded = outcome if isinstance(outcome, Succeeded) else None
    retried = None if succeeded is not None or not isinstance(outcome, Retried) else outcome
    record = OutcomeRecord(
        value=NULL if succeeded is None else succeeded.value,
        failure=None if isinstance(outcome, Succeeded) else outcome.failure,
        task=call.task,
        args=None if retried is None else retried.args,
        kwargs=None if retried is None else retried.kwargs,
        worker=context.worker,
        retries=call.retries,
        queue=message.queue,
        due=None if retried is None else retried.due,
        done=context.now,
        runtime=outcome.runtime,
        parent=call.parent,
        root=call.root,
        children=children,
    )
    result = StoredResult(call.id, str(state), call.retries, encode_outcome(record), context.result_expires)
    if reply_to is None:
        return Verdict(result, publish)
    return Verdict(result if stores else None, publish, reply=result, reply_to=reply_to)


def wanted_reply_queue(message: Message, call: Call, policy: Policy | None) -> str | None:
    """Where it is told how this call fares; None where nobody wants to know."""
    unfenced = msgspec.structs.replace(call, fenced=False)  # what is kept for the fence alone interests no caller
    return reply_queue(message.headers) if keeps_result(unfenced, policy) else None


_AS_THIS_ONE = NextTry()


def _next_try(message: Message, call: Call, outcome: Retried, context: Context) -> Message:
    again = msgspec.structs.replace(
        call,
        args=call.args if outcome.args is None else outcome.args,
        kwargs=call.kwargs if outcome.kwargs is None else outcome.kwargs,
        retries=call.retries + 1,
        eta=outcome.due,
        fenced=True,
        last_error=None if outcome.failure is None else _error_text(outcome.failure),
    )
    options = outcome.options or _AS_THIS_ONE
    again = msgspec.structs.replace(
        again,
        expires=again.expires if options.expires is None else options.expires,
        ignore_result=again.ignore_result if options.ignore_result is None else options.ignore_result,
        time_limit=options.time_limit or again.time_limit,
        soft_time_limit=options.soft_time_limit or again.soft_time_limit,
    )
    return Message(
        derived_id(message.id, "retry"),
        options.queue or message.queue,
        encode_call(again),
        {**message.headers, **options.headers} if options.headers else message.headers,
        message.priority if options.priority is None else options.priority,
        outcome.due if outcome.due > context.now else None,
    )


def _error_text(failure: FailureRecord) -> str:
    name = failure.type.removeprefix("builtins.")
    return cut(f"{name}: {failure.message}" if failure.message else name, _LONGEST_LAST_ERROR)


def _follow_ups(case: _Case, call: Call, steps: tuple[Step, ...], first: msgspec.Raw, why: str) -> tuple[Message, ...]:
    headers = case.delivery.message.headers
    carried = {REPLY_TO_HEADER: headers[REPLY_TO_HEADER]} if REPLY_TO_HEADER in headers else {}
    return tuple(
        _follow_up(step, call, first, why=f"{why} {index}", carried=carried, context=case.context)
        for index, step in enumerate(steps)
    )


def _follow_up(
    step: Step, call: Call, first: msgspec.Raw, *, why: str, carried: dict[str, HeaderValue], context: Context
) -> Message:
    task_id = follow_up_id(step, call.id, why)
    due = None if step.countdown is None or step.countdown <= 0 else context.now + step.countdown
    sending = context.route(step.task, step.queue, step.priority)
    check_queue_name(sending.queue)  # one that a caller may name: no reply queue, and no dead letters
    follow_up = Call(
        task=step.task,
        id=task_id,
        sent=context.now,
        args=step.args if step.immutable else (first, *step.args),
        kwargs=step.kwargs,
        eta=due,
        expires=None if step.expires is None else max(0.0, context.now + step.expires),
        root=call.root or call.id,
        parent=call.id,
        on_success=step.on_success,
        on_error=step.on_error,
        ignore_result=step.ignore_result,
        time_limit=step.time_limit,
        soft_time_limit=step.soft_time_limit,
        fenced=True,
        sending=None if step.task_id is None else derived_id(call.id, why),
    )
    headers = {**step.headers, **carried} if carried else step.headers
    message = Message(task_id, sending.queue, encode_call(follow_up), headers, sending.priority, due)
    refused = unsendable(message)
    if refused is not None:
        raise MisuseError(f"{step.task}, which follows {call.task}, cannot be sent: {refused}.")
    return message


def dead_letter(delivery: Delivery, failure: FailureRecord, now: float, *, bare: bool = False) -> Message:
    """The copy of a message that goes to ``<queue>.dead``: body as it was, and the reason in headers.

    ``bare``: without the message's own headers, where the broker does not take those.
    """
    message = delivery.message
    own = {} if bare else _carried_on(message.headers)
    headers = {
        **own,
        f"{RESERVED_HEADER_PREFIX}dead-queue": message.queue,
        f"{RESERVED_HEADER_PREFIX}dead-reason": failure.type.rpartition(".")[2],
        f"{RESERVED_HEADER_PREFIX}dead-error": failure.message[:_LONGEST_ERROR_HEADER],
        f"{RESERVED_HEADER_PREFIX}dead-attempts": min(delivery.attempt, _LARGEST_NUMBER),
        f"{RESERVED_HEADER_PREFIX}dead-at": now,
    }
    return Message(derived_id(message.id, "dead"), message.queue + DEAD_SUFFIX, message.body, headers, message.priority)


def _carried_on(headers: Mapping[Any, Any]) -> dict[str, HeaderValue]:
    """A message's own headers as its dead letter has them: what no broker carries becomes text."""
    carried: dict[str, HeaderValue] = {}
    for name, value in headers.items():
        if not isinstance(name, str) or not name.startswith(RESERVED_HEADER_PREFIX):
            carried[storable(name) if isinstance(name, str) else text_of(name)] = _carried_value(value)
    return carried


def _carried_value(value: Any) -> HeaderValue:
    match value:
        case bool() | None:
            return value
        case str():
            return storable(value)
        case int() if type(value) is int and abs(value) <= _LARGEST_NUMBER:
            return value
        case float() if type(value) is float and math.isfinite(value):
            return value
        case _:
            return text_of(value)[:_LONGEST_ERROR_HEADER]


def redriven(dead: Message, queue: str, *, now: float | None = None) -> Message:
    """The message that a dead letter becomes when it is sent back to ``queue``: the same call, with all its tries.

    ``now`` (seconds since the epoch) is when: the call counts as sent then, and lives as long again as it had from
    its sending to its ``expires``. Forget the task's stored result before it is published: nothing replaces a final
    one.
    """
    headers = {name: value for name, value in dead.headers.items() if not name.startswith(RESERVED_HEADER_PREFIX)}
    try:
        call = decode_call(dead.body, headers)
    except MessageError:
        body = dead.body  # a worker that was mended may read it now, or one of a newer version, within its grace
        due = now
    else:
        again = msgspec.structs.replace(call, retries=0, eta=None, fenced=False, last_error=None)
        body = encode_call(again if now is None else _sent_anew(again, now))
        due = None
    return Message(derived_id(dead.id, "redrive"), queue, body, headers, dead.priority, due)


def _sent_anew(call: Call, now: float) -> Call:
    if call.expires is None:
        return msgspec.structs.replace(call, sent=now)
    lifetime = call.expires - call.sent
    return msgspec.structs.replace(call, sent=now, expires=now + lifetime if lifetime > 0 else None)
