"""What annotations mean for arguments and results: read where that is possible, left alone where it is not."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

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
