"""Arguments that plainly are what the annotations say take the shortest way; all others are looked at as ever."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from ekiden import Ekiden, Task
from ekiden.codec import Parameters
from ekiden.errors import TaskArgumentsError


def annotated(x: int, y: str = "", *, z: int = 0) -> None:
    """The parameters that most of the tests need."""


def plain(x: int, y: str = "", z: bool = False) -> None:
    """No parameter of it is by name only."""


def bare(x, y=1):  # type: ignore[no-untyped-def]
    """A function without annotations."""


@pytest.fixture
def parameters() -> Parameters:
    found = Parameters(plain, skip_first=False)
    found.check("plain", (1,), {})  # annotations are looked up when they are first needed
    return found


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1,), {}),
        ((1, "a"), {}),
        ((1, "a", True), {}),
        ((), {"x": 1}),
        ((1,), {"z": True}),
        ((1,), {"z": True, "y": "a"}),
        ((), {"y": "a", "x": 1}),
    ],
)
def test_what_the_annotations_say_fits(parameters: Parameters, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for _ in range(2):  # what was met before is remembered
        assert parameters.fit_as_they_are(args, kwargs)
        parameters.check("plain", args, kwargs)
        assert parameters.misfit(args, kwargs) is None


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((True,), {}),
        ((1, None), {}),
        ((1, "a", 1), {}),
        ((1, "a", True, 1), {}),
        ((1,), {"x": 1}),
        ((), {"y": "a"}),
        ((1,), {"unknown": 1}),
        ((1,), {"y": 1}),
        ((1, "a", True, 1), {"z": True}),
    ],
)
def test_anything_else_is_looked_at(parameters: Parameters, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for _ in range(2):
        assert not parameters.fit_as_they_are(args, kwargs)
        with pytest.raises(TaskArgumentsError):
            parameters.check("plain", args, kwargs)


def test_a_function_without_annotations_takes_so_many() -> None:
    parameters = Parameters(bare, skip_first=False)
    parameters.check("bare", (object,), {})

    assert [parameters.fit_as_they_are((0,) * count, {}) for count in range(4)] == [False, True, True, False]
    with pytest.raises(TaskArgumentsError):
        parameters.check("bare", (1, 2, 3), {})


def test_parameters_by_name_only_are_asked_for() -> None:
    parameters = Parameters(annotated, skip_first=False)
    parameters.check("annotated", (1,), {"z": 2})

    with pytest.raises(TaskArgumentsError):
        parameters.check("annotated", (1, "a", 2), {})


class ChangesThem(Task[..., Any]):
    """Changes the arguments before its body."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Called with what the body is called with."""
        args[0] = 7


def test_before_start_does_not_change_the_request() -> None:
    app = Ekiden("fitting", broker=f"memory://{uuid4().hex}")

    @app.task(bind=True, base=ChangesThem)
    def both(self: Task[..., Any], x: int) -> list[int]:
        return [x, *self.request.args]

    with app:
        assert both.apply((1,)).get() == [7, 1]


@pytest.mark.parametrize("value", [{1: 0, "1": 0}, {"a": {1: 0, "1": 0}}, [{1: 0, "1": 0}]])
def test_keys_that_are_lost_are_found_beside_flat_values(value: Any) -> None:
    app = Ekiden("fitting", broker=f"memory://{uuid4().hex}")

    @app.task
    def take(x, y=None):  # type: ignore[no-untyped-def]
        return x

    with app, pytest.raises(TaskArgumentsError, match="the same in JSON"):
        take.delay(value, {"a": 1})
