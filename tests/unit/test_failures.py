"""Exceptions come back as they were: class, text, arguments, and every attribute that JSON can carry."""

from __future__ import annotations

import asyncio
import copy
import datetime as dt
import json
import socket
import sqlite3
import ssl
import subprocess
import tomllib
import urllib.error
import uuid
import zoneinfo
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from email.message import Message
from io import BytesIO
from typing import Any

import django.core.exceptions
import httpx
import msgspec
import pydantic
import pydantic_core
import pytest
from ekiden.codec import FailureRecord
from ekiden.errors import TaskError
from ekiden.failures import failure_record, rebuild_exception

DjangosError = django.core.exceptions.ValidationError


def there_and_back(error: Exception) -> BaseException:
    record = failure_record(error, None)
    return rebuild_exception(msgspec.json.decode(msgspec.json.encode(record), type=FailureRecord))


class NeedsKeyword(Exception):
    def __init__(self, *, code: int, when: dt.datetime) -> None:
        super().__init__(f"code {code}")
        self.code, self.when = code, when


class MadeByNew(Exception):
    def __new__(cls, *, code: int) -> MadeByNew:
        made = super().__new__(cls, f"code {code}")
        made.code = code
        return made

    code: int

    def __init__(self, *, code: int) -> None:
        pass


class Slotted(Exception):
    __slots__ = ("code", "unset")

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class Response:
    status_code = 404


class RequestFailed(OSError):
    """As that of requests."""

    def __init__(self, *args: object, **kwargs: Any) -> None:
        self.response = kwargs.pop("response", None)
        self.request = kwargs.pop("request", None)
        super().__init__(*args, **kwargs)


@dataclass(frozen=True)
class Frozen(Exception):
    code: int
    where: tuple[str, int] = field(kw_only=True)

    def __str__(self) -> str:
        return f"{self.code} in {self.where[0]}"


class Guarded(Exception):
    """As urllib's HTTPError has it: what looks for an attribute needs others."""

    def __init__(self, code: int, *, inside: object) -> None:
        super().__init__(str(code))
        self.code, self.inside = code, inside

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["inside"], name)


class Mixed(NeedsKeyword, LookupError):
    pass


class OwnFileError(OSError):
    def __init__(self, path: str, reason: str) -> None:
        super().__init__(5, reason, path)
        self.reason = reason


class WithProperty(Exception):
    def __init__(self, order: uuid.UUID, price: Decimal, tags: tuple[str, ...]) -> None:
        super().__init__(f"order {order}")
        self._order, self.price, self.tags = order, price, tags

    @property
    def order(self) -> uuid.UUID:
        return self._order


def raised(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is
        call()
    return caught.value


def changed_later() -> Exception:
    error = ValueError("no")
    error.status = 503  # type: ignore[attr-defined]
    return error


class Account(pydantic.BaseModel):
    age: int
    names: list[str]

    @pydantic.field_validator("names")
    @classmethod
    def nobody(cls, _value: list[str]) -> list[str]:
        raise ValueError("nobody {is} called so")


class Plain:
    pass


NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
CASES: list[tuple[Exception, list[str]]] = [
    (
        urllib.error.HTTPError("http://x/y", 404, "Not Found", Message(), BytesIO(b"body")),
        ["code", "url", "msg", "reason", "status", "filename"],
    ),
    (urllib.error.URLError("refused"), ["reason"]),
    (RequestFailed("404 Client Error", response=None), ["response", "request", "errno"]),
    (OwnFileError("/etc/x", "broken"), ["errno", "strerror", "filename", "reason"]),
    (NeedsKeyword(code=4, when=NOW), ["code", "when"]),
    (Mixed(code=4, when=NOW), ["code", "when"]),
    (MadeByNew(code=7), ["code"]),
    (Frozen(3, where=("a", 1)), ["code", "where"]),
    (Guarded(4, inside=None), ["code", "inside"]),
    (httpx.HTTPStatusError("404", request=None, response=None), ["response"]),  # type: ignore[arg-type]
    (Slotted("text", 5), ["code"]),
    (WithProperty(uuid.uuid4(), Decimal("1.50"), ("a", "b")), ["order", "price", "tags"]),
    (changed_later(), ["status"]),
    (asyncio.IncompleteReadError(b"abc", 5), ["partial", "expected"]),
    (asyncio.LimitOverrunError("too long", 5), ["consumed"]),
    (
        subprocess.CalledProcessError(3, ("ls", "-l"), output=b"\xff", stderr=b"no"),
        ["returncode", "cmd", "output", "stdout", "stderr"],
    ),
    (subprocess.TimeoutExpired(["sleep"], 1.5, output=b"x"), ["cmd", "timeout", "output", "stdout", "stderr"]),
    (raised(lambda: json.loads("[1,\n x]")), ["msg", "doc", "pos", "lineno", "colno"]),
    (raised(lambda: tomllib.loads("x = ")), []),
    (raised(lambda: zoneinfo.ZoneInfo("No/Where")), []),
    (raised(lambda: sqlite3.connect(":memory:").execute("nonsense")), ["sqlite_errorcode", "sqlite_errorname"]),
    (raised(lambda: ssl.create_default_context(cafile="/no/file")), ["errno", "strerror"]),
    (raised(lambda: ssl.create_default_context(cadata="nonsense")), ["errno", "strerror", "reason", "library"]),
    (socket.gaierror(-2, "Name or service not known"), ["errno", "strerror"]),
    (ImportError("cannot", name="x.y", path="/x/y.py"), ["name", "path", "msg"]),
    (raised(lambda: compile("a = (", "m.py", "exec")), ["filename", "lineno", "offset", "text", "msg", "end_lineno"]),
    (raised(lambda: Plain().nothing), ["name"]),  # type: ignore[attr-defined]
    (raised(lambda: nothing_of_that_name), ["name"]),  # type: ignore[name-defined]  # noqa: F821
    (KeyError((1, "a")), []),
    (KeyError(b"\xff"), []),
    (KeyError(uuid.uuid4()), []),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ["encoding", "object", "start", "end", "reason"]),
    (BlockingIOError(11, "again", 5), ["characters_written", "errno"]),
    (DjangosError("no %(x)s", code="bad", params={"x": 1}), ["message", "code", "params", "messages"]),
    (DjangosError({"name": ["empty"]}), ["message_dict", "messages"]),
    (
        DjangosError({"name": [DjangosError("empty %(n)s", code="e", params={"n": 2})], "age": DjangosError("old")}),
        ["message_dict", "messages"],
    ),
    (DjangosError([DjangosError("one", code="1"), DjangosError("two")]), ["messages"]),
    (httpx.InvalidURL("bad"), []),
]


@pytest.mark.parametrize(("error", "names"), CASES, ids=[type(each).__name__ for each, _ in CASES])
def test_attributes_are_the_workers(error: Exception, names: list[str]) -> None:
    rebuilt = there_and_back(error)

    assert type(rebuilt) is type(error)
    assert str(rebuilt) == str(error)
    assert {name: getattr(rebuilt, name) for name in names} == {name: getattr(error, name) for name in names}


def test_arguments_are_as_they_were() -> None:
    given = (b"\xff", (1, 2), {3}, NOW, Decimal("1.50"), uuid.uuid4(), [1], {"a": 1}, "x", None)

    assert there_and_back(ValueError(*given)).args == given


def test_an_attribute_that_json_cannot_carry_is_none() -> None:
    error = RequestFailed("404 Client Error", response=Response())

    rebuilt = there_and_back(error)

    assert isinstance(rebuilt, RequestFailed)
    assert rebuilt.response is None


def test_an_attribute_made_of_a_repr_is_none() -> None:
    error = urllib.error.HTTPError("http://x/y", 404, "Not Found", Message(), BytesIO(b"body"))

    rebuilt = there_and_back(error)

    assert isinstance(rebuilt, urllib.error.HTTPError)
    assert (rebuilt.headers, rebuilt.fp) == (None, None)


def test_an_attribute_that_is_not_there_is_no_key_error() -> None:
    rebuilt = there_and_back(Guarded(4, inside=Response()))

    assert not hasattr(rebuilt, "status_code")


def test_a_validation_error_of_pydantic_comes_back() -> None:
    error = raised(lambda: Account(age="old", names=["a"]))  # type: ignore[arg-type]

    rebuilt = there_and_back(error)

    assert isinstance(rebuilt, pydantic.ValidationError)
    assert str(rebuilt) == str(error)
    assert [(each["type"], each["loc"]) for each in rebuilt.errors()] == [
        ("int_parsing", ("age",)),
        ("value_error", ("names",)),
    ]


def test_one_with_an_input_that_json_cannot_carry_comes_without_it() -> None:
    error = raised(lambda: Account(age=object(), names=["a"]))  # type: ignore[arg-type]

    rebuilt = there_and_back(error)

    assert isinstance(rebuilt, pydantic.ValidationError)
    assert "Input should be a valid integer [type=int_type]" in str(rebuilt)
    assert rebuilt.error_count() == 2


def test_an_error_of_a_kind_of_ones_own_comes_back_in_pydantics() -> None:
    custom = pydantic_core.PydanticCustomError("too_odd", "{x} is odd {{", {"x": 3})
    error = pydantic_core.ValidationError.from_exception_data("M", [{"type": custom, "loc": ("a",), "input": 1}])

    rebuilt = there_and_back(error)

    assert isinstance(rebuilt, pydantic.ValidationError)
    assert str(rebuilt) == str(error)


@pytest.mark.parametrize("args", [(), ("M",), ("M", [{"type": 1}], "python", False), ("M", 5, "x", "y")], ids=repr)
def test_what_somebody_made_up_is_a_task_error(args: tuple[Any, ...]) -> None:
    record = FailureRecord("pydantic_core._pydantic_core.ValidationError", "text", args)

    assert type(rebuild_exception(record)) is TaskError


def test_attributes_that_somebody_made_up_run_no_code() -> None:
    called = []

    class Touchy(Exception):
        @property
        def code(self) -> int:
            return 1

        @code.setter
        def code(self, value: int) -> None:
            called.append(value)

        def __setattr__(self, name: str, value: object) -> None:
            called.append(name)

    globals()["Touchy"] = Touchy
    Touchy.__qualname__ = "Touchy"
    odd = {"code": 5, "__class__": "int", "__dict__": {}, "__traceback__": 1, "not a name": 1}
    record = FailureRecord(f"{__name__}.Touchy", "text", ("text",), attributes=odd, lost=("__class__", "code"))

    rebuilt = rebuild_exception(record)

    assert type(rebuilt) is Touchy
    assert called == []
    assert set(vars(rebuilt)) == {"code"}


class Wrapping(Exception):
    """As SQLAlchemy's hold that of the driver."""

    def __init__(self, orig: Exception | None) -> None:
        super().__init__(f"wraps {type(orig).__name__}")
        self.orig = orig


def test_an_exception_that_it_holds_comes_with_it() -> None:
    rebuilt = there_and_back(Wrapping(NeedsKeyword(code=4, when=NOW)))

    assert isinstance(rebuilt, Wrapping)
    assert isinstance(rebuilt.orig, NeedsKeyword)
    assert (rebuilt.orig.code, rebuilt.orig.when) == (4, NOW)


def test_exceptions_that_hold_each_other_are_bounded() -> None:
    outer, inner = Wrapping(None), Wrapping(None)
    outer.orig, inner.orig = inner, outer

    record = failure_record(outer, None)

    assert len(msgspec.json.encode(record)) < 10_000
    assert isinstance(rebuild_exception(record), Wrapping)


def test_records_in_records_are_each_read_once() -> None:
    record = FailureRecord("TypeError", "innermost")
    for _ in range(30):
        held = {"ekiden:exception": msgspec.to_builtins(record)}
        record = FailureRecord("TypeError", "another text", attributes={"orig": held}, kinds={"orig": "exceptions"})
        record = msgspec.structs.replace(record, type=f"{__name__}.Unwilling")

    assert type(rebuild_exception(record)).__name__ == "Unwilling"


class Unwilling(Exception):
    def __init__(self) -> None:
        raise RuntimeError("never")

    def __str__(self) -> str:
        return "always the same"


def test_attributes_of_any_size_are_bounded() -> None:
    error = ValueError("x")
    vars(error).update({f"name{number}": "x" * 100_000 for number in range(200)})

    record = failure_record(error, None, most_bytes=100_000)

    assert len(msgspec.json.encode(record)) < 150_000


def test_what_an_attribute_error_was_about_stays_at_the_worker() -> None:
    secrets = {"password": "hunter2"}
    error = raised(lambda: secrets.nothing)  # type: ignore[attr-defined]

    assert b"hunter2" not in msgspec.json.encode(failure_record(error, None))


def test_a_rebuilt_exception_can_be_copied() -> None:
    rebuilt = there_and_back(NeedsKeyword(code=4, when=NOW))

    assert isinstance(rebuilt, NeedsKeyword)
    assert rebuilt.__reduce__()[2] == {"code": 4, "when": NOW}
    assert copy.copy(vars(rebuilt)) == {"code": 4, "when": NOW}
