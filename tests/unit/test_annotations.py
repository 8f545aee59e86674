"""What annotations mean for arguments and results: read where that is possible, left alone where it is not."""

from collections.abc import Iterator
from dataclasses import InitVar, dataclass
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from ekiden import Ekiden, memory
from ekiden.errors import TaskArgumentsError
from ekiden.kinds import is_readable
from pydantic import BaseModel


class Opaque:
    """A class that msgspec knows nothing of."""


class Model(BaseModel):
    number: int


@dataclass
class Node:
    """A type that contains itself."""

    day: date
    children: list["Node"]


@dataclass
class Holder:
    inside: Opaque


class Mixed(Enum):
    """Values of several kinds, which msgspec does not read."""

    TEXT = "r"
    NUMBER = 2
    PAIR = (1, 2)
    EXACT = Decimal("1.0")


class Keys(Enum):
    TEXT = "r"
    NUMBER = 2


class Alike(Enum):
    TEXT = "1.0"
    EXACT = Decimal("1.0")


@dataclass
class Halved:
    number: int
    unseen: InitVar[int] = 3


@pytest.fixture
def app() -> Iterator[Ekiden]:
    with Ekiden("annotations", broker="memory://annotations") as app:
        yield app
    memory.discard("annotations")


@pytest.mark.parametrize(
    "kind",
    [int, Any, object, dict[str, object], list[Model], Model | None, Node, tuple[int, ...], dict[str, list[date]]],
)
def test_a_type_that_json_can_be_read_as(kind: Any) -> None:
    assert is_readable(kind)


@pytest.mark.parametrize("kind", [Opaque, list[Opaque], Opaque | None, Holder, dict[str, tuple[Opaque, int]]])
def test_a_type_that_only_its_own_code_could_read(kind: Any) -> None:
    assert not is_readable(kind)


def test_arguments_of_such_a_type_are_left_unchecked(app: Ekiden) -> None:
    @app.task
    def count(items: list[Opaque]) -> dict[str, object]:
        return {"count": len(items)}

    assert count.apply(([1, 2],)).get() == {"count": 2}


def test_arguments_of_other_types_are_checked_beside_them(app: Ekiden) -> None:
    @app.task
    def count(items: list[Opaque], day: date) -> int:
        return len(items) + day.day

    assert count.apply(([1], date(2030, 1, 2))).get() == 3
    with pytest.raises(TaskArgumentsError, match="'day'"):
        count.apply(([1], "tomorrow"))


def test_a_result_of_such_a_type_comes_as_json_has_it(app: Ekiden) -> None:
    @app.task
    def make() -> list[Opaque]:
        return [1, 2]  # type: ignore[list-item]

    assert make.apply().get() == [1, 2]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *((Mixed, member) for member in Mixed),
        (list[Mixed], [Mixed.PAIR, Mixed.TEXT]),
        (Mixed | None, Mixed.EXACT),
        (dict[Keys, int], {Keys.TEXT: 1, Keys.NUMBER: 2}),
        (dict[str, Mixed], {"a": Mixed.PAIR}),
    ],
)
def test_members_of_any_enum_arrive_as_they_were(app: Ekiden, kind: Any, value: Any) -> None:
    arrived = []

    def take(item):  # type: ignore[no-untyped-def]
        arrived.append(item)
        return item

    take.__annotations__ = {"item": kind, "return": kind}
    result = app.task(take).apply((value,)).get()

    assert (arrived, result) == ([value], value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Alike, Alike.EXACT),
        (Halved, Halved(1)),
        (list[Halved], [Halved(1)]),
        (dict[Mixed, int], {Mixed.PAIR: 1}),
        (dict[tuple[Opaque, int], int], {(1, 2): 3}),
        (float, 2**53 + 1),
        (list[float], [2**53 + 1]),
        (BaseModel, Model(number=1)),
    ],
)
def test_a_value_that_would_arrive_as_another_is_refused(app: Ekiden, kind: Any, value: Any) -> None:
    def take(item):  # type: ignore[no-untyped-def]
        return None

    take.__annotations__ = {"item": kind}

    with pytest.raises(TaskArgumentsError, match="cannot take"):
        app.task(take).apply((value,))


def test_an_error_out_of_a_models_own_code_is_told_at_the_call(app: Ekiden) -> None:
    class Moody(BaseModel):
        number: int

        def model_post_init(self, context: Any, /) -> None:
            if self.number > 1:
                raise RuntimeError("not today")

    @app.task(name="mood")
    def mood(item: Moody) -> int:
        return item.number

    assert mood.apply(({"number": 1},)).get() == 1
    with pytest.raises(TaskArgumentsError, match=r"for 'item' .*not today"):
        mood.apply(({"number": 2},))


@pytest.mark.parametrize(
    "value",
    [
        {1: "a", "1": "b"},
        [{True: "a", "1": "b"}],
        {"in": {False: "a", "0": "b"}},
        {UUID(int=2**127 + 2**126): "a", str(UUID(int=2**127 + 2**126)): "b"},
        {date(2030, 1, 2): "a", "2030-01-02": "b"},
    ],
)
def test_keys_that_are_one_in_json_are_refused(app: Ekiden, value: Any) -> None:
    @app.task(name="take")
    def take(item):  # type: ignore[no-untyped-def]
        return None

    with pytest.raises(TaskArgumentsError, match="keys that are the same in JSON"):
        take.delay(value)
