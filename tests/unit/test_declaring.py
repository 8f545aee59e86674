"""What can be declared to be a task, under which name, and what is refused at once."""

from __future__ import annotations

import asyncio
import functools
import importlib
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ekiden import Ekiden
from ekiden.errors import ConfigurationError, EkidenError, TaskArgumentsError
from ekiden.message import new_id


@pytest.fixture
def app() -> Iterator[Ekiden]:
    with Ekiden("shop", broker=f"memory://{new_id()}") as found:
        yield found


def values() -> Iterator[int]:
    yield 1


async def later_values() -> AsyncIterator[int]:
    yield 1


class Adder:
    """An object that can be called."""

    def __call__(self, x: int, y: int = 5) -> int:
        return x + y

    def twice(self, x: int) -> int:
        return self(x, x)


async def fetch(x: int) -> int:
    return x + 1


def without_wraps(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (values, "values() is a generator"),
        (later_values, "later_values() is a generator"),
        (Adder, "not on the class Adder"),
        (Adder(), "has no name that a worker could find it by; give it name="),
        (functools.partial(fetch, 1), "has no name that a worker could find it by; give it name="),
        (5, "a task is declared on a function, not on 5"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_no_worker_could_run_is_refused_at_once(app: Ekiden, what: Any, said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        app.task(what)

    assert said in str(refused.value)


def test_with_a_name_whatever_can_be_called_is_a_task(app: Ekiden) -> None:
    add = app.task(name="add")(Adder())
    add_nine = app.task(name="add_nine")(functools.partial(Adder().__call__, y=9))
    doubled = app.task(name="twice")(Adder().twice)
    fetched = app.task(name="fetch")(functools.partial(fetch))

    with app.worker(threads=1):
        sent = [add.delay(1), add_nine.delay(2), doubled.delay(4), fetched.delay(1)]
        assert [result.get(timeout=10) for result in sent] == [6, 11, 8, 2]


@pytest.mark.parametrize(
    "decorate", [without_wraps, lambda function: functools.wraps(function)(without_wraps(function))]
)
def test_a_coroutine_behind_a_decorator_is_awaited(app: Ekiden, decorate: Callable[..., Any]) -> None:
    task = app.task(name="behind")(decorate(fetch))

    with app.worker(threads=1):
        assert task.delay(4).get(timeout=10) == 5
    assert task.apply((1,)).get() == 2


def test_two_functions_of_one_factory_need_names(app: Ekiden) -> None:
    def make(number: int) -> Callable[[], int]:
        def made() -> int:
            return number

        return made

    app.task(make(1))
    with pytest.raises(
        ConfigurationError, match=r"two tasks are called .*made.*: both are functions that .*:\d+ makes"
    ):
        app.task(make(2))
    named = app.task(name="third")(make(3))

    assert named.apply().get() == 3


def test_two_functions_behind_a_decorator_without_wraps_need_names(app: Ekiden) -> None:
    app.task(without_wraps(Adder().twice))

    with pytest.raises(ConfigurationError, match=r"functools\.wraps\(\)"):
        app.task(without_wraps(fetch))


def test_a_method_of_two_objects_needs_names(app: Ekiden) -> None:
    app.task(Adder().twice)

    with pytest.raises(ConfigurationError, match="two tasks are called"):
        app.task(Adder().twice)


def test_a_module_that_is_imported_again_declares_its_tasks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "imported_again.py").write_text(
        "from ekiden import shared_task\n\n\n@shared_task\ndef add(x, y):\n    return x + y\n"
    )
    first = importlib.import_module("imported_again")

    again = importlib.reload(first)
    del sys.modules["imported_again"]
    third = importlib.import_module("imported_again")

    assert again.add.name == third.add.name == "imported_again.add"


def test_an_argument_may_be_called_self(app: Ekiden) -> None:
    @app.task
    def note(self: int, args: int = 0, name: int = 0) -> int:
        return self + args + name

    with app.worker(threads=1):
        assert note.delay(self=1, args=2, name=3).get(timeout=10) == 6
    assert note.s(self=1).kwargs == {"self": 1}
    assert note(self=4) == 4


def test_an_ignored_result_is_there_at_once_and_none(app: Ekiden) -> None:
    @app.task(ignore_result=True)
    def quiet() -> int:
        return 1

    @app.task
    def loud() -> int:
        return 1

    ignored = [quiet.delay(), loud.apply_async(ignore_result=True), *quiet.enqueue_many([(), ()])]

    assert [result.ignored for result in ignored] == [True] * 4
    assert [result.get() for result in ignored] == [None] * 4
    assert not loud.delay().ignored
    assert not quiet.apply_async(ignore_result=False).ignored


def test_an_ignored_result_can_be_awaited(app: Ekiden) -> None:
    app.conf.task_ignore_result = True

    @app.task
    def quiet() -> int:
        return 1

    async def send() -> tuple[bool, object]:
        result = await quiet.adelay()
        return result.ignored, await result

    assert asyncio.run(send()) == (True, None)


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ("ab", None, "args is a list or tuple of arguments, not 'ab'; for one argument write ('ab',)"),
        (5, None, "args is a list or tuple of arguments, not 5"),
        ({"x": 1}, None, "args is a list or tuple of arguments, not {'x': 1}"),
        (b"ab", None, "args is a list or tuple of arguments"),
        ((), ["x"], "kwargs is a mapping of arguments by their names, not ['x']"),
        ((), {1: 2}, "kwargs is a mapping of arguments by their names, not {1: 2}"),
        ((), "x", "kwargs is a mapping of arguments by their names, not 'x'"),
    ],
)
def test_arguments_that_are_none_are_refused_at_every_door(app: Ekiden, args: Any, kwargs: Any, said: str) -> None:
    @app.task(name="take")
    def take(*args: Any, **kwargs: Any) -> None: ...

    for send in (
        take.apply_async,
        take.apply,
        take.signature,
        take.s().clone,
        take.s().apply_async,
        functools.partial(app.send_task, "take"),
        functools.partial(app.send_task, "elsewhere"),
        functools.partial(app.signature, "take"),
        lambda *given: asyncio.run(take.aapply_async(*given)),
    ):
        with pytest.raises(TaskArgumentsError) as refused:
            send(args, kwargs)
        assert said in str(refused.value)
    assert app.transport.depth("default").ready == 0


def test_none_is_no_arguments_as_celery_has_it(app: Ekiden) -> None:
    @app.task(name="take")
    def take(*args: Any, **kwargs: Any) -> list[Any]:
        return [list(args), kwargs]

    with app.worker(threads=1):
        for sent in (
            take.apply_async(None, None, link=None, link_error=None),
            app.send_task("take", None, None),
            take.signature(None, None).apply_async(None, None),
            app.signature("take", None, None).delay(),
            take.apply_async(range(2)),
        ):
            assert sent.get(timeout=10) in ([[], {}], [[0, 1], {}])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"link": 5}, "link takes signatures"),
        ({"link": "add"}, "link takes signatures"),
        ({"link_error": [5]}, "link takes signatures"),
        ({"headers": [1]}, "headers is a mapping of text to values, not [1]"),
        ({"headers": "x"}, "headers is a mapping of text to values, not 'x'"),
        ({"headers": 0}, "headers is a mapping of text to values, not 0"),
    ],
    ids=str,
)
def test_an_option_of_the_wrong_kind_is_refused_at_every_door(app: Ekiden, option: dict[str, Any], said: str) -> None:
    @app.task(name="take")
    def take() -> None: ...

    for send in (take.apply_async, take.apply, functools.partial(app.send_task, "take"), take.s().apply_async):
        with pytest.raises(EkidenError) as refused:
            send(**option)
        assert said in str(refused.value)


def test_a_task_is_no_signature(app: Ekiden) -> None:
    @app.task(name="take")
    def take() -> None: ...

    with pytest.raises(EkidenError, match=r"link takes signatures, such as add.s\(1\), not <Task take>"):
        take.apply_async(link=take)
