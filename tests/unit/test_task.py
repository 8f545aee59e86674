"""Tasks: what is declared, what is sent, and what is refused before it is."""

import asyncio
import enum
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from ekiden import Ekiden, Retry, Signature, Task, TaskSet
from ekiden.codec import decode_call
from ekiden.errors import ConfigurationError, EkidenError, MisuseError, TaskArgumentsError
from ekiden.message import DEFAULT_PRIORITY
from ekiden.signature import Call
from ekiden.task import AsyncTask

NOW = datetime.now(UTC)


@pytest.fixture
def app(ekiden_app: Ekiden) -> Ekiden:
    return ekiden_app


@pytest.fixture
def add(app: Ekiden) -> Task[[int, int], int]:
    @app.task
    def add(x: int, y: int = 1) -> int:
        """Add."""
        return x + y

    return add


def sent(app: Ekiden, queue: str = "default") -> list[Call]:
    return [decode_call(seen.message.body, {}) for seen in app.transport.browse(queue, limit=10_000)]


def the_one_sent(app: Ekiden, queue: str = "default") -> Call:
    (call,) = sent(app, queue)
    return call


# Declaring.


def test_a_task_is_called_like_its_function_and_looks_like_it(add: Task[[int, int], int]) -> None:
    assert add(1, 2) == 3
    assert (add.__name__, add.__doc__, add.__module__) == ("add", "Add.", __name__)
    assert add.name == f"{__name__}.add.add"
    assert repr(add) == f"<Task {add.name}>"


def test_an_async_task_gives_a_coroutine(app: Ekiden) -> None:
    @app.task
    async def double(x: int) -> int:
        return 2 * x

    assert isinstance(double, AsyncTask)
    assert asyncio.run(double(4)) == 8


def test_a_bound_function_gets_its_task_first(app: Ekiden) -> None:
    @app.task(bind=True)
    def itself(self: Any, x: int) -> tuple[Any, int]:
        return self, x

    assert itself(3) == (itself, 3)


def test_a_class_of_ones_own_gives_attributes_and_handlers(app: Ekiden) -> None:
    class Connected(Task[..., Any]):
        connections = 0

        def connect(self) -> int:
            type(self).connections += 1
            return self.connections

    @app.task(base=Connected, bind=True)
    def query(self: Connected) -> int:
        return self.connect()

    assert isinstance(query, Connected)
    assert (query(), query()) == (1, 2)


def test_two_functions_cannot_share_a_name(app: Ekiden) -> None:
    app.task(name="same")(lambda: 1)

    with pytest.raises(ConfigurationError, match=r"two tasks are called 'same': .*test_task.py:\d+ and "):
        app.task(name="same")(lambda: 2)


def test_a_module_that_is_loaded_again_may_declare_its_tasks_again(app: Ekiden) -> None:
    def declare() -> Task[..., Any]:
        @app.task
        def again() -> None: ...

        return again

    declare()

    assert app.tasks[declare().name].name.endswith("again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": 3}, r"no option 'retries'; write max_retries="),
        ({"que": "x"}, r"did you mean 'queue'"),
        ({"nonsense_option": 1}, r"no option 'nonsense_option'\."),
        ({"priority": 10}, r"priority"),
        ({"priority": "high"}, r"priority"),
        ({"queue": "a b"}, r"'a b' is not a queue name"),
        ({"queue": "x.dead"}, r"holds dead letters"),
        ({"rate_limit": "fast"}, r"not a rate limit"),
        ({"max_retries": -1}, r"max_retries"),
        ({"time_limit": 0}, r"time_limit"),
        ({"acks": "never"}, r"acks"),
        ({"autoretry_for": "ValueError"}, r"takes exception classes"),
        ({"autoretry_for": [ValueError()]}, r"takes exception classes"),
        ({"pool": "thread", "time_limit": 5}, r"a thread cannot be ended from outside"),
    ],
)
def test_a_wrong_option_is_refused_where_the_task_is_declared(
    app: Ekiden, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        app.task(name="shop.add", **options)(lambda: None)

    assert "shop.add" in str(caught.value) or "queue" in options or "rate_limit" in options


def test_an_async_task_cannot_ask_for_a_process(app: Ekiden) -> None:
    async def body() -> None: ...

    with pytest.raises(ConfigurationError, match="an async def task runs in the event loop"):
        app.task(pool="process")(body)


# Sending.


def test_delay_sends_its_arguments(app: Ekiden, add: Task[[int, int], int]) -> None:
    result = add.delay(1, y=2)  # type: ignore[call-arg]

    call = the_one_sent(app)
    (seen,) = app.transport.browse("default")
    assert (call.task, call.id, call.args, call.kwargs) == (add.name, result.id, [1], {"y": 2})
    assert (seen.message.id, seen.message.priority, seen.message.due) == (result.id, DEFAULT_PRIORITY, None)
    assert call.sent == pytest.approx(datetime.now(UTC).timestamp(), abs=5)


def test_each_option_of_a_call_is_in_its_message(app: Ekiden, add: Task[[int, int], int]) -> None:
    add.apply_async(
        (1,),
        {"y": 2},
        countdown=60,
        expires=120,
        queue="mails",
        priority=9,
        task_id="mine",
        headers={"trace": "abc"},
        link=add.s(1),
        link_error=[add.si(2, 3)],
        ignore_result=True,
        time_limit=5,
        soft_time_limit=4,
    )

    (seen,) = app.transport.browse("mails")
    call = the_one_sent(app, "mails")
    assert (seen.message.id, seen.message.priority, dict(seen.message.headers)) == ("mine", 9, {"trace": "abc"})
    assert seen.message.due == call.eta == pytest.approx(call.sent + 60)
    assert call.expires == pytest.approx(call.sent + 120)
    assert (call.id, call.ignore_result, call.time_limit, call.soft_time_limit) == ("mine", True, 5, 4)
    assert [(step.task, step.args, step.immutable) for step in call.on_success] == [(add.name, (1,), False)]
    assert [(step.task, step.args, step.immutable) for step in call.on_error] == [(add.name, (2, 3), True)]


def test_a_time_can_be_said_in_any_zone(app: Ekiden, add: Task[[int, int], int]) -> None:
    moment = (datetime.now(UTC) + timedelta(hours=1)).astimezone()

    add.apply_async((1,), eta=moment, expires=moment + timedelta(hours=1))

    call = the_one_sent(app)
    assert call.eta == pytest.approx(moment.timestamp())
    assert call.expires == pytest.approx(moment.timestamp() + 3600)


@pytest.mark.parametrize("countdown", [0, -5])
def test_what_is_due_already_waits_for_nothing(app: Ekiden, add: Task[[int, int], int], countdown: float) -> None:
    add.apply_async((1,), countdown=countdown)
    add.apply_async((1,), eta=NOW - timedelta(days=1))

    assert [seen.message.due for seen in app.transport.browse("default")] == [None, None]


def test_a_second_call_of_the_same_id_is_not_added(app: Ekiden, add: Task[[int, int], int]) -> None:
    first, second = (add.apply_async((n,), task_id="once") for n in range(2))

    assert first == second
    assert the_one_sent(app).args == [0]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"countdown": float("nan")}, "countdown"),
    ({"countdown": float("inf")}, "countdown"),
    ({"countdown": "soon"}, "countdown"),
    ({"eta": datetime(2030, 1, 1)}, "time zone"),  # noqa: DTZ001 - that is the mistake
    ({"eta": 60}, "eta"),
    ({"expires": float("inf")}, "expires"),
    ({"expires": datetime(2030, 1, 1)}, "time zone"),  # noqa: DTZ001
    ({"expires": "tomorrow"}, "expires"),
    ({"queue": "a/b"}, "not a queue name"),
    ({"queue": ""}, "not a queue name"),
    ({"queue": 5}, "queue"),
    ({"priority": 10}, "priority"),
    ({"priority": True}, "priority"),
    ({"task_id": ""}, "task_id"),
    ({"task_id": 5}, "task_id"),
    ({"task_id": "a\x00b"}, "task_id"),
    ({"task_id": "x" * 300}, "task_id"),
    ({"headers": {"a": [1]}}, "header 'a'"),
    ({"headers": {"ekiden-dead-at": 1}}, "ekiden's own"),
    ({"headers": {5: "x"}}, "header"),
    ({"ignore_result": "yes"}, "ignore_result"),
    ({"time_limit": -1}, "time_limit"),
    ({"time_limit": 0}, "time_limit"),
    ({"soft_time_limit": "1"}, "soft_time_limit"),
    ({"link": "shop.then"}, "link takes signatures"),
    ({"link_error": [1]}, "link takes signatures"),
    ({"countdwn": 5}, "countdwn"),
]
WAYS: list[tuple[str, Callable[[Ekiden, Task[..., Any], dict[str, Any]], Any]]] = [
    ("apply_async", lambda _app, task, options: task.apply_async((1,), **options)),
    ("aapply_async", lambda _app, task, options: asyncio.run(task.aapply_async((1,), **options))),  # type: ignore[arg-type]
    ("send_task", lambda app, task, options: app.send_task(task.name, (1,), **options)),
    ("enqueue_many", lambda _app, task, options: task.enqueue_many([(1,)], **options)),
    ("signature", lambda _app, task, options: task.s(1).set(**options).apply_async()),
    ("linked", lambda _app, task, options: task.apply_async((1,), link=task.s(1).set(**options))),
    ("apply", lambda _app, task, options: task.apply((1,), **options)),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[repr(options)[:40] for options, _ in WRONG])
@pytest.mark.parametrize("call", [call for _, call in WAYS], ids=[way for way, _ in WAYS])
def test_a_wrong_option_is_refused_before_anything_is_sent(
    app: Ekiden,
    add: Task[[int, int], int],
    options: dict[str, Any],
    message: str,
    call: Callable[[Ekiden, Task[..., Any], dict[str, Any]], Any],
) -> None:
    with pytest.raises(EkidenError, match=message):
        call(app, add, options)

    assert sent(app) == []


@pytest.mark.parametrize("args", [(), (1, 2, 3), ("one",), (object(),)])
def test_wrong_arguments_are_a_type_error_in_the_caller(
    app: Ekiden, add: Task[[int, int], int], args: tuple[Any, ...]
) -> None:
    with pytest.raises(TypeError, match=r"add\(") as caught:
        add.delay(*args)

    assert isinstance(caught.value, TaskArgumentsError)
    assert sent(app) == []


def test_arguments_of_a_task_that_is_not_typed_are_not_converted(app: Ekiden) -> None:
    @app.task(typing=False)
    def anything(x: int) -> None: ...

    anything.delay("text")  # type: ignore[arg-type]

    assert the_one_sent(app).args == ["text"]


# Sending many.


def test_many_calls_go_out_together(app: Ekiden, add: Task[[int, int], int]) -> None:
    results = add.enqueue_many([(1, 2), [3], {"x": 5, "y": 6}, add.s(7).set(queue="mails")], priority=7)

    assert [(list(call.args), call.kwargs) for call in sent(app)] == [([1, 2], {}), ([3], {}), ([], {"x": 5, "y": 6})]
    assert the_one_sent(app, "mails").args == [7]
    assert [each.id for each in results] == [*(call.id for call in sent(app)), the_one_sent(app, "mails").id]


def test_any_number_of_calls_can_come_from_a_generator(app: Ekiden, add: Task[[int, int], int]) -> None:
    results = add.enqueue_many((n, n) for n in range(1234))

    assert len({each.id for each in results}) == len(sent(app)) == 1234


@pytest.mark.parametrize("call", [5, "ab", None, b"ab"])
def test_a_call_that_is_no_tuple_of_arguments_is_refused(app: Ekiden, add: Task[[int, int], int], call: Any) -> None:
    with pytest.raises(TaskArgumentsError, match="takes a tuple or mapping"):
        add.enqueue_many([call])


def test_another_tasks_signature_is_not_taken_for_ones_own(app: Ekiden, add: Task[[int, int], int]) -> None:
    @app.task
    def mul(x: int, y: int) -> int:
        return x * y

    with pytest.raises(TaskArgumentsError, match="mul"):
        add.enqueue_many([mul.s(1, 2)])


def test_many_calls_cannot_share_one_id(add: Task[[int, int], int]) -> None:
    with pytest.raises(ConfigurationError, match="one task_id to many calls"):
        add.enqueue_many([(1,)], task_id="x")


# Async sending.


def test_async_code_sends_without_blocking(app: Ekiden, add: Task[[int, int], int]) -> None:
    async def send() -> list[str]:
        first = await add.adelay(1, 2)
        second = await add.aapply_async((3,), {"y": 4}, queue="mails")
        return [first.id, second.id]

    first, second = asyncio.run(send())

    assert the_one_sent(app).id == first
    assert (the_one_sent(app, "mails").id, the_one_sent(app, "mails").kwargs) == (second, {"y": 4})


# Signatures.


def test_a_signature_is_sent_by_the_app_of_its_task(app: Ekiden, add: Task[[int, int], int]) -> None:
    result = add.s(2).set(priority=8).delay(1)

    (seen,) = app.transport.browse("default")
    assert (the_one_sent(app).args, the_one_sent(app).id, seen.message.priority) == ([1, 2], result.id, 8)


def test_an_immutable_signature_keeps_its_arguments(app: Ekiden, add: Task[[int, int], int]) -> None:
    add.si(1, 2).delay(99)

    assert the_one_sent(app).args == [1, 2]


def test_links_of_a_signature_are_sent_along_wherever_they_were_said(app: Ekiden, add: Task[[int, int], int]) -> None:
    add.s(1, 2).set(link=add.s(1)).link(add.s(2)).apply_async()
    add.apply_async((1, 2), link=add.s(1).set(link=add.s(2), time_limit=9))

    first, second = sent(app)
    assert sorted(step.args for step in first.on_success) == [(1,), (2,)]
    ((inner,),) = [step.on_success for step in second.on_success]
    assert (inner.args, second.on_success[0].time_limit) == ((2,), 9)


def test_a_signature_from_nowhere_says_that_nothing_can_send_it() -> None:
    with pytest.raises(MisuseError, match="was not made by a task of an app"):
        Signature("shop.add").delay()


# Task sets.


def test_a_task_of_a_set_is_sent_by_the_one_app_that_included_it(app: Ekiden) -> None:
    tasks = TaskSet("shop")

    @tasks.task(bind=True)
    def whose(self: Task[..., Any]) -> Any:
        return self.app

    with pytest.raises(MisuseError, match="belongs to no app yet"):
        whose.delay()
    app.include_tasks(tasks)
    whose.delay()

    assert the_one_sent(app).task == whose.name
    assert app.tasks[whose.name]() is app


def test_a_task_of_a_set_that_two_apps_included_asks_which(app: Ekiden) -> None:
    tasks = TaskSet("shop")
    other = Ekiden("other", broker="memory://")

    @tasks.task
    def add(x: int) -> int:
        return x

    app.include_tasks(tasks)
    other.include_tasks(tasks)

    with pytest.raises(MisuseError, match="'other', 'tests'"):
        add.delay(1)
    app.tasks[add.name].delay(1)
    assert the_one_sent(app).args == [1]


def test_a_set_that_was_included_before_its_tasks_were_declared_brings_them_all_the_same(app: Ekiden) -> None:
    tasks = TaskSet("shop")
    app.include_tasks(tasks)

    @tasks.task
    def late() -> None: ...

    assert late.name in app.tasks


# Here and now.


def test_apply_executes_as_a_worker_would(app: Ekiden, add: Task[[int, int], int]) -> None:
    result = add.apply((1,), {"y": 2})

    assert (result.get(), result.state, result.successful(), result.name) == (3, "SUCCESS", True, add.name)
    assert sent(app) == []


def test_apply_converts_arguments_and_results_like_messages_do(app: Ekiden) -> None:
    class Colour(enum.Enum):
        RED = "red"

    @app.task
    def kinds(colour: Colour, items, moment: datetime) -> list[str]:  # type: ignore[no-untyped-def]
        return [type(each).__name__ for each in (colour, items, moment)]

    assert kinds.apply((Colour.RED, (1, 2), NOW)).get() == ["Colour", "list", "datetime"]


def test_apply_runs_further_tries_and_what_is_linked_at_once(app: Ekiden) -> None:
    ran: list[Any] = []

    @app.task(bind=True, max_retries=3)
    def stubborn(self: Task[..., Any]) -> str:
        ran.append(self.request.retries)
        if self.request.retries < 2:
            self.retry(countdown=3600)
        return "done"

    @app.task
    def then(value: str) -> None:
        ran.append(value)

    result = stubborn.apply(link=then.s())

    assert (result.get(), ran) == ("done", [0, 1, 2, "done"])


def test_apply_tells_of_failures(app: Ekiden) -> None:
    @app.task
    def fail() -> None:
        raise ValueError("no")

    result = fail.apply()

    assert (result.state, result.failed()) == ("FAILURE", True)
    with pytest.raises(ValueError, match="no"):
        result.get()


def test_apply_makes_a_thousand_tries_if_it_must(app: Ekiden) -> None:
    @app.task(bind=True, max_retries=None)
    def endless(self: Task[..., Any]) -> int:
        if self.request.retries < 1000:
            self.retry(countdown=0)
        return self.request.retries

    assert endless.apply().get() == 1000


def test_apply_of_an_async_task(app: Ekiden) -> None:
    @app.task
    async def double(x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    assert double.apply((21,)).get() == 42


def test_apply_of_an_async_task_inside_a_loop_says_what_to_do(app: Ekiden) -> None:
    @app.task
    async def double(x: int) -> int:
        return 2 * x

    async def main() -> None:
        double.apply((1,))

    with pytest.raises(MisuseError, match="await the function itself"):
        asyncio.run(main())


def test_apply_inside_a_body_leaves_the_request_of_the_body(app: Ekiden, add: Task[[int, int], int]) -> None:
    @app.task(bind=True)
    def outer(self: Task[..., Any]) -> bool:
        before = self.request.id
        add.apply((1, 2)).get()
        return self.request.id == before

    assert outer.apply().get() is True


# Called as a function.


def test_a_function_that_was_simply_called_has_no_call_to_retry(app: Ekiden) -> None:
    @app.task(bind=True)
    def work(self: Task[..., Any], error: Exception | None) -> None:
        assert self.request.called_directly
        self.retry(exc=error)

    with pytest.raises(MisuseError, match="no call to retry"):
        work(None)
    with pytest.raises(KeyError):
        work(KeyError("x"))


def test_a_state_cannot_be_told_outside_a_task(add: Task[[int, int], int]) -> None:
    with pytest.raises(MisuseError, match="outside a running task needs a task_id"):
        add.update_state(state="X")


def test_retry_can_be_returned_instead_of_raised(app: Ekiden) -> None:
    made: list[Any] = []

    @app.task(bind=True)
    def work(self: Task[..., Any]) -> str:
        if self.request.retries == 0:
            made.append(self.retry(countdown=5, throw=False))
        return "went on"

    assert work.apply().get() == "went on"
    assert isinstance(made[0], Retry)
