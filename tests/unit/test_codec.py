"""Calls, values and results as JSON, and what annotations make of them on both sides."""

import enum
import json
import uuid
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple, Optional, TypedDict, Union

import msgspec
import pydantic
import pytest
from ekiden.codec import (
    FailureRecord,
    OutcomeRecord,
    Parameters,
    decode_call,
    decode_outcome,
    decode_value,
    encode_call,
    encode_outcome,
    encode_value,
)
from ekiden.errors import MessageError, NewerFormat, TaskArgumentsError, TaskError
from ekiden.failures import failure_record, rebuild_exception
from ekiden.kinds import Kind
from ekiden.signature import Call, Step

CALL = Call(task="shop.add", id="1", sent=1.5)


# Calls.


def test_a_call_comes_back_as_it_was() -> None:
    call = Call(
        task="shop.add",
        id="1",
        sent=1.5,
        args=[1, "x", None],
        kwargs={"ü": [1.5]},
        retries=2,
        eta=3.0,
        expires=4.0,
        root="r",
        parent="p",
        on_success=(Step("a", (1,), {"b": 2}, on_error=(Step("c"),)),),
        on_error=(Step("d", immutable=True),),
        ignore_result=False,
        time_limit=5.0,
        soft_time_limit=6.0,
        fenced=True,
    )

    assert decode_call(encode_call(call), {}) == call


def test_what_was_not_said_takes_no_room_in_a_message() -> None:
    assert json.loads(encode_call(CALL)) == {"v": 1, "task": "shop.add", "id": "1", "sent": 1.5}


@pytest.mark.parametrize("content_type", [None, "application/json"])
def test_the_content_type_may_say_that_it_is_json(content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}

    assert decode_call(encode_call(CALL), headers).task == "shop.add"


def test_another_content_type_is_refused_by_its_name() -> None:
    with pytest.raises(MessageError, match="'application/x-python-serialize'"):
        decode_call(b"", {"content-type": "application/x-python-serialize"})


def test_a_field_of_a_later_minor_version_is_passed_over() -> None:
    assert decode_call(b'{"v":1,"task":"a","id":"b","sent":1,"colour":"red"}', {}).task == "a"


@pytest.mark.parametrize("version", [2, 3, 99])
def test_a_later_format_is_told_from_garbage(version: int) -> None:
    with pytest.raises(NewerFormat, match=f"format is {version}"):
        decode_call(b'{"v":%d,"anything":[]}' % version, {})


@pytest.mark.parametrize(
    "value",
    [object(), {1, object()}, lambda: None, float("inf"), [float("nan")], {"x": (1, float("-inf"))}, "half \ud800", 1j],
    ids=["object", "in a set", "function", "inf", "nan", "deep", "surrogate", "complex"],
)
@pytest.mark.parametrize("where", ["argument 2", "argument 'named'"])
def test_an_argument_that_json_cannot_carry_is_named(value: Any, where: str) -> None:
    call = (
        msgspec.structs.replace(CALL, args=(1, value))
        if where == "argument 2"
        else msgspec.structs.replace(CALL, kwargs={"fine": 1, "named": value})
    )

    with pytest.raises(TaskArgumentsError, match=rf"^shop.add\(\) cannot be sent: {where} \(") as caught:
        encode_call(call)
    assert isinstance(caught.value, TypeError)


def test_an_argument_that_contains_itself_is_named() -> None:
    endless: list[Any] = []
    endless.append(endless)

    with pytest.raises(TaskArgumentsError, match="argument 1"):
        encode_call(msgspec.structs.replace(CALL, args=(endless,)))


def test_an_argument_whose_repr_fails_is_named_all_the_same() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    with pytest.raises(TaskArgumentsError, match="a Rude whose repr failed"):
        encode_call(msgspec.structs.replace(CALL, args=(Rude(),)))


def test_none_is_no_missing_number() -> None:
    assert decode_call(encode_call(msgspec.structs.replace(CALL, args=(None, [None]))), {}).args == [None, [None]]


# Values.


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclass
class Point:
    x: int
    y: int = 0


class Line(msgspec.Struct):
    start: Point
    end: Point


class Person(pydantic.BaseModel):
    name: str
    born: date


class Row(TypedDict):
    a: int


class Pair(NamedTuple):
    left: int
    right: str


TYPED: list[tuple[Any, Any]] = [
    (int, 2**63),
    (int, 10**30),
    (float, 0.1),
    (str, "Grüße 世界 \x00"),
    (bool, True),
    (type(None), None),
    (bytes, bytes(range(256))),
    (bytearray, bytearray(b"\xff")),
    (datetime, datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)),
    (datetime, datetime(2026, 1, 2)),  # noqa: DTZ001 - it may be sent as it is
    (date, date(2026, 1, 2)),
    (timedelta, timedelta(days=1, microseconds=1)),
    (Decimal, Decimal("0.10")),
    (uuid.UUID, uuid.UUID(int=7)),
    (Colour, Colour.RED),
    (Level, Level.HIGH),
    (Point, Point(1, 2)),
    (Line, Line(Point(1), Point(2))),
    (Person, Person(name="Ada", born=date(1815, 12, 10))),
    (Row, {"a": 1}),
    (Pair, Pair(1, "r")),
    (list[Point], [Point(1), Point(2)]),
    (dict[str, datetime], {"now": datetime(2026, 1, 1, tzinfo=UTC)}),
    (dict[int, str], {1: "one"}),
    (dict[uuid.UUID, Colour], {uuid.UUID(int=7): Colour.RED}),
    (dict[Colour, float], {Colour.RED: 0.5}),
    (dict[date, list[Decimal]], {date(2026, 1, 1): [Decimal("1.5")]}),
    (tuple[int, str], (1, "x")),
    (tuple[int, ...], (1, 2, 3)),
    (set[int], {1, 2}),
    (frozenset[str], frozenset({"a"})),
    (Optional[Point], None),  # noqa: UP045 - both spellings are used
    (Point | None, Point(3)),
    (Union[int, str], "x"),  # noqa: UP007 - both spellings are used
    (Literal["a", "b"], "b"),
    (list[Person], [Person(name="Ada", born=date(1815, 12, 10))]),
    (Any, [1, {"a": None}]),
]


@pytest.mark.parametrize(("kind", "value"), TYPED, ids=[f"{kind}-{value!r}"[:60] for kind, value in TYPED])
def test_a_value_comes_back_as_its_annotation_says(kind: Any, value: Any) -> None:
    back = decode_value(encode_value(value), Kind(kind))

    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(("kind", "value"), TYPED, ids=[f"{kind}-{value!r}"[:60] for kind, value in TYPED])
def test_an_argument_arrives_as_its_annotation_says(kind: Any, value: Any) -> None:
    def function(x, *, named): ...  # type: ignore[no-untyped-def]

    function.__annotations__ = {"x": kind, "named": kind}
    parameters = Parameters(function, skip_first=False)
    parameters.check("shop.f", (value,), {"named": value})
    call = decode_call(encode_call(msgspec.structs.replace(CALL, args=(value,), kwargs={"named": value})), {})

    args, kwargs = parameters.convert(call.args, call.kwargs)

    assert (list(args), dict(kwargs)) == ([value], {"named": value})
    assert type(args[0]) is type(kwargs["named"]) is type(value)


def test_without_annotations_values_arrive_as_json_has_them() -> None:
    def function(*args, **kwargs): ...  # type: ignore[no-untyped-def]

    parameters = Parameters(function, skip_first=False)
    parameters.check("f", ((1, 2), date(2026, 1, 1)), {"x": {3: Colour.RED}})
    call = decode_call(
        encode_call(msgspec.structs.replace(CALL, args=((1, 2), date(2026, 1, 1)), kwargs={"x": {3: Colour.RED}})), {}
    )

    assert parameters.convert(call.args, call.kwargs) == ([[1, 2], "2026-01-01"], {"x": {"3": "red"}})


# Parameters.


def declared(function: Any, *, skip_first: bool = False) -> Parameters:
    return Parameters(function, skip_first=skip_first)


def test_a_call_that_does_not_fit_names_the_function_its_declaration_and_the_caller() -> None:
    def send_mail(to: str, body: str) -> None: ...

    with pytest.raises(TaskArgumentsError) as caught:
        declared(send_mail).check("shop.send_mail", (), {"body": "x"})

    assert str(caught.value).startswith("send_mail() missing a required argument: 'to' (called in ")
    assert f"{__file__}:" in str(caught.value)
    assert str(caught.value).endswith("shop.send_mail is declared as send_mail(to: str, body: str) -> None.")


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((1,), {}), ((1, 2, 3), {}), ((1, 2), {"x": 3}), ((1, 2), {"unknown": 3}), ((1,), {"unknown": 3})],
)
def test_arguments_that_do_not_fit_are_refused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def add(x, y): ...  # type: ignore[no-untyped-def]

    parameters = declared(add)

    with pytest.raises(TaskArgumentsError):
        parameters.check("add", args, kwargs)
    assert parameters.misfit(args, kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((1, 2), {}), ((1,), {"y": 2}), ((), {"x": 1, "y": 2}), ((1, 2), {"z": 3})]
)
def test_arguments_that_fit_are_taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def add(x, y, *, z=0): ...  # type: ignore[no-untyped-def]

    parameters = declared(add)
    parameters.check("add", args, kwargs)

    assert parameters.misfit(args, kwargs) is None


@pytest.mark.parametrize(
    ("kind", "value"),
    [(int, "1"), (int, 1.5), (int, True), (str, 1), (bool, 1), (Point, {"x": "no"}), (list[int], ["x"]), (datetime, 5)],
)
def test_a_value_that_does_not_fit_its_annotation_is_refused_in_the_caller(kind: Any, value: Any) -> None:
    def function(x): ...  # type: ignore[no-untyped-def]

    function.__annotations__ = {"x": kind}

    with pytest.raises(TaskArgumentsError, match="for 'x'"):
        declared(function).check("f", (value,), {})


def test_a_whole_number_is_a_float() -> None:
    def function(x: float) -> None: ...

    parameters = declared(function)
    parameters.check("f", (1,), {})

    assert parameters.convert([1], {}) == ([1.0], {})


def test_a_default_of_none_makes_a_parameter_optional() -> None:
    def function(x: int = None) -> None: ...  # type: ignore[assignment]  # noqa: RUF013 - users write it

    parameters = declared(function)
    parameters.check("f", (None,), {})

    assert parameters.convert([None], {}) == ([None], {})


def test_the_annotation_of_star_args_holds_for_each_of_the_rest() -> None:
    def function(first, *rest: date) -> None: ...  # type: ignore[no-untyped-def]

    parameters = declared(function)
    parameters.check("f", ("x", date(2026, 1, 1)), {})

    assert parameters.convert(["x", "2026-01-01", "2026-01-02"], {}) == (
        ["x", date(2026, 1, 1), date(2026, 1, 2)],
        {},
    )
    with pytest.raises(TaskArgumentsError):
        parameters.check("f", ("x", "not a date"), {})


def test_the_annotation_of_star_kwargs_holds_for_what_has_no_parameter_of_its_own() -> None:
    def function(first, *, named=None, **rest: date) -> None: ...  # type: ignore[no-untyped-def]

    parameters = declared(function)
    parameters.check("f", (), {"first": "x", "named": 5, "other": date(2026, 1, 1)})

    assert parameters.convert([], {"first": "x", "named": 5, "other": "2026-01-01"}) == (
        [],
        {"first": "x", "named": 5, "other": date(2026, 1, 1)},
    )
    with pytest.raises(TaskArgumentsError):
        parameters.check("f", (), {"first": "x", "other": "not a date"})


def test_a_positional_parameter_may_share_its_name_with_one_of_the_rest() -> None:
    def function(day: date, /, **rest: int) -> None: ...

    parameters = declared(function)
    parameters.check("f", (date(2026, 1, 1),), {"day": 5})

    assert parameters.convert(["2026-01-01"], {"day": 5}) == ([date(2026, 1, 1)], {"day": 5})


def test_a_bound_function_is_checked_without_its_first_parameter() -> None:
    def function(self: Any, x: int) -> None: ...

    parameters = declared(function, skip_first=True)
    parameters.check("f", (1,), {})

    with pytest.raises(TaskArgumentsError):
        parameters.check("f", (1, 2), {})
    assert parameters.declared == "function(x: int) -> None"


def test_an_annotation_that_only_the_type_checker_can_see_is_not_checked() -> None:
    def function(x: "NoSuchType", y: int) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    parameters = declared(function)
    parameters.check("f", ("anything", 5), {})

    assert parameters.convert(["anything", 5], {}) == (["anything", 5], {})
    with pytest.raises(TaskArgumentsError, match="'y'"):
        parameters.check("f", ("anything", "not a number"), {})


def test_an_annotation_that_has_no_json_form_is_not_checked() -> None:
    class Session: ...

    def function(session: Session, x: int) -> None: ...

    parameters = declared(function)
    function.__annotations__["session"] = Session

    assert parameters.convert([{"id": 1}, 2], {}) == ([{"id": 1}, 2], {})


def test_what_a_message_brought_must_fit_too() -> None:
    def function(x: date) -> None: ...

    with pytest.raises(TypeError, match="function\\(\\) cannot take 'soon' for 'x'"):
        declared(function).convert(["soon"], {})


# Results.


def test_an_outcome_comes_back_as_it_was() -> None:
    record = OutcomeRecord(
        value=msgspec.Raw(b'{"a":[1]}'),
        failure=FailureRecord("m.E", "text", (1, "x"), "Traceback"),
        task="shop.add",
        args=[1],
        kwargs={"a": 2},
        worker="w",
        retries=3,
        queue="q",
        due=1.0,
        done=2.0,
        runtime=0.5,
        parent="p",
        root="r",
        children=("c",),
    )

    assert decode_outcome(encode_outcome(record)) == record


def test_a_task_that_has_only_begun_tells_nothing() -> None:
    assert decode_outcome(b"") == OutcomeRecord()


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"v":2}', b'{"v":1,"children":5}', b"\xff"])
def test_a_result_that_cannot_be_read_is_told(body: bytes) -> None:
    with pytest.raises(MessageError, match="stored result cannot be read"):
        decode_outcome(body)


# Exceptions.


class OwnError(Exception):
    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(code, text)
        self.code = code


class PickyError(Exception):
    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)


class DressedError(Exception):
    """Its constructor writes another text than it was given."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the code is {code}")
        self.code = code


class TalkativeError(Exception):
    """Its text needs what only its constructor sets."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__()
        self.code, self.reason = code, reason

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"


class Model:
    class DoesNotExist(LookupError):
        pass

    class Inner:
        class DeepError(Exception):
            pass


def json_error() -> Exception:
    import json

    try:
        json.loads("[1,\n x]")
    except ValueError as error:
        return error
    raise AssertionError


def file_error() -> Exception:
    try:
        open("/no/such/file").close()
    except OSError as error:
        return error
    raise AssertionError


REBUILT = [
    ValueError("x", 1),
    KeyError("k"),
    OwnError(5, "t"),
    OSError(2, "No such file"),
    Exception(),
    Model.DoesNotExist("no row"),
    Model.Inner.DeepError("deep"),
    file_error(),
    OSError(18, "Invalid link", "from", None, "to"),
    json_error(),
    UnicodeDecodeError("utf-8", b"\xff\xfe", 0, 1, "bad"),
    UnicodeEncodeError("ascii", "caf\xe9", 3, 4, "bad"),
    ImportError("no module", name="x"),
]
TEXT_KEPT = [PickyError(reason="no"), DressedError(5), TalkativeError(404, "gone"), ValueError(object())]


@pytest.mark.parametrize("error", REBUILT, ids=repr)
def test_an_exception_of_a_known_class_is_rebuilt(error: Exception) -> None:
    rebuilt = rebuild_exception(failure_record(error, "Traceback ..."))

    assert type(rebuilt) is type(error)
    assert rebuilt.args == error.args
    assert str(rebuilt) == str(error)
    assert getattr(rebuilt, "filename", None) == getattr(error, "filename", None)
    assert getattr(rebuilt, "filename2", None) == getattr(error, "filename2", None)
    assert getattr(rebuilt, "pos", None) == getattr(error, "pos", None)


@pytest.mark.parametrize("error", TEXT_KEPT, ids=lambda error: type(error).__name__)
def test_whatever_a_constructor_does_the_class_and_the_text_are_the_workers(error: Exception) -> None:
    rebuilt = rebuild_exception(failure_record(error, "Traceback ..."))

    assert isinstance(rebuilt, type(error))
    assert str(rebuilt) == str(error)
    assert type(rebuilt).__name__ == type(error).__name__


def test_a_group_brings_its_members() -> None:
    group = ExceptionGroup("two", [ValueError("a"), ExceptionGroup("more", [KeyError("b"), DressedError(3)])])

    rebuilt = rebuild_exception(failure_record(group, None))

    assert isinstance(rebuilt, ExceptionGroup)
    values, others = rebuilt.split(ValueError)
    assert str(values) == "two (1 sub-exception)"
    assert others is not None
    assert [str(each) for each in others.exceptions[0].exceptions] == ["'b'", "the code is 3"]


def test_a_group_of_any_size_and_depth_is_bounded() -> None:
    group: Exception = ValueError("deepest")
    for number in range(60):
        group = ExceptionGroup(str(number), [group, *(ValueError("x" * 500) for _ in range(50))])

    body = encode_outcome(OutcomeRecord(failure=failure_record(group, None, most_bytes=100_000)))

    assert len(body) < 200_000
    assert decode_outcome(body).failure is not None


@pytest.mark.parametrize("error", [SystemExit("bye"), StopIteration(3)], ids=repr)
def test_what_would_end_the_callers_own_program_is_a_task_error_that_tells_of_it(error: BaseException) -> None:
    rebuilt = rebuild_exception(failure_record(error, "Traceback ..."))

    assert type(rebuilt) is TaskError
    assert str(rebuilt) == str(error)
    assert rebuilt.type_name == type(error).__qualname__
    assert rebuilt.traceback_text == "Traceback ..."


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.Popen", "no.such.module.Error", "builtins.print", "builtins.int", "x", "", "."]
)
def test_nothing_but_an_exception_class_is_ever_called(name: str) -> None:
    rebuilt = rebuild_exception(FailureRecord(name, "text", ("touch /tmp/hacked",)))

    assert type(rebuilt) is TaskError
    assert str(rebuilt) == "text"


def test_a_module_that_is_not_loaded_stays_so() -> None:
    import sys

    assert "this" not in sys.modules

    rebuild_exception(FailureRecord("this.Error", "text"))

    assert "this" not in sys.modules


def test_arguments_of_an_exception_that_json_cannot_carry_are_told_by_their_repr() -> None:
    class Odd:
        def __repr__(self) -> str:
            return "<odd>"

    record = failure_record(ValueError(Odd(), float("nan"), 1), None)

    assert record.args == ("<odd>", "nan", 1)


def test_an_exception_that_cannot_be_looked_at_is_told_all_the_same() -> None:
    class RudeError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    class RudeModel(pydantic.BaseModel):
        x: int

        @pydantic.field_serializer("x")
        def no(self, _value: int) -> int:
            raise RuntimeError("no")

    assert "cannot be shown" in failure_record(RudeError(), None).message
    assert "RudeModel" in failure_record(ValueError(RudeModel(x=1)), None).args[0]
