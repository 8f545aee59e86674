"""Numbers that are nobody's intention are refused where they are given, and where a message brings them."""

import math
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from ekiden import Ekiden, Retry, Task, memory
from ekiden.cli import ekiden
from ekiden.codec import OutcomeRecord, decode_call, encode_outcome
from ekiden.errors import ConfigurationError, MessageError, MisuseError, TransportError
from ekiden.message import Message, new_id
from ekiden.messaging import Connection, connect
from ekiden.options import check_limits, declared_options, publishing, rate_per_second
from ekiden.outcomes import Postponed, Retried
from ekiden.plugins import open_backend, open_transport
from ekiden.results import StoredResult
from ekiden.settings import Settings, checked_setting
from ekiden.times import LATEST_TIME, LONGEST_SECONDS, checked_timeout
from ekiden.urls import parse_url

from tests.working import PATIENCE, eventually

NO_SECONDS = [math.nan, math.inf, -math.inf, 1e308, 10**400, 10**5000, LONGEST_SECONDS * 1.01, True, "5", Decimal(5)]
NO_SETTINGS = [each for each in NO_SECONDS if not isinstance(each, Decimal)]  # which is taken as the number it is
NO_TIMEOUTS = [math.nan, True, False, "5", b"5", Decimal(1), [1]]
TOO_FAR = datetime(3000, 1, 2, tzinfo=UTC)


def named(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:12]}" if value != 10**5000 else "int of 5001 digits"


@pytest.fixture
def app() -> Iterator[Ekiden]:
    name = new_id()
    with Ekiden("times", broker=f"memory://{name}") as app:
        yield app
    memory.discard(name)


@pytest.fixture
def add(app: Ekiden) -> Task[[int, int], int]:
    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    return add


# Calls.


@pytest.mark.parametrize("option", ["countdown", "expires", "time_limit", "soft_time_limit", "publish_timeout"])
@pytest.mark.parametrize("seconds", NO_SECONDS, ids=named)
def test_a_calls_seconds_are_bounded(add: Task[[int, int], int], option: str, seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match=option):
        add.apply_async((1, 2), **{option: seconds})

    assert add.app.opened_transport().depth("default").ready == 0


@pytest.mark.parametrize("option", ["eta", "expires"])
def test_a_calls_moments_are_bounded(add: Task[[int, int], int], option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option} cannot be 3000-01-02"):
        add.apply_async((1, 2), **{option: TOO_FAR})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["countdown", "expires"])
@pytest.mark.parametrize("seconds", NO_SECONDS, ids=named)
def test_a_linked_calls_seconds_are_bounded(add: Task[[int, int], int], option: str, seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match=option):
        add.apply_async((1, 2), link=add.s(3).set(**{option: seconds}))


def test_what_lies_in_the_past_is_due_at_once(app: Ekiden, add: Task[[int, int], int]) -> None:
    long_ago = datetime(1, 1, 1, tzinfo=UTC)
    with app.worker():
        soon = [
            add.apply_async((1, 2), countdown=-5),
            add.apply_async((1, 2), eta=long_ago),
            add.apply_async((1, 2), link=add.si(3, 4).set(countdown=-LONGEST_SECONDS, task_id="linked")),
        ]
        assert [each.get(PATIENCE) for each in soon] == [3, 3, 3]
        assert app.AsyncResult("linked").get(PATIENCE) == 7
        late = [add.apply_async((1, 2), expires=long_ago), add.apply_async((1, 2), expires=-LONGEST_SECONDS)]
        eventually(lambda: {each.state for each in late} == {"EXPIRED"}, what="they have expired")


def test_what_follows_may_have_expired_before_it_was_sent(app: Ekiden, add: Task[[int, int], int]) -> None:
    with app.worker():
        add.apply_async((1, 2), link=add.si(3, 4).set(expires=-LONGEST_SECONDS, task_id="linked"))
        eventually(lambda: app.AsyncResult("linked").state == "EXPIRED", what="it has expired")


@pytest.mark.parametrize("field", ["sent", "eta", "expires"])
@pytest.mark.parametrize("number", ["1e308", "1e400", "-1", f"{LATEST_TIME * 2}", "true", '"5"'])
def test_a_call_of_somebody_elses_with_such_a_number_is_no_call(field: str, number: str) -> None:
    body = f'{{"v":1,"task":"t","id":"i","sent":1.0,"{field}":{number}}}'

    with pytest.raises(MessageError):
        decode_call(body.encode(), {})


@pytest.mark.parametrize("field", ["countdown", "expires", "time_limit"])
def test_a_step_of_somebody_elses_with_such_a_number_is_no_call(field: str) -> None:
    body = f'{{"v":1,"task":"t","id":"i","sent":1.0,"on_success":[{{"task":"u","{field}":1e308}}]}}'

    with pytest.raises(MessageError):
        decode_call(body.encode(), {})


def test_a_call_with_such_a_number_goes_to_the_dead_letters_and_the_worker_works_on(
    app: Ekiden, add: Task[[int, int], int]
) -> None:
    bodies = [
        f'{{"v":1,"task":"{add.name}","id":"{field}","sent":1.0,"args":[1,2],"{field}":{number}}}'
        for field, number in (("eta", "1e308"), ("expires", "1e400"), ("time_limit", "1e300"), ("retries", "1e30"))
    ]
    app.transport.publish([Message(new_id(), "default", body.encode()) for body in bodies])

    with app.worker():
        assert add.delay(1, 2).get(PATIENCE) == 3
        eventually(lambda: app.transport.depth("default.dead").ready == len(bodies), what="they are dead letters")


# Tries.


@pytest.mark.parametrize("countdown", NO_SECONDS, ids=named)
def test_a_retrys_countdown_that_cannot_be_fails_its_own_call(
    app: Ekiden, add: Task[[int, int], int], countdown: Any
) -> None:
    @app.task(bind=True)
    def again(self: Any) -> None:
        self.retry(countdown=countdown)

    with app.worker():
        failed = again.delay()
        with pytest.raises(ConfigurationError, match="countdown of a retry"):
            failed.get(PATIENCE)
        assert add.delay(1, 2).get(PATIENCE) == 3


@pytest.mark.parametrize("when", [*NO_SECONDS, TOO_FAR, None], ids=named)
def test_a_retry_that_a_body_makes_itself_is_bounded_too(app: Ekiden, add: Task[[int, int], int], when: Any) -> None:
    @app.task
    def again() -> None:
        raise Retry(when=when)

    with app.worker():
        failed = again.delay()
        with pytest.raises(ConfigurationError, match="of a retry"):
            failed.get(PATIENCE)
        assert add.delay(1, 2).get(PATIENCE) == 3


def test_a_retrys_eta_is_bounded_and_may_be_past(app: Ekiden) -> None:
    @app.task(bind=True)
    def far(self: Any) -> None:
        self.retry(eta=TOO_FAR)

    @app.task(bind=True)
    def past(self: Any) -> int:
        if self.request.retries == 0:
            self.retry(eta=datetime(1, 1, 1, tzinfo=UTC))
        return int(self.request.retries)

    with app.worker():
        with pytest.raises(ConfigurationError, match="eta of a retry"):
            far.delay().get(PATIENCE)
        assert past.delay().get(PATIENCE) == 1


@pytest.mark.parametrize("most", [math.nan, "3", True, 3.0], ids=named)
def test_a_retrys_number_of_tries_is_a_whole_number(app: Ekiden, most: Any) -> None:
    @app.task(bind=True)
    def again(self: Any) -> None:
        self.retry(countdown=0, max_retries=most)

    with app.worker(), pytest.raises(MisuseError, match="max_retries"):
        again.delay().get(PATIENCE)


@pytest.mark.parametrize("due", ["1e308", "1e400", "-1", "null", '"soon"'])
def test_an_outcome_out_of_a_pipe_is_bounded(due: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(f'{{"type":"Retried","due":{due}}}'.encode(), type=Retried)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(f'{{"type":"Postponed","delay":{due},"reason":""}}'.encode(), type=Postponed)


# Declarations and settings.


@pytest.mark.parametrize(
    "option",
    ["default_retry_delay", "retry_backoff", "retry_backoff_max", "time_limit", "soft_time_limit", "expires"],
)
@pytest.mark.parametrize("seconds", [each for each in NO_SETTINGS if each is not True], ids=named)
def test_a_tasks_seconds_are_bounded(option: str, seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match=option):
        declared_options("t", {option: seconds})


@pytest.mark.parametrize("option", ["max_retries", "max_deliveries", "priority"])
@pytest.mark.parametrize("number", [-1, 2**31, 10**400, 1.5, math.nan, True, "5"], ids=named)
def test_a_tasks_numbers_are_bounded(option: str, number: Any) -> None:
    with pytest.raises(ConfigurationError, match=option):
        declared_options("t", {option: number})


@pytest.mark.parametrize(
    "limit",
    [math.nan, math.inf, 0, -1, 10**400, 1e300, 1e-300, True, "nan", "1e5/s", f"{'9' * 400}/s", "0/s", "0.0001/d"],
    ids=named,
)
def test_a_rate_limit_is_bounded(limit: Any) -> None:
    with pytest.raises(ConfigurationError, match="is not a rate limit"):
        rate_per_second(limit)


SECONDS = [
    "task_default_retry_delay",
    "task_time_limit",
    "task_soft_time_limit",
    "task_publish_timeout",
    "unknown_task_grace",
    "lease",
    "result_expires",
    "worker_grace",
    "worker_max_memory_per_process",
]
NUMBERS = [
    "task_max_retries",
    "task_max_deliveries",
    "task_default_priority",
    "result_max_bytes",
    "worker_processes",
    "worker_threads",
    "worker_async_concurrency",
    "worker_prefetch",
    "worker_max_tasks_per_process",
]


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", [*NO_SETTINGS, -1], ids=named)
def test_a_settings_seconds_are_bounded(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        setattr(Settings(), name, value)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, 2**31, 10**400, 1.5, math.nan, True, "5"], ids=named)
def test_a_settings_numbers_are_bounded(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        setattr(Settings(), name, value)


@pytest.mark.parametrize("name", [*SECONDS, *NUMBERS])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400", "1e308", "9" * 400, "true"])
def test_numbers_of_the_environment_are_bounded(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        checked_setting(name, text, from_text=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308, True, "5"], ids=named)
def test_how_a_publish_is_tried_again_is_bounded(value: Any) -> None:
    for name in ("interval_start", "interval_step", "interval_max", "max_retries"):
        with pytest.raises(ConfigurationError, match=name):
            publishing(Settings(), retry=True, retry_policy={name: value})


@pytest.mark.parametrize("option", ["threads", "async_concurrency", "prefetch", "lease", "grace", "max_tasks"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308, 10**400, -1, True, "5"], ids=named)
def test_the_numbers_of_a_worker_are_bounded(app: Ekiden, option: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=option):
        app.worker(**{option: value})


@pytest.mark.parametrize("option", ["--grace", "--lease", "--max-memory-per-process"])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400", "1e308", "-1"])
def test_the_commands_seconds_are_bounded(option: str, text: str) -> None:
    found = CliRunner().invoke(ekiden, ["worker", "shop:app", f"{option}={text}"])

    assert found.exit_code == 2
    assert option in found.output


@pytest.mark.parametrize("option", ["--threads", "--processes", "--prefetch", "--async-concurrency"])
def test_the_commands_numbers_are_bounded(option: str) -> None:
    found = CliRunner().invoke(ekiden, ["worker", "shop:app", f"{option}={'9' * 30}"])

    assert found.exit_code == 2
    assert option in found.output


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400", "9" * 400])
@pytest.mark.parametrize(
    "url",
    [
        "memory://x?max_messages={}",
        "sqlite:///x.db?busy_timeout={}",
        "sqlite:///x.db?max_message_bytes={}",
        "redis://h/?timeout={}",
        "redis://h/?max_message_bytes={}",
        "redis://h/?db={}",
        "amqp://h/?timeout={}",
        "amqp://h/?consumer_timeout={}",
        "amqp://h/?heartbeat={}",
        "amqp://h/?queue_expires={}",
        "mongodb://h/?timeout={}",
        "couchdb://h/?timeout={}",
        "couchdb://h/?q={}",
        "rpc://?max_results={}",
    ],
)
def test_the_numbers_of_a_url_are_finite(url: str, text: str) -> None:
    opened = open_backend if url.startswith("rpc") else open_transport

    with pytest.raises(ConfigurationError):
        opened(url.format(text))


def test_an_option_of_a_url_that_is_no_number_is_named() -> None:
    class Options(msgspec.Struct):
        seconds: float = 1.0

    for text in ("nan", "inf", "1e300"):
        with pytest.raises(ConfigurationError, match="seconds cannot be"):
            parse_url(f"x://h/?seconds={text}").options_as(Options)


# Limits.


def test_a_soft_limit_above_the_hard_one_is_refused_at_declaration(app: Ekiden) -> None:
    with pytest.raises(ConfigurationError, match=r"soft_time_limit=5 is above time_limit=2"):

        @app.task(time_limit=2, soft_time_limit=5)
        def never() -> None: ...

    @app.task(time_limit=2, soft_time_limit=2)
    def equal() -> None: ...

    assert equal.options.soft_time_limit == 2


def test_a_soft_limit_above_the_hard_one_is_refused_at_the_call(app: Ekiden) -> None:
    @app.task(time_limit=10)
    def limited() -> None: ...

    @app.task
    def unlimited() -> None: ...

    for task, options in (
        (unlimited, {"time_limit": 1, "soft_time_limit": 2}),
        (limited, {"soft_time_limit": 20}),
    ):
        with pytest.raises(ConfigurationError, match="is above time_limit"):
            task.apply_async(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="is above time_limit"):
        app.send_task("elsewhere", time_limit=1, soft_time_limit=2)
    with pytest.raises(ConfigurationError, match="is above time_limit"):
        unlimited.apply_async(link=unlimited.si().set(time_limit=1, soft_time_limit=2))
    limited.apply_async(time_limit=30, soft_time_limit=20)
    assert app.transport.depth("default").ready == 1


def test_a_soft_limit_above_the_hard_one_is_refused_as_settings() -> None:
    conf = Settings()
    conf.update(task_soft_time_limit=5, task_time_limit=10)
    with pytest.raises(ConfigurationError, match="is above time_limit=3"):
        conf.task_time_limit = 3
    with pytest.raises(ConfigurationError, match="soft_time_limit=50 is above"):
        conf.update(task_soft_time_limit=50, task_time_limit=20)

    assert (conf.task_soft_time_limit, conf.task_time_limit) == (5, 10)
    conf.update(task_soft_time_limit=50, task_time_limit=100)
    conf.update(task_time_limit=2, task_soft_time_limit=1)
    assert (conf.task_soft_time_limit, conf.task_time_limit) == (1, 2)


def test_a_declared_soft_limit_above_the_settings_hard_one_stops_the_worker(app: Ekiden) -> None:
    app.conf.task_time_limit = 3

    @app.task(soft_time_limit=5)
    def never() -> None: ...

    with pytest.raises(ConfigurationError, match=r"never, with the settings: soft_time_limit=5 is above time_limit=3"):
        app.worker()
    with pytest.raises(ConfigurationError, match="is above time_limit=3"):
        never.apply_async(soft_time_limit=4)


def test_limits_that_are_not_given_are_not_compared() -> None:
    check_limits("x", soft=5, hard=None)
    check_limits("x", soft=None, hard=5)
    check_limits("x", soft=5, hard=5)


# Waits.


def waits(app: Ekiden, connection: Connection) -> dict[str, Callable[[Any], object]]:
    pending = app.AsyncResult(new_id())
    queue, subscription = connection.queue("q"), connection.topic("t").subscribe()
    return {
        "AsyncResult.get": pending.get,
        "AsyncResult.wait": pending.wait,
        "AsyncResult.collect": lambda timeout: next(pending.collect(timeout)),
        "Queue.get": queue.get,
        "Queue.iterate": lambda timeout: next(queue.iterate(timeout=timeout), None),
        "Subscription.receive": subscription.receive,
    }


@pytest.fixture
def connection() -> Iterator[Connection]:
    name = new_id()
    with connect(f"memory://{name}") as connection:
        yield connection
    memory.discard(name)


@pytest.mark.parametrize("timeout", NO_TIMEOUTS, ids=named)
def test_a_timeout_is_a_number(app: Ekiden, connection: Connection, timeout: Any) -> None:
    for wait in waits(app, connection).values():
        with pytest.raises(ConfigurationError, match="timeout cannot be"):
            wait(timeout)


@pytest.mark.parametrize("timeout", [0, -1, -1e308, -math.inf, -(10**400)], ids=named)
def test_a_timeout_below_zero_is_no_wait(app: Ekiden, connection: Connection, timeout: Any) -> None:
    for name, wait in waits(app, connection).items():
        if name.startswith("AsyncResult"):
            with pytest.raises(TimeoutError, match="after 0 s"):
                wait(timeout)
        else:
            assert wait(timeout) is None


@pytest.mark.parametrize("timeout", [None, math.inf, 1e308, 10**400, LONGEST_SECONDS], ids=named)
def test_a_timeout_without_end_is_for_ever(timeout: Any) -> None:
    assert checked_timeout(timeout) in {None, LONGEST_SECONDS}


def test_who_waits_for_ever_gets_it(app: Ekiden, add: Task[[int, int], int], connection: Connection) -> None:
    with app.worker():
        assert add.delay(1, 2).get(math.inf) == 3
    connection.queue("q").put(1)
    item = connection.queue("q").get(math.inf)
    assert item is not None
    assert item.value == 1


@pytest.mark.parametrize("seconds", [*NO_SECONDS, None], ids=named)
def test_the_delays_of_a_queue_are_bounded(connection: Connection, seconds: Any) -> None:
    queue = connection.queue("q")
    for put in (lambda: queue.put(1, delay=seconds), lambda: queue.put_many([1], delay=seconds)):
        with pytest.raises(ConfigurationError, match="delay cannot be"):
            put()
    queue.put(1)
    item = queue.get(PATIENCE)
    assert item is not None
    with pytest.raises(ConfigurationError, match="delay cannot be"):
        item.release(delay=seconds)
    assert item.ack()


@pytest.mark.parametrize("priority", [math.nan, 4.5, True, "5", 10, -1, 10**400], ids=named)
def test_the_priorities_of_a_queue_are_bounded(connection: Connection, priority: Any) -> None:
    with pytest.raises((ConfigurationError, TransportError), match="priorit"):
        connection.queue("q").put(1, priority=priority)


@pytest.mark.parametrize("lease", [*NO_SECONDS, -1, None], ids=named)
def test_the_lease_of_a_connection_is_bounded(lease: Any) -> None:
    with pytest.raises(ConfigurationError, match="lease cannot be"):
        connect(f"memory://{new_id()}", lease=lease)


# What is shown.


def test_times_of_somebody_elses_are_shown_as_far_as_there_are_such(app: Ekiden) -> None:
    result = app.AsyncResult("odd")
    body = encode_outcome(OutcomeRecord(task="t")).replace(b'"task"', b'"done":1e300,"task"')
    app.backend.put([StoredResult("odd", "SUCCESS", 0, body)])

    with pytest.raises(MessageError):
        _ = result.date_done


def test_the_furthest_times_are_shown(add: Task[[int, int], int], app: Ekiden) -> None:
    far = datetime(2999, 12, 31, tzinfo=UTC)
    with pytest.raises(ConfigurationError):
        add.apply_async((1, 2), countdown=LONGEST_SECONDS + timedelta(days=1).total_seconds())
    sent = add.apply_async((1, 2), eta=far, expires=far)
    (seen,) = app.transport.browse("default")

    assert seen.message.id == sent.id
    assert seen.message.due == pytest.approx(far.timestamp())
    assert decode_call(seen.message.body, {}).expires == pytest.approx(far.timestamp())
    assert time.time() < LATEST_TIME
