"""Values of annotated types as JSON: written, read back as the annotation says, and checked to arrive as they were.

msgspec writes and reads what it knows. Added here: pydantic models, paths, subclasses of ``str`` and numbers, numpy's
scalars, Django's lazy texts, ``OrderedDict``, ``defaultdict``, ``Counter``, ``deque``, enums of any values; and unions
whose members look alike in JSON (``datetime | date``, ``UUID | str``, two dataclasses), which msgspec refuses: the
first member that reads the value and writes the same JSON again is taken. ``Kind`` is all of this for one annotation.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, time
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec

Reader = Callable[[Any], Any]
"""Makes of what JSON had what an annotation says. Raises TypeError or ValueError where it does not fit."""

_MAPPINGS = (OrderedDict, defaultdict, Counter)
_BUILT_FROM_ONE = (PurePath, str, int, float)
_COLLECTIONS = (list, tuple, set, frozenset, deque)


class Kind:
    """One annotation: reads JSON as it says, and tells whether a value has arrived as it was sent.

    What nothing here can read arrives as JSON has it (``is_readable`` is False): a value that is then another one is
    refused.
    """

    __slots__ = ("_may_hold_times", "_named", "annotation", "is_readable", "read")

    def __init__(self, annotation: Any) -> None:
        reader = reader_of(annotation)
        self.annotation = annotation
        self.is_readable = reader is not None
        self.read: Reader = reader or _as_json_has_it
        self._named = frozenset(_classes_in(annotation))
        self._may_hold_times = _may_hold_times(annotation)

    def check_kept(self, sent: Any, arrived: Any) -> None:
        """Raise ValueError if a value that the annotation allows has become another one on its way through JSON.

        What the annotation does not name may be converted to what it does: text for a date, a tuple for a list.
        """
        if not _is_kept(sent, arrived, self._named):
            raise ValueError(f"it would arrive as {arrived!r:.80}")
        if self._may_hold_times and (lost := _lost_of_times(sent)):
            raise ValueError(lost)


def _as_json_has_it(value: Any) -> Any:
    return value


# Writing.


def encode_other(value: Any) -> Any:
    """What msgspec does not know, as what it does: its hook. Raises TypeError for what has no JSON form."""
    # Of a subclass (a Markup, a numpy.float64) what it is a kind of is carried.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, deque):
        return list(value)
    if _is_of("pydantic", "BaseModel", value):
        return value.model_dump(mode="json", round_trip=True)
    if _is_of("numpy", "generic", value):
        return value.item()
    if _is_of("django.utils.functional", "Promise", value):
        return str(value)
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} has no JSON form")


def _is_of(module: str, name: str, value: object) -> bool:
    """Whether ``value`` is an instance of a class of another package, which nobody may have imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)


encode = msgspec.json.Encoder(enc_hook=encode_other).encode


# Reading.


def decode_other(kind: Any, value: Any) -> Any:
    """What JSON had, as a class that msgspec does not know: its hook. Raises NotImplementedError for what we do not."""
    origin = get_origin(kind) or kind
    if kind is object:
        return value
    if not isinstance(origin, type):
        raise NotImplementedError
    if issubclass(origin, _model_class()):
        return _model(origin, value)
    if issubclass(origin, _BUILT_FROM_ONE):
        return origin(value)  # text, a number: each takes one argument
    if issubclass(origin, _MAPPINGS):
        return _mapping(origin, kind, value)
    if issubclass(origin, deque):
        return deque(value)
    raise NotImplementedError


def _model_class() -> type:
    pydantic = sys.modules.get("pydantic")
    found: type = _NoModel if pydantic is None else pydantic.BaseModel
    return found


class _NoModel:
    """Stands for pydantic's BaseModel while nobody has imported pydantic."""


def _model(kind: Any, value: Any) -> Any:
    # As JSON, since a strict model takes text for a datetime there; by the names of fields, as it was written.
    try:
        return kind.model_validate_json(encode(value), by_name=True)
    except TypeError:  # pydantic before 2.11 reads aliases, or names where the model says populate_by_name
        return kind.model_validate_json(encode(value))


def _mapping(origin: Any, kind: Any, value: Mapping[str, Any]) -> Any:
    if issubclass(origin, defaultdict):
        made_of = get_args(kind)[1] if len(get_args(kind)) == 2 else None
        factory = get_origin(made_of) or made_of
        return origin(factory if isinstance(factory, type) else None, value)
    return origin(value)


def is_readable(kind: Any) -> bool:
    """Whether msgspec, with the hook above, reads JSON as this annotation says."""
    if kind in _AS_JSON_HAS_IT:
        return True
    try:
        msgspec.json.Decoder(kind, dec_hook=decode_other)
        return _is_known(msgspec.inspect.type_info(kind), set())
    except (TypeError, ValueError):
        return False


_AS_JSON_HAS_IT: tuple[Any, ...] = (str, int, float, bool, type(None), list, dict)


def _is_known(info: object, met: set[type]) -> bool:
    """Whether nothing in a type is a class that only its own code could read. ``met``: classes met on the way here."""
    if isinstance(info, tuple):
        return all(_is_known(each, met) for each in info)
    if isinstance(info, msgspec.inspect.CustomType):
        known = (_model_class(), PurePath, str, int, float, deque, *_MAPPINGS)
        return info.cls is object or issubclass(info.cls, known)
    if not isinstance(info, msgspec.inspect.Type | msgspec.inspect.Field):
        return True
    cls = getattr(info, "cls", None)
    if cls is not None:
        if cls in met:
            return True
        met.add(cls)
    return all(_is_known(getattr(info, name), met) for name in info.__struct_fields__)


def reader_of(kind: Any) -> Reader | None:
    """What reads JSON as an annotation says; None for one that nothing here can read."""
    found = _reader_of_parts(kind)
    if found is None and is_readable(kind):
        found = partial(msgspec.convert, type=kind, dec_hook=decode_other, str_keys=True)
    return found


def _reader_of_parts(kind: Any) -> Reader | None:
    """A reader for what has to be taken apart: unions of look-alikes, mappings of another class, what holds these."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return None if is_readable(kind) else reader_of(args[0])
    if origin in {Union, types.UnionType}:
        readers = [(arm, reader_of(arm)) for arm in args]
        if is_readable(kind) or any(reader is None for _, reader in readers):
            return None
        return partial(_read_union, [(arm, reader) for arm, reader in readers if reader is not None])
    if isinstance(kind, type) and issubclass(kind, Enum):
        return None if is_readable(kind) else _reader_of_members(kind)
    if not isinstance(origin, type) or not args or (is_readable(kind) and not issubclass(origin, (*_MAPPINGS, deque))):
        return None
    readers_of_args = [reader_of(arg) for arg in args if arg is not Ellipsis]
    if issubclass(origin, Mapping):
        value_reader = readers_of_args[-1] if origin is not Counter else int
        key_reader = _reader_of_keys(args[0])
        if value_reader is None or key_reader is None:
            return None
        return partial(_read_mapping, origin, kind, key_reader, value_reader)
    if issubclass(origin, _COLLECTIONS) and all(reader is not None for reader in readers_of_args):
        several = origin is tuple and Ellipsis not in args
        return partial(_read_collection, origin, [reader for reader in readers_of_args if reader], several)
    return None


def _reader_of_keys(kind: Any) -> Reader | None:
    """What reads the keys of a mapping; its values are left as they are."""
    if isinstance(kind, type) and issubclass(kind, Enum) and not is_readable(kind):
        try:
            by_key = {key: member for member in kind for key in msgspec.json.decode(encode({member: 0}))}
        except (TypeError, ValueError):  # its values can be no keys
            return None
        return partial(_read_keys, by_key) if len(by_key) == len(kind) else None
    mapping = types.GenericAlias(dict, (kind, Any))
    return reader_of(mapping) if is_readable(mapping) else None


def _read_keys(by_key: Mapping[str, Enum], value: Mapping[str, Any]) -> dict[Any, Any]:
    try:
        return {by_key[key]: each for key, each in value.items()}
    except KeyError as error:
        raise TypeError(f"it has no member {error}") from error


def _reader_of_members(kind: type[Enum]) -> Reader | None:
    """A reader for an enum whose values are neither all text nor all whole numbers; None where two look alike."""
    try:
        by_json = {encode(member): member for member in kind}
    except (TypeError, ValueError):
        return None
    return partial(_read_member, kind, by_json) if len(by_json) == len(kind) else None


def _read_member(kind: type[Enum], by_json: Mapping[bytes, Enum], value: Any) -> Enum:
    try:
        return by_json[encode(value)]
    except KeyError:
        raise TypeError(f"{value!r:.80} is no member of {kind.__qualname__}") from None


def _read_union(arms: list[tuple[Any, Reader]], value: Any) -> Any:
    written = encode(value)
    for _, reader in arms:
        try:
            found = reader(value)
            if encode(found) == written:
                return found
        except (TypeError, ValueError, NotImplementedError, msgspec.ValidationError):
            continue
    raise TypeError(f"it is none of {', '.join(_name(arm) for arm, _ in arms)}")


def _read_mapping(origin: type, kind: Any, key_reader: Reader, value_reader: Reader, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError(f"a mapping is expected, not {_name(type(value))}")
    read = key_reader({key: value_reader(each) for key, each in value.items()})
    return _mapping(origin, kind, read) if issubclass(origin, _MAPPINGS) else read


def _read_collection(origin: Any, readers: list[Reader], several: bool, value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise TypeError(f"an array is expected, not {_name(type(value))}")
    if several:
        if len(value) != len(readers):
            raise TypeError(f"{len(readers)} values are expected, not {len(value)}")
        return tuple(reader(each) for reader, each in zip(readers, value, strict=True))
    return origin(readers[0](each) for each in value)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


# Arriving as it was.


def _is_kept(sent: Any, arrived: Any, named: frozenset[type]) -> bool:
    same_class = type(sent) is type(arrived)
    if not same_class and type(sent) in named and not isinstance(sent, list | tuple | dict | int):
        return False
    if not same_class and _is_record(sent) and not named.isdisjoint(type(sent).__mro__[:-1]):
        return False  # of a subclass of what is named: its other fields would be lost
    if same_class and isinstance(sent, datetime) and sent.tzinfo is not None and arrived.tzinfo is not None:
        # In the hour that a zone has twice no datetime equals one of another zone.
        return bool(sent.astimezone(UTC) == arrived.astimezone(UTC))
    try:
        if bool(sent == arrived):
            return True
    except Exception:  # noqa: BLE001 - a class of the user's, or an array, may not say whether it is equal
        return encode(sent) == encode(arrived)
    if isinstance(sent, Mapping) and isinstance(arrived, Mapping):
        keys = all(key == found or type(key) is str for key, found in zip(sent, arrived, strict=False))
        values = map(partial(_is_kept, named=named), sent.values(), arrived.values())
        return len(sent) == len(arrived) and keys and all(values)
    if isinstance(sent, list | tuple | deque) and isinstance(arrived, Iterable):
        return len(sent) == len(list(arrived)) and all(map(partial(_is_kept, named=named), sent, arrived))
    if not same_class:
        # Numbers that differ are not kept: 2**53 + 1 is no float. Other classes may be converted.
        return not (isinstance(sent, int | float) and isinstance(arrived, int | float))
    if _has_fields(sent):
        return all(_is_kept(getattr(sent, name), getattr(arrived, name), named) for name in _fields(type(sent)))
    compares_itself = any("__eq__" in vars(each) for each in type(sent).__mro__[:-1])
    return not compares_itself and encode(sent) == encode(arrived)


def _has_fields(value: object) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, msgspec.Struct)


def _is_record(value: object) -> bool:
    return _has_fields(value) or isinstance(value, _model_class())


def _may_hold_times(kind: Any) -> bool:
    """Whether values of it may have times of day in them: only then are they searched."""
    try:
        text = repr(msgspec.inspect.type_info(kind))
    except (TypeError, ValueError):
        return True
    return any(each in text for each in ("TimeType", "CustomType"))


def _lost_of_times(value: Any) -> str | None:
    """What JSON leaves out of a datetime or a time somewhere in a value; None for nothing."""
    if isinstance(value, datetime | time):
        if value.utcoffset() is not None:
            return None
        if value.tzinfo is not None:
            return f"{value!r:.80} would arrive without its time zone"
        return f"{value!r:.80} would arrive without its fold: give it a time zone" if value.fold else None
    found: Iterable[Any] = ()
    if isinstance(value, Mapping):
        found = (*value.keys(), *value.values())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        found = value
    elif _has_fields(value):
        found = (getattr(value, name) for name in _fields(type(value)))
    elif isinstance(value, _model_class()):
        found = vars(value).values()
    return next((lost for each in found if (lost := _lost_of_times(each))), None)


def _fields(kind: Any) -> Iterable[str]:
    return (
        kind.__struct_fields__ if issubclass(kind, msgspec.Struct) else [each.name for each in dataclasses.fields(kind)]
    )


def _classes_in(kind: Any) -> Iterator[type]:
    """Every class that an annotation names."""
    origin = get_origin(kind)
    if isinstance(origin or kind, type):
        yield origin or kind
    for each in get_args(kind):
        yield from _classes_in(each)


def unkept(kind: Any) -> str | None:
    """Why values of an annotated type can never arrive as they were; None where they may."""
    base = _model_class()
    for each in _classes_in(kind):
        if issubclass(each, base):
            for name, field in each.model_fields.items():  # type: ignore[attr-defined]  # a pydantic model
                if field.exclude:
                    return f"{each.__qualname__}.{name} is left out of JSON (exclude=True)"
                if _hides_itself(each, name, field.annotation):
                    return f"{each.__qualname__}.{name} is a secret, which JSON shows as asterisks"
    return None


def _hides_itself(model: Any, name: str, annotation: Any) -> bool:
    pydantic = sys.modules["pydantic"]
    serializers = model.__pydantic_decorators__.field_serializers.values()
    written = any({name, "*"} & set(each.info.fields) for each in serializers)
    secrets = (pydantic.SecretStr, pydantic.SecretBytes)
    return not written and any(issubclass(each, secrets) for each in _classes_in(annotation))
