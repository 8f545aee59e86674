"""Between calls and bytes: JSON, typed on both sides by the function's annotations.

    encode_call / decode_call       Call <-> a message's body
    encode_outcome / decode_outcome ended tasks <-> a stored result's body
    Parameters                      what a function accepts: checks a call's arguments, converts what a message brought

JSON only. Datetimes, dates, decimals, UUIDs, enums, bytes, sets, dataclasses and msgspec structs are written as JSON
and come back as what the parameter's annotation says; pydantic models too, when pydantic is loaded. What has no
annotation arrives as JSON has it.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from decimal import Decimal
from itertools import chain, repeat
from types import FrameType, SimpleNamespace
from typing import Any, Optional, get_type_hints
from uuid import UUID

import msgspec

from ekiden.errors import (
    ConfigurationError,
    MessageError,
    NewerFormat,
    TaskArgumentsError,
)
from ekiden.kinds import Kind, encode, encode_other, reader_of, unkept
from ekiden.safe_text import repr_of, text_of
from ekiden.signature import FORMAT_VERSION, Call
from ekiden.times import Moment

CONTENT_TYPE_HEADER = "content-type"
JSON_CONTENT_TYPE = "application/json"


UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
"""What reading JSON raises that is none, or is not what was expected."""

_call_decoder = msgspec.json.Decoder(Call)


class _Version(msgspec.Struct):
    v: int


def encode_value(value: Any) -> bytes:
    """``value`` as JSON. Raises TypeError or ValueError for what JSON cannot carry."""
    try:
        body = encode(value)
        if b"null" in body:
            _refuse_not_finite(value)
        if b"{" in body and type(value) not in _WITHOUT_KEYS and _KEY_NOT_OF_TEXT.search(body):
            _refuse_lost_keys(value)
    except OverflowError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it contains itself, or is nested too deeply") from error
    return body


def encode_call(call: Call) -> bytes:
    """A message's body. Raises TaskArgumentsError that names the argument which JSON cannot carry."""
    try:
        body = encode(call)
        # JSON has no infinity and no NaN; the encoder would write null for them, and the task would get None.
        if b"null" in body:
            _refuse_not_finite((call.args, call.kwargs))
        # A second brace begins something with keys. Most calls have none, and to search for keys takes a tenth of what
        # it costs to send one.
        if (
            body.find(b"{", 1) > 0
            and not (
                _WITHOUT_KEYS.issuperset(map(type, call.args))
                and _WITHOUT_KEYS.issuperset(map(type, call.kwargs.values()))
            )
            and _KEY_NOT_OF_TEXT.search(body)
        ):
            _refuse_lost_keys((call.args, call.kwargs))
    except Exception as error:  # a user's class may do anything while it is written as JSON
        raise _unencodable(call, error) from error
    return body


def decode_call(body: bytes, headers: Mapping[str, Any]) -> Call:
    """The call in a message's body. Raises MessageError for what is none, NewerFormat for one of a later version."""
    content_type = headers.get(CONTENT_TYPE_HEADER) if headers else None
    if content_type is not None and content_type != JSON_CONTENT_TYPE:
        raise MessageError(f"its content type is {content_type!r}, and this worker accepts {JSON_CONTENT_TYPE} only")
    try:
        call = _call_decoder.decode(body)
    except UNREADABLE as error:
        raise _undecodable(body, error) from error
    if "\0" in call.id:
        raise MessageError("its task's id holds a zero byte, which no result can be stored under")
    return call


def _undecodable(body: bytes, error: Exception) -> MessageError:
    try:
        version = msgspec.json.decode(body, type=_Version).v
    except UNREADABLE:
        return MessageError(f"its body is not a call: {error}")
    if version > FORMAT_VERSION:
        return NewerFormat(f"its format is {version}, and this worker understands up to {FORMAT_VERSION}")
    return MessageError(f"its body is not a call of format {version}: {error}")


def _refuse_not_finite(value: Any) -> None:
    """Raise ValueError where JSON says null for a number; dataclasses, structs and models are looked into, too."""
    _refuse_not_finite_in(msgspec.to_builtins(value, enc_hook=_looked_into, str_keys=True))


def _looked_into(value: Any) -> Any:
    return None if isinstance(value, msgspec.Raw) else encode_other(value)  # JSON already: it holds none


def _refuse_not_finite_in(value: Any) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} has no JSON form")
    elif isinstance(value, Mapping):
        for each in value.values():
            _refuse_not_finite_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            _refuse_not_finite_in(each)


_WITHOUT_KEYS = frozenset({int, str, float, bool, bytes, type(None)})
_KEY_NOT_OF_TEXT = re.compile(rb'"(?:[-0-9][^"]*|[0-9a-f]{8}-[^"]*)":')
"""A number, date or UUID as a key: only where the JSON may have one are the values looked through."""


def _refuse_lost_keys(value: Any) -> None:
    """Raise ValueError for a mapping two of whose keys are one in JSON, such as 1 and "1"."""
    if isinstance(value, Mapping):
        if not all(type(key) is str for key in value):
            written = msgspec.json.decode(encode(dict.fromkeys(value, 0)))
            if len(written) != len(value):
                raise ValueError(f"{_shortened(value)} has keys that are the same in JSON")
        for each in value.values():
            _refuse_lost_keys(each)
    elif isinstance(value, list | tuple):
        for each in value:
            _refuse_lost_keys(each)


def _unencodable(call: Call, error: Exception) -> TaskArgumentsError:
    named = [(f"argument {index + 1}", value) for index, value in enumerate(call.args)]
    named += [(f"argument {name!r}", value) for name, value in call.kwargs.items()]
    for name, value in named:
        try:
            encode_value(value)
        except Exception as reason:  # noqa: BLE001 - as above
            return TaskArgumentsError(
                f"{call.task}() cannot be sent: {name} ({_shortened(value)}) cannot be carried in a message: "
                f"{text_of(reason)}."
            )
    return TaskArgumentsError(f"{call.task}() cannot be sent: it cannot be carried in a message: {text_of(error)}.")


def _shortened(value: Any, length: int = 80) -> str:
    text = repr_of(value)
    return text if len(text) <= length else text[: length - 3] + "..."


# Outcomes, as results store them.


class FailureRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is kept of an exception: its class by name, its arguments as far as JSON carries them, its text.

    ``args`` are those that its class is made with. ``exceptions``: the members of an ExceptionGroup. ``attributes``:
    those of the object itself, as JSON; ``lost``: the names of those that JSON cannot carry. ``kinds`` says what a
    value was that JSON has as something else, by the name of the attribute or the number of the argument.
    """

    type: str
    message: str
    args: tuple[Any, ...] = ()
    traceback: str | None = None
    exceptions: tuple[FailureRecord, ...] = ()
    attributes: dict[str, Any] = {}
    lost: tuple[str, ...] = ()
    kinds: dict[str, str] = {}


class OutcomeRecord(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="v", tag=FORMAT_VERSION):
    """What a stored result's body holds. ``value`` is the return value or the progress that was told, as JSON.

    ``due``, ``args``, ``kwargs``: when the next try is, and with what if not the same, for RETRY. ``children``: ids of
    the tasks that were sent from its body or ending.
    Times are wall-clock seconds since the epoch; ``runtime`` is in seconds.
    """

    value: msgspec.Raw = msgspec.Raw(b"null")
    failure: FailureRecord | None = None
    task: str | None = None
    args: list[Any] | None = None
    kwargs: dict[str, Any] | None = None
    worker: str | None = None
    retries: int = 0
    queue: str | None = None
    due: Moment | None = None
    done: Moment | None = None
    runtime: float | None = None
    parent: str | None = None
    root: str | None = None
    children: tuple[str, ...] = ()


_outcome_decoder = msgspec.json.Decoder(OutcomeRecord)


def encode_outcome(outcome: OutcomeRecord) -> bytes:
    """A stored result's body."""
    return encode(outcome)


def decode_outcome(body: bytes) -> OutcomeRecord:
    """What a stored result's body says; an empty body (a task that has only begun) says nothing."""
    if not body:
        return OutcomeRecord()
    try:
        return _outcome_decoder.decode(body)
    except UNREADABLE as error:
        raise MessageError(f"a stored result cannot be read: {error}") from error


def decode_value(raw: msgspec.Raw | bytes, kind: Kind | None = None) -> Any:
    """A JSON value as its annotation says, or as JSON has it where it is not what that says."""
    value = msgspec.json.decode(raw)
    if kind is not None:
        with suppress(Exception):  # a class of the user's may raise anything while it is read
            return kind.read(value)
    return value


def check_result(value: Any, body: bytes, kind: Kind) -> None:
    """Raise ValueError for a result that would reach the caller as another value than its annotation lets through."""
    kind.check_kept(value, decode_value(body, kind))


# Arguments.

ARRIVES_AS_IT_IS = frozenset({str, int, float, bool, type(None), date, Decimal, UUID, bytes})
"""Classes whose values are read back as they were; a dict may lose keys, a datetime the seconds of its offset."""


_MOST_REMEMBERED = 1000


class Parameters:
    """What a function accepts, read once when its task is declared.

    Raises ConfigurationError lazily: annotations are resolved when first used, so that they may name what comes later
    in the module.
    """

    def __init__(self, function: Callable[..., Any], *, skip_first: bool) -> None:
        self._function = function
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[1 if skip_first else 0 :]
        self.signature = signature.replace(parameters=parameters)
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self._positional_names = [p.name for p in positional]
        self._keyword_names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._fewest = sum(1 for p in positional if p.default is p.empty)
        self._required = {p.name for p in positional if p.default is p.empty}
        self._takes_plain = all(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
        self._annotations: dict[str, Any] | None = None
        self._kinds: dict[str, Kind] = {}
        self._takes_anything = False
        self._fitting: frozenset[tuple[type, ...]] = frozenset()
        """The types of positional arguments that need no further look; none before annotations are resolved."""
        self._fitting_named: set[tuple[tuple[type, ...], tuple[str, ...], tuple[type, ...]]] = set()
        """The like for calls with names, as they are met: types, names, and the types of what is named."""

    def check(self, task_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise TaskArgumentsError if a call with these does not fit; each value must fit its annotation, too."""
        if self.fit_as_they_are(args, kwargs):
            return
        if kwargs or not self._takes_plain or not self._fewest <= len(args) <= len(self._positional_names):
            self._bind(task_name, args, kwargs)
        annotations = self._annotations
        if annotations is None:
            annotations = self._resolve()
        if annotations:
            for name, value in self._typed(args, kwargs, annotations):
                kind = annotations[name]
                if type(value) is not kind or (kind not in ARRIVES_AS_IT_IS and not _has_json_keys(value)):
                    self._check_value(task_name, name, value)

    def fit_as_they_are(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether these are plainly what the annotations say: nothing about them needs a check or a conversion.

        The ordinary case, known by one look. False is no refusal, but for ``check`` or ``misfit`` to decide.
        """
        if not kwargs:
            if self._takes_anything:
                return self._fewest <= len(args) <= len(self._positional_names)
            return tuple(map(type, args)) in self._fitting
        return self._takes_plain and self._named_fit(args, kwargs)

    def _named_fit(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        found = (tuple(map(type, args)), tuple(kwargs), tuple(map(type, kwargs.values())))
        if found in self._fitting_named:
            return True
        types = dict(zip(self._positional_names, found[0], strict=False))
        named = dict(zip(found[1], found[2], strict=True))
        kinds = self._annotations
        if kinds is None or len(types) < len(args) or not types.keys().isdisjoint(named):
            return False
        types |= named
        if (
            named.keys() <= self._keyword_names
            and types.keys() >= self._required
            and all(kinds.get(name) is kind and kind in ARRIVES_AS_IT_IS for name, kind in types.items())
        ):
            if len(self._fitting_named) < _MOST_REMEMBERED:
                self._fitting_named.add(found)
            return True
        return False

    def convert(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """What a message brought, as the annotations say. Raises TypeError or ValueError naming the parameter."""
        annotations = self._annotations
        if annotations is None:
            annotations = self._resolve()
        if not annotations:
            return args, kwargs
        changed = list(args)
        for index, (name, value) in enumerate(zip(chain(self._positional_names, repeat("*")), args, strict=False)):
            kind = annotations.get(name)
            if kind is not None and type(value) is not kind:
                changed[index] = self._converted(name, value, self._kinds[name])
        if kwargs:
            own, kinds = self._keyword_names, self._kinds
            found = {name: kinds.get(name if name in own else "**") for name in kwargs}
            kwargs = {
                name: value if (kind := found[name]) is None else self._converted(name, value, kind)
                for name, value in kwargs.items()
            }
        return changed, kwargs

    def misfit(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Why the function cannot be called with these, or None if it can."""
        if not kwargs and self._takes_plain and self._fewest <= len(args) <= len(self._positional_names):
            return None
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            return str(error)
        return None

    def retried_with(
        self,
        before: tuple[Sequence[Any], Mapping[str, Any]],
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
    ) -> tuple[Sequence[Any] | None, Mapping[str, Any] | None]:
        """The arguments of a next try that gives one kind only: what it says goes over what the other kind said.

        ``before``: those of this try. None: as before. Without this, ``retry(args=(2,))`` of a call with ``x=1`` would
        give x two values.
        """
        names = self._positional_names
        if args is not None and kwargs is None:
            given = set(names[: len(args)])
            return args, {name: value for name, value in before[1].items() if name not in given}
        if kwargs is not None and args is None and len(before[0]) <= len(names):
            start = next((index for index, name in enumerate(names) if name in kwargs), len(names))
            moved = dict(zip(names[start:], before[0][start:], strict=False))
            return before[0][:start], {**moved, **kwargs}
        return args, kwargs

    def _bind(self, task_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        reason = self.misfit(args, kwargs)
        if reason is not None:
            raise TaskArgumentsError(
                f"{self._name}() {reason}{_called_at()}. {task_name} is declared as {self.declared}."
            )

    @property
    def _name(self) -> str:
        return getattr(self._function, "__name__", repr(self._function))

    @property
    def declared(self) -> str:
        """The function's name and signature, as text."""
        return f"{self._name}{self.signature}"

    def _typed(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], annotations: Mapping[str, Any]
    ) -> list[tuple[str, Any]]:
        named = list(zip(chain(self._positional_names, repeat("*")), args, strict=False))
        if kwargs:
            named += [(name if name in self._keyword_names else "**", value) for name, value in kwargs.items()]
        return [(name, value) for name, value in named if name in annotations]

    def _check_value(self, task_name: str, name: str, value: Any) -> None:
        kind = self._kinds[name]
        try:
            # What the worker will see: written as JSON and read again as the annotation says.
            kind.check_kept(value, kind.read(msgspec.json.decode(encode_value(value))))
        except Exception as error:  # a class of the user's may do anything while it is written and read
            raise TaskArgumentsError(
                f"{self._name}() cannot take {_shortened(value)} for {name!r}{_called_at()}: {text_of(error)}. "
                f"{task_name} is declared as {self.declared}."
            ) from error

    def _converted(self, name: str, value: Any, kind: Kind) -> Any:
        try:
            return kind.read(value)
        except Exception as error:  # as above
            raise TypeError(f"{self._name}() cannot take {_shortened(value)} for {name!r}: {text_of(error)}") from error

    def _resolve(self) -> dict[str, Any]:
        """The parameters that have an annotation, by name (``*``, ``**``), with their types."""
        annotations = {}
        for parameter in self.signature.parameters.values():
            annotation = self._annotation(parameter)
            if annotation is None or annotation is Any:
                continue
            if parameter.kind is parameter.VAR_POSITIONAL:
                name = "*"
            elif parameter.kind is parameter.VAR_KEYWORD:
                name = "**"
            else:
                name = parameter.name
            annotations[name] = annotation
            self._kinds[name] = Kind(annotation)
        self._annotations = annotations
        self._fitting = frozenset(self._exact_types(annotations))
        self._takes_anything = self._takes_plain and not annotations
        return annotations

    def _exact_types(self, kinds: Mapping[str, Any]) -> Iterator[tuple[type, ...]]:
        """For each number of positional arguments the types that arrive as they are, where every parameter has one."""
        if self._takes_plain:
            types: list[type] = []
            for name in self._positional_names:
                if len(types) >= self._fewest:
                    yield tuple(types)
                kind = kinds.get(name)
                if not isinstance(kind, type) or kind not in ARRIVES_AS_IT_IS:
                    return
                types.append(kind)
            yield tuple(types)

    def _annotation(self, parameter: inspect.Parameter) -> Any:
        """What a parameter is annotated with; None for nothing, and for names that only a type checker has."""
        if parameter.annotation is parameter.empty:
            return None
        kind = resolved(parameter.annotation, self._function)
        if kind is not None and parameter.default is None:
            return Optional[kind]  # noqa: UP045 - what is annotated may be text or a special form, which | refuses
        return kind

    def return_kind(self) -> Kind | None:
        """What the function is annotated to return; None for nothing, Any, and names that only a type checker has."""
        annotation = self.signature.return_annotation
        found = None if annotation is inspect.Signature.empty else resolved(annotation, self._function)
        return None if found is None or found is Any else Kind(found)

    def unreadable(self) -> list[str]:
        """A sentence for each annotation that cannot be read: the values arrive as JSON has them."""
        found = []
        for name, written, kind in self._annotated():
            if kind is None:
                found.append(f"{name}: the annotation {written!r} names what cannot be looked up at run time")
            elif kind is not Any and reader_of(kind) is None:
                found.append(f"{name}: values of {written!r} arrive as JSON has them")
        return found

    def check_declared(self, task_name: str) -> None:
        """Raise ConfigurationError for an annotation whose values could never arrive as they were sent."""
        for name, _, kind in self._annotated():
            reason = None if kind is None else unkept(kind)
            if reason is not None:
                raise ConfigurationError(f"task {task_name}: {name} cannot be kept: {reason}.")

    def _annotated(self) -> Iterator[tuple[str, Any, Any]]:
        """Each annotation: of what, as written, and with its names looked up (None where they cannot be)."""
        for parameter in self.signature.parameters.values():
            if parameter.annotation is not parameter.empty:
                yield f"the parameter {parameter.name!r}", parameter.annotation, self._annotation(parameter)
        annotation = self.signature.return_annotation
        if annotation is not inspect.Signature.empty:
            yield "the result", annotation, resolved(annotation, self._function)


def _has_json_keys(value: Any) -> bool:
    """Whether a plain list or mapping is what JSON has: then it needs no look at how it arrives."""
    return type(value) is list or (type(value) is dict and all(type(key) is str for key in value))


def resolved(annotation: Any, function: Callable[..., Any]) -> Any:
    """An annotation of a function with its names looked up; None where they cannot be."""
    holder = SimpleNamespace(__annotations__={"it": annotation})
    namespace = getattr(inspect.unwrap(function), "__globals__", None)
    if namespace is None:
        call = inspect.getattr_static(type(function), "__call__", None)  # of an object that can be called
        namespace = getattr(call, "__globals__", {})
    try:
        return get_type_hints(holder, namespace, include_extras=True)["it"]
    except (NameError, TypeError, AttributeError, SyntaxError):
        return None


def _called_at() -> str:
    """Where the user's code made the call, as text; nothing where that cannot be told, or the command made it."""
    frame: FrameType | None = sys._getframe(1)
    module = ""
    while frame is not None and frame.f_globals.get("__name__", "").startswith("ekiden."):
        module = frame.f_globals["__name__"]
        frame = frame.f_back
    if frame is None or module.startswith("ekiden.cli."):
        return ""
    return f" (called in {frame.f_code.co_filename}:{frame.f_lineno})"
