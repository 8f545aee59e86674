"""What an annotation allows arrives equal to what was sent, or is refused at the call; for results, too."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol
from zoneinfo import ZoneInfo

import msgspec
import pydantic
import pytest
from ekiden import Ekiden
from ekiden.errors import ConfigurationError, MisuseError, TaskArgumentsError
from ekiden.message import new_id

if TYPE_CHECKING:
    from nowhere import OnlyForTheTypeChecker


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Point:
    x: float | None
    y: float = 0.0


@dataclass
class Place:
    name: str
    where: Path = field(default=Path())


@dataclass(eq=False)
class Odd:
    inside: Point


class Pair(NamedTuple):
    left: int
    right: str


class Record(msgspec.Struct):
    when: dt.datetime
    what: float | None = None


class Slug(str):
    """Text of the user's own kind."""


class Model(pydantic.BaseModel):
    at: dt.datetime
    size: int = pydantic.Field(alias="theSize")


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    day: dt.date
    number: int

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def double(self) -> int:
        return 2 * self.number


class TwoAliases(pydantic.BaseModel):
    a: int = pydantic.Field(validation_alias="in_a", serialization_alias="out_a")


class Secret(pydantic.BaseModel):
    name: str
    password: pydantic.SecretStr


class Excluded(pydantic.BaseModel):
    name: str
    hidden: int = pydantic.Field(default=1, exclude=True)


class ToldSecret(pydantic.BaseModel):
    """Its secret writes itself."""

    password: pydantic.SecretStr

    @pydantic.field_serializer("password")
    def tell(self, value: pydantic.SecretStr) -> str:
        return value.get_secret_value()


@dataclass
class Halved:
    number: int
    unseen: InitVar[int] = 3


@dataclass
class Once:
    """It cannot be made of what it holds."""

    name: str

    def __post_init__(self) -> None:
        if self.name.startswith("made of "):
            raise LookupError(self.name)
        self.name = f"made of {self.name}"


@dataclass
class Point3(Point):
    z: float = 0.0


class Shape:
    """What tasks are annotated with, and nothing can read."""


@dataclass
class Square(Shape):
    side: int


class HasSide(Protocol):
    side: int


class BiggerModel(Model):
    more: int = 5


TWICE = dt.datetime(2030, 10, 27, 2, 30, fold=1)  # noqa: DTZ001
"""Of a clock time that is there twice, the second one, in no zone."""
NOW = dt.datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=dt.UTC)
ID = uuid.UUID("0190d0c3-f6ab-4b1f-8d6c-0123456789ab")

KEPT: list[tuple[Any, Any]] = [
    (dt.datetime | dt.date, NOW),
    (dt.datetime | dt.date, dt.date(2030, 1, 2)),
    (dt.date | dt.datetime | None, None),
    (uuid.UUID | str, ID),
    (uuid.UUID | str, "just text"),
    (str | uuid.UUID | int, 5),
    (list[dt.datetime | dt.date], [NOW, dt.date(2030, 1, 2)]),
    (dict[str, uuid.UUID | str], {"a": ID, "b": "text"}),
    (tuple[dt.datetime | dt.date, int], (NOW, 3)),
    (tuple[uuid.UUID | str, ...], (ID, "x")),
    (set[uuid.UUID | str], {ID, "x"}),
    (Point | Place, Point(1.5)),
    (Point | Place, Place("x", Path("/a/b"))),
    (Model | Strict, Strict(day=dt.date(2030, 1, 2), number=4)),
    (Model | Strict, Model(at=NOW, theSize=3)),
    (Annotated[dt.datetime | dt.date, "note"], dt.date(2030, 1, 2)),
    (defaultdict[str, int], defaultdict(int, a=1)),
    (OrderedDict[str, dt.date], OrderedDict(b=dt.date(2030, 1, 2), a=dt.date(2031, 1, 2))),
    (Counter[str], Counter("aab")),
    (OrderedDict, OrderedDict(a=1)),
    (deque[int], deque([1, 2])),
    (Path, Path("/a/b")),
    (PurePosixPath | None, PurePosixPath("a")),
    (list[Path], [Path("/a"), Path("b")]),
    (Place, Place("x", Path("/a/b"))),
    (Slug, Slug("own")),
    (dict[int, str], {1: "a", -2: "b"}),
    (dict[uuid.UUID, int], {ID: 1}),
    (Pair, Pair(1, "x")),
    (Odd, Odd(Point(1.0))),
    (list[Odd], [Odd(Point(1.0))]),
    (Record, Record(NOW, 1.5)),
    (Model, Model(at=NOW, theSize=3)),
    (Strict, Strict(day=dt.date(2030, 1, 2), number=4)),
    (TwoAliases, TwoAliases.model_validate({"in_a": 3})),
    (ToldSecret, ToldSecret(password="s")),
    (Colour, Colour.RED),
    (Decimal, Decimal("1.10")),
    (bytes, b"\xff\x00"),
    (dt.timedelta, dt.timedelta(seconds=1.5)),
    (dt.datetime, dt.datetime(2030, 6, 1, tzinfo=ZoneInfo("Europe/Amsterdam"))),
    (dt.datetime, dt.datetime(2030, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Amsterdam"))),
    (dt.datetime, dt.datetime(2030, 10, 27, 2, 30, fold=0, tzinfo=ZoneInfo("Europe/Amsterdam"))),
    (dt.datetime, dt.datetime(2030, 6, 1)),  # noqa: DTZ001
    (dt.time, dt.time(2, 30)),
    (Any, [1, {"a": None}]),
]

REFUSED: list[tuple[Any, Any]] = [
    (Point, Point(float("nan"))),
    (Point, Point(float("inf"))),
    (Record, Record(NOW, float("nan"))),
    (list[float], [1.0, float("nan")]),
    (uuid.UUID | str, str(ID)),
    (dict[int, str], {1: "a", "1": "b"}),
    (dict, {1: "a"}),
    (dict, {1: "a", "1": "b"}),
    (Any, {1: "a", "1": "b"}),
    (Any, [{"x": {1: "a", "1": "b"}}]),
    (dt.datetime, dt.datetime(1930, 1, 1, tzinfo=ZoneInfo("Europe/Amsterdam"))),
    (list[dt.datetime], [dt.datetime(1930, 1, 1, tzinfo=ZoneInfo("Europe/Amsterdam"))]),
    (dt.date, NOW),
    (dt.datetime, TWICE),
    (dt.datetime | dt.date, TWICE),
    (list[dt.datetime | None], [TWICE]),
    (dict[str, dt.datetime], {"a": TWICE}),
    (set[dt.datetime], {TWICE}),
    (Record, Record(TWICE)),
    (Model, Model(at=TWICE, theSize=3)),
    (dt.time, dt.time(2, 30, fold=1)),
    (dt.time, dt.time(2, 30, tzinfo=ZoneInfo("Europe/Amsterdam"))),
    (Point, Point3(1.0, 2.0, 3.0)),
    (list[Point], [Point3(1.0, 2.0, 3.0)]),
    (Shape, Square(1)),
    (Model, BiggerModel(at=NOW, theSize=3)),
    (Point, "text"),
]

NOT_READ_AGAIN: list[tuple[Any, Any]] = [
    (Halved, Halved(1)),
    (list[Halved], [Halved(1)]),
    (Once, Once("x")),
    (list[Once] | None, [Once("x")]),
    (pydantic.BaseModel, Model(at=NOW, theSize=3)),
]

CONVERTED: list[tuple[Any, Any, Any]] = [
    (list[int], (1, 2), [1, 2]),
    (tuple[int, ...], [1, 2], (1, 2)),
    (set[int], [1, 2], {1, 2}),
    (dt.date, "2030-01-02", dt.date(2030, 1, 2)),
    (Path, "/a", Path("/a")),
    (float, 5, 5.0),
    (str, Slug("own"), "own"),
    (Point, {"x": 1.0}, Point(1.0)),
    (HasSide, Square(1), {"side": 1}),
    (Sequence[int], (1, 2), [1, 2]),
    (Model, {"at": NOW.isoformat(), "theSize": 3}, Model(at=NOW, theSize=3)),
    (dict[int, str], {"1": "a"}, {1: "a"}),
    (Counter[str], {"a": 2}, Counter("aa")),
]


@pytest.fixture
def app() -> Iterator[Ekiden]:
    with Ekiden("values", broker=f"memory://{new_id()}") as found:
        yield found


def echo_of(app: Ekiden, kind: Any, *, result: Any = None) -> Any:
    """A task that takes a value of this type, and returns how it arrived."""
    arrived: list[Any] = []

    def echo(value: Any) -> Any:
        arrived.append(value)
        return value

    echo.__annotations__ = {"value": kind, "return": kind if result is None else result}
    echo.arrived = arrived  # type: ignore[attr-defined]
    return app.task(name=f"echo-{new_id()}")(echo)


@pytest.mark.parametrize(("kind", "value"), KEPT, ids=[f"{kind} {value!r}"[:60] for kind, value in KEPT])
def test_what_an_annotation_allows_arrives_as_it_was(app: Ekiden, kind: Any, value: Any) -> None:
    echo = echo_of(app, kind)

    with app.worker(threads=1):
        returned = echo.delay(value).get(timeout=10)

    (arrived,) = echo.run.arrived
    for each in (arrived, returned):
        assert type(each) is type(value)
        if isinstance(value, dt.datetime) and value.tzinfo is not None:
            assert each.astimezone(dt.UTC) == value.astimezone(dt.UTC)
        elif not isinstance(value, Odd | list):
            assert each == value
    assert echo.signature((value,)).args == (value,)


@pytest.mark.parametrize(("kind", "value"), REFUSED, ids=[f"{kind} {value!r}"[:60] for kind, value in REFUSED])
def test_what_would_become_another_value_is_refused_at_the_call(app: Ekiden, kind: Any, value: Any) -> None:
    echo = echo_of(app, kind)

    with pytest.raises(TaskArgumentsError):
        echo.delay(value)

    assert app.transport.depth("default").ready == 0


@pytest.mark.parametrize(
    ("kind", "value"),
    [*(each for each in REFUSED if each[1] != "text" and each[0] is not dt.date), *NOT_READ_AGAIN],
    ids=lambda each: repr(each)[:40],
)
def test_a_result_that_would_become_another_value_fails_its_task(app: Ekiden, kind: Any, value: Any) -> None:
    @app.task(name="make")
    def make() -> Any:
        return value

    make.run.__annotations__["return"] = kind
    made = app.task(name="made")(make.run)

    with pytest.raises(MisuseError, match="its result cannot be stored"):
        made.apply().get()


@pytest.mark.parametrize(("kind", "given", "arrives"), CONVERTED, ids=lambda each: repr(each)[:40])
def test_what_an_annotation_does_not_name_is_converted_to_it(app: Ekiden, kind: Any, given: Any, arrives: Any) -> None:
    echo = echo_of(app, kind, result=Any)

    echo.apply((given,)).get()

    (arrived,) = echo.run.arrived
    assert (type(arrived), arrived) == (type(arrives), arrives)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Secret, "Secret.password is a secret, which JSON shows as asterisks"),
        (list[Secret], "Secret.password is a secret"),
        (dict[str, Excluded] | None, r"Excluded.hidden is left out of JSON \(exclude=True\)"),
    ],
)
def test_a_model_that_could_never_arrive_as_it_was_is_refused_where_the_task_is(
    app: Ekiden, kind: Any, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"the parameter 'value' cannot be kept: {said}"):
        echo_of(app, kind, result=Any)
    with pytest.raises(ConfigurationError, match=rf"the result cannot be kept: {said}"):
        echo_of(app, Any, result=kind)


def test_a_name_for_the_type_checker_alone_switches_off_no_other_parameter(app: Ekiden) -> None:
    @app.task
    def mixed(hidden: OnlyForTheTypeChecker, day: dt.date, *more: Path, **named: uuid.UUID) -> OnlyForTheTypeChecker:
        return [*(type(each).__name__ for each in (hidden, day, *named.values())), *map(str, more)]

    assert mixed.apply(({"a": 1}, dt.date(2030, 1, 2), Path("/x")), {"id": ID}).get() == ["dict", "date", "UUID", "/x"]
    with pytest.raises(TaskArgumentsError, match="'day'"):
        mixed.delay({}, "soon")
    names_what = "the annotation 'OnlyForTheTypeChecker' names what cannot be looked up at run time"
    assert mixed.parameters.unreadable() == [f"the parameter 'hidden': {names_what}", f"the result: {names_what}"]


def test_a_defaultdict_still_has_its_default(app: Ekiden) -> None:
    echo = echo_of(app, defaultdict[str, list[int]], result=Any)

    echo.apply((defaultdict(list, a=[1]),)).get()

    assert echo.run.arrived[0]["new"] == []


def test_scalars_of_numpy_and_lazy_texts_are_carried(app: Ekiden) -> None:
    from django.utils.functional import lazystr

    echo = echo_of(app, str, result=Any)

    assert echo.apply((lazystr("hello"),)).get() == "hello"
