"""Exceptions on their way from a worker to who asks: as a record, and as the exception again.

    failure_record       an exception -> FailureRecord, which JSON carries
    rebuild_exception    FailureRecord -> an exception of the same class, with its text, arguments and attributes

Three things are kept of an exception: what its class was called with, the attributes of the object, its text. A value
that JSON has as something else (bytes, a tuple, a datetime) travels with its kind, and one that does not arrive equal
travels as its repr (an argument) or by its name alone (an attribute, which is then None).
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any, get_args
from uuid import UUID

import msgspec

from ekiden.codec import FailureRecord, encode_value
from ekiden.errors import BackendError, ResultTimeout, TaskError, TaskPredicate
from ekiden.safe_text import cut, cut_middle, json_bytes, repr_of, storable, text_of

DEFAULT_FAILURE_BYTES = 1024 * 1024
_SMALLEST_FAILURE_BYTES = 1000
_LONGEST_TYPE_NAME = 500
_LONGEST_REPR = 500
_MOST_ARGUMENTS = 100


def failure_record(
    error: BaseException, traceback_text: str | None, *, most_bytes: int = DEFAULT_FAILURE_BYTES
) -> FailureRecord:
    """What is kept of ``error``, in about ``most_bytes``: as much of its text, its arguments and its traceback as fits.

    A kilobyte may always be kept, so that there is a reason. Arguments that JSON cannot carry are kept as their repr.
    Raises nothing, whatever ``error`` is.
    """
    share = max(most_bytes, _SMALLEST_FAILURE_BYTES) // 4
    state = _State(share)
    state.keep_arguments(error)
    state.keep_attributes(error)
    return FailureRecord(
        type_name(type(error)),
        cut(text_of(error), share),
        tuple(state.args),
        None if traceback_text is None else cut_middle(storable(traceback_text), 2 * share),
        _members(error, share),
        state.attributes,
        tuple(state.lost),
        state.kinds,
    )


def _members(error: BaseException, most_bytes: int) -> tuple[FailureRecord, ...]:
    """The members of a group, each in its share of the bytes. Too many for that, or too deep: those that fit."""
    if not isinstance(error, BaseExceptionGroup) or most_bytes < _SMALLEST_FAILURE_BYTES:
        return ()
    try:
        chosen = tuple(error.exceptions)[: most_bytes // _SMALLEST_FAILURE_BYTES]
    except BaseException:  # noqa: BLE001 - as for arguments
        return ()
    return tuple(failure_record(each, None, most_bytes=most_bytes // len(chosen) // 2) for each in chosen)


class _State:
    """What an exception was made with and holds, as JSON, in so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._left = most_bytes
        self.args: list[Any] = []
        self.attributes: dict[str, Any] = {}
        self.lost: list[str] = []
        self.kinds: dict[str, str] = {}

    def keep_arguments(self, error: BaseException) -> None:
        try:
            args = (error.message,) if isinstance(error, BaseExceptionGroup) else tuple(_made_with(error))
        except BaseException:  # noqa: BLE001 - a user's class may have made something else of what is asked here
            return
        for number, argument in enumerate(args[:_MOST_ARGUMENTS]):
            kept = self._kept_exactly(str(number), argument)
            self.args.append(self._kept_roughly(str(number), argument) if kept is _NOT_KEPT else kept)

    def keep_attributes(self, error: BaseException) -> None:
        try:
            held = dict(_attributes_of(error))
        except BaseException:  # noqa: BLE001 - as above
            return
        for name, value in list(held.items())[:_MOST_ARGUMENTS]:
            kept = self._kept_exactly(name, value)
            if kept is _NOT_KEPT and isinstance(value, Exception) and value is not error:
                kept = self._kept_exception(name, value)
            if kept is not _NOT_KEPT:
                self.attributes[name] = kept
            elif self._takes(len(name)):
                self.lost.append(name)

    def _kept_exactly(self, name: str, value: object) -> Any:
        """The value as JSON, its kind noted, if it can be read back as it is and there is room for it."""
        if isinstance(value, str):
            value = str.__str__(value)
        kind = type(value).__name__
        try:
            if type(value) not in _PLAIN and _KINDS.get(kind) is not type(value):
                return _NOT_KEPT
            body = encode_value(value)
            as_json = msgspec.json.decode(body)
            if _read(as_json, kind) != value or not self._takes(len(body)):
                return _NOT_KEPT
        except BaseException:  # noqa: BLE001 - what it holds may be a user's
            return _NOT_KEPT
        if kind in _KINDS:
            self.kinds[name] = kind
        return as_json

    def _kept_exception(self, name: str, error: Exception) -> Any:
        """An exception that another one holds, as SQLAlchemy's hold that of the driver (``orig``)."""
        try:
            kept = _with_exceptions(error, self._left // 2)
            if not self._takes(len(encode_value(kept))):
                return _NOT_KEPT
        except BaseException:  # noqa: BLE001 - as above
            return _NOT_KEPT
        self.kinds[name] = _HOLDS_EXCEPTIONS
        return kept

    def _kept_roughly(self, name: str, argument: object) -> Any:
        """An argument of another kind: what JSON makes of it, else as much of its text or its repr as fits."""
        if isinstance(argument, str):
            text = storable(argument)
        else:
            try:
                found = _with_exceptions(argument, self._left // 2)
                body = encode_value(found)
                if self._takes(len(body)):
                    if found is not argument:
                        self.kinds[name] = _HOLDS_EXCEPTIONS
                    return msgspec.json.decode(body)
            except BaseException:  # noqa: BLE001 - what has no JSON form is kept as its repr, whatever made it so
                pass
            text = repr_of(argument)
            text = text if len(text) <= _LONGEST_REPR else text[: _LONGEST_REPR - 3] + "..."
            self.kinds[name] = _REPR
        kept = cut(text, self._left)
        self._left = max(0, self._left - json_bytes(kept))
        return kept

    def _takes(self, size_bytes: int) -> bool:
        if size_bytes > self._left:
            return False
        self._left -= size_bytes
        return True


def _with_exceptions(value: Any, most_bytes: int) -> Any:
    """The same value with records in place of exceptions in it, as Django's ValidationError has them; or the value."""
    if isinstance(value, Exception):
        if most_bytes < _SMALLEST_FAILURE_BYTES:
            raise ValueError("no room is left for what it holds")
        record = failure_record(value, None, most_bytes=most_bytes)
        return {_EXCEPTION: msgspec.to_builtins(record)}
    if type(value) not in {list, dict} or not value:
        return value
    share = most_bytes // len(value)
    if type(value) is list:
        members = [_with_exceptions(each, share) for each in value]
        return value if all(new is old for new, old in zip(members, value, strict=True)) else members
    changed = {name: _with_exceptions(each, share) for name, each in value.items()}
    return value if all(changed[name] is each for name, each in value.items()) else changed


def _made_with(error: BaseException) -> tuple[Any, ...]:
    """The arguments that its class is called with: ``args`` leave out an OSError's file, a JSONDecodeError's text."""
    if _is_pydantics(type(error)):
        return _made_with_by_pydantic(error)
    reduced = error.__reduce__()
    if isinstance(reduced, tuple) and len(reduced) > 1 and reduced[0] is type(error) and isinstance(reduced[1], tuple):
        return reduced[1]
    return tuple(error.args)


def _attributes_of(error: BaseException) -> Iterator[tuple[str, Any]]:
    """Those that the object itself has: in its ``__dict__``, in slots, and in fields of classes written in C."""
    for name, descriptor in _fields(type(error)):
        if name != "obj":  # of an AttributeError: whatever object it was, with all that this holds
            try:
                yield name, descriptor.__get__(error, type(error))
            except AttributeError:
                continue  # not set
    for name, value in object.__getattribute__(error, "__dict__").items():
        if type(name) is str and name.isidentifier() and not name.startswith("__"):
            yield name, value


def _fields(kind: type) -> Iterator[tuple[str, Any]]:
    for each in kind.__mro__:
        if each in _WITHOUT_FIELDS or _is_pydantics(each):
            continue
        for name, descriptor in vars(each).items():
            if isinstance(descriptor, MemberDescriptorType | GetSetDescriptorType) and not name.startswith("__"):
                yield name, descriptor


_WITHOUT_FIELDS = (object, BaseException, Exception, BaseExceptionGroup, ExceptionGroup)
_NOT_KEPT: Any = object()
_REPR = "repr"
_HOLDS_EXCEPTIONS = "exceptions"
_EXCEPTION = "ekiden:exception"
_PLAIN = frozenset({str, int, float, bool, type(None), list, dict})
_KINDS: Mapping[str, Any] = {
    each.__name__: each for each in (bytes, tuple, set, frozenset, datetime, date, time, timedelta, Decimal, UUID)
}
"""What JSON has as something else, by the names under which a record says what it was. Names are for ever."""


def _read(value: Any, kind: str | None) -> Any:
    """A value of a record, as what it was."""
    if kind == _HOLDS_EXCEPTIONS:
        return _with_rebuilt(value)
    made_of = None if kind is None else _KINDS.get(kind)
    return value if made_of is None else msgspec.convert(value, made_of)


def _with_rebuilt(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_rebuilt(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_EXCEPTION}:
        return rebuild_exception(msgspec.convert(value[_EXCEPTION], FailureRecord))
    return {name: _with_rebuilt(each) for name, each in value.items()}


def type_name(kind: type) -> str:
    """The dotted name of a class, as results and logs tell it; that of a built-in without its module."""
    try:
        module, name = kind.__module__, kind.__qualname__
    except BaseException:  # noqa: BLE001 - a metaclass of a user's may do anything
        module, name = "builtins", "BaseException"
    text = name if module == "builtins" else f"{text_of(module)}.{text_of(name)}"
    return storable(text)[:_LONGEST_TYPE_NAME]


_MEANS_SOMETHING_ELSE = (StopIteration, StopAsyncIteration, TaskPredicate, ResultTimeout, BackendError)
"""What would be taken for something else where ``get()`` raises it: for the end of the caller's own loop or generator,
for what becomes of the caller's own call, or for what ``get()`` raises on its own account."""


def rebuild_exception(record: FailureRecord) -> BaseException:
    """The exception that ``record`` tells of: its own class if that is a built-in or imported already, else TaskError.

    ``str()`` of it is the worker's text, whatever the class makes of its arguments, and its attributes are the
    worker's; those that JSON cannot carry are None, unless the constructor has set them. Nothing is imported because
    a message says so, and only exception classes are made. What its raising would say to the caller's own program
    (StopIteration ends a loop) is a TaskError, too.
    """
    kind = _known_class(record.type)
    if kind is None or issubclass(kind, _MEANS_SOMETHING_ELSE):
        return _task_error(record)
    if _is_pydantics(kind):
        return _made_by_pydantic(kind, record) or _task_error(record)
    try:
        told = _Told.by(record)
    except Exception:  # noqa: BLE001 - somebody has made the record up
        return _task_error(record)
    for make in (_made_anew, _without_its_constructor, _with_its_text, _of_a_class_with_its_text):
        try:
            error = make(kind, told)
            _set_attributes(error, told)
            if isinstance(error, kind) and text_of(error) == told.message:
                return error
        except BaseException:  # noqa: BLE001 - a class of the user's may want other arguments, or do anything
            continue
    return _task_error(record)


@dataclass(frozen=True, slots=True)
class _Told:
    """What a record says, read once: an exception in it that holds others is not made again for each way to make it."""

    message: str
    args: tuple[Any, ...]
    members: list[Exception]
    attributes: dict[str, Any]
    lost: tuple[str, ...]
    has_reprs: bool

    @classmethod
    def by(cls, record: FailureRecord) -> _Told:
        kinds = record.kinds
        return cls(
            record.message,
            tuple(_read(each, kinds.get(str(number))) for number, each in enumerate(record.args)),
            [each for each in map(rebuild_exception, record.exceptions) if isinstance(each, Exception)],
            {name: _read(value, kinds.get(name)) for name, value in record.attributes.items()},
            record.lost,
            _REPR in kinds.values(),
        )


def _made_anew(kind: type[Exception], told: _Told) -> Exception:
    """By its constructor, with the arguments that it was made with."""
    return kind(told.args[0], told.members) if issubclass(kind, ExceptionGroup) else kind(*told.args)


def _without_its_constructor(kind: type[Exception], told: _Told) -> Exception:
    """Where the constructor takes others than it passes on, as most of users' classes do."""
    return _bare(kind, told.args)


def _with_its_text(kind: type[Exception], told: _Told) -> Exception:
    return _bare(kind, (told.message,))


def _bare(kind: type[Exception], args: tuple[Any, ...]) -> Exception:
    """An object that no code of the user's has seen, made by the class written in C that the layout is of."""
    layout: Any = kind
    while layout.__flags__ & _MADE_AT_RUN_TIME and layout.__base__ is not None:
        layout = layout.__base__
    error: Exception = layout.__new__(kind, *args)
    _set_args(error, args)  # past a __setattr__ of the user's: a frozen dataclass refuses
    return error


_set_args = vars(BaseException)["args"].__set__
_MADE_AT_RUN_TIME = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: set for every class that a ``class`` statement made."""


def _set_attributes(error: Exception, told: _Told) -> None:
    """Give it the worker's attributes, without a call of any code of the user's."""
    fields = dict(_fields(type(error)))
    own = object.__getattribute__(error, "__dict__")
    held = dict(_attributes_of(error))
    # What a constructor has made of a repr is not what the worker had.
    lost = {name: None for name in told.lost if told.has_reprs or name not in held}
    for name, value in {**told.attributes, **lost}.items():
        if name in fields:
            # An OSError without a file holds None, and is one with a file when None is set.
            if value is not None or held.get(name, _NOT_KEPT) is not None:
                with suppress(AttributeError, TypeError, ValueError):  # one that only its class can set
                    fields[name].__set__(error, value)
        elif name.isidentifier() and not name.startswith("__"):
            own[name] = value


def _of_a_class_with_its_text(kind: type[Exception], told: _Told) -> Exception:
    """Where ``__str__`` needs what only the constructor sets: a subclass, since ``except`` has to work."""
    body = {"__str__": lambda _self: told.message, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return _with_its_text(type(kind.__name__, (kind,), body), told)


def _known_class(dotted: str) -> type[Exception] | None:
    """The exception class of that name in a module that is imported, maybe inside another class; None for no such."""
    parts = dotted.split(".")
    if len(parts) == 1:
        parts.insert(0, builtins.__name__)
    for length in range(len(parts) - 1, 0, -1):
        found: object = sys.modules.get(".".join(parts[:length]))
        if isinstance(found, ModuleType):
            for name in parts[length:]:
                found = vars(found).get(name) if isinstance(found, ModuleType | type) else None
            return found if isinstance(found, type) and issubclass(found, Exception) else None
    return None


def _task_error(record: FailureRecord) -> TaskError:
    return TaskError(record.message or record.type, type_name=record.type, traceback_text=record.traceback)


# Pydantic's ValidationError has no constructor and allows no subclasses: it is made from what its errors() tell.


def _is_pydantics(kind: type) -> bool:
    return kind is getattr(sys.modules.get("pydantic_core"), "ValidationError", None)


def _made_with_by_pydantic(error: Any) -> tuple[Any, ...]:
    """Title, errors, the kind of input, whether inputs are hidden; and in each error its input, if JSON carries it."""
    title, errors, input_type, hide_input = error.__reduce__()[1]
    hide_input = hide_input or not all(_is_plain(each["input"]) for each in errors)
    details = []
    for each in errors:
        detail = {"type": getattr(each["type"], "type", each["type"]), "loc": list(each["loc"]), "msg": each["msg"]}
        if not hide_input:
            detail["input"] = each["input"]
        context = each.get("ctx", {})
        detail["ctx"] = {name: value if _is_plain(value) else text_of(value) for name, value in context.items()}
        details.append(detail)
    return title, details, input_type, hide_input


def _is_plain(value: object) -> bool:
    return _State(DEFAULT_FAILURE_BYTES)._kept_exactly("", value) is not _NOT_KEPT and type(value) in _PLAIN


def _made_by_pydantic(kind: Any, record: FailureRecord) -> Exception | None:
    """None where the record does not hold enough. Its text lacks the inputs where JSON could not carry them."""
    pydantic_core = sys.modules["pydantic_core"]
    known = get_args(pydantic_core.core_schema.ErrorType)
    try:
        title, details, input_type, hide_input = record.args
        for each in details:
            each_type, text, context = each["type"], each["msg"], each["ctx"]
            if each_type not in known:
                each["type"] = pydantic_core.PydanticCustomError(each_type, text, context or None)
        made: Exception = kind.from_exception_data(title, details, input_type, hide_input)
    except Exception:  # noqa: BLE001 - of another version of pydantic, or made up
        return None
    return made
