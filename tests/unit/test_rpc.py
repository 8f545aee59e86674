"""``rpc://`` by itself: what it keeps and for how long, whom it wakes, and what it refuses."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from ekiden import Ekiden, Task, memory
from ekiden.codec import encode_call
from ekiden.control import MOST_REVOCATIONS_HEARD, REVOCATION_KEPT_SECONDS, HeardRevocations, Revocation
from ekiden.doctor import examine
from ekiden.errors import (
    BackendError,
    BrokerRefused,
    BrokerUnavailable,
    ConfigurationError,
    MessageError,
    NewerFormat,
    TransportClosed,
    UnknownResult,
)
from ekiden.explain import explain
from ekiden.message import Delivery, Ending, Message, Settled, derived_id, new_id
from ekiden.options import NOTHING_SAID, Publishing, PublishRetryPolicy
from ekiden.plan import WorkerOptions
from ekiden.plugins import open_backend
from ekiden.publisher import Publisher
from ekiden.replies import REPLY_TO_HEADER, read_reply, reply_message, reply_queue, wanted_results
from ekiden.results import StoredResult
from ekiden.rpc import RpcBackend
from ekiden.settings import Settings
from ekiden.signature import Call, Step
from ekiden.task import compose
from ekiden.testing.conformance.pace import assert_quick
from ekiden.worker import Worker

from tests.working import PATIENCE, eventually, the_message


@pytest.fixture
def broker_url() -> Iterator[str]:
    name = new_id()
    yield f"memory://{name}"
    memory.discard(name)


@pytest.fixture
def app(broker_url: str) -> Iterator[Ekiden]:
    with Ekiden("rpc", broker=broker_url, backend="rpc://") as app:
        yield app


@pytest.fixture
def small(broker_url: str) -> Iterator[Ekiden]:
    """Keeps three results, and a thousand bytes."""
    with Ekiden("rpc", broker=broker_url, backend="rpc://?max_results=3&max_bytes=1000") as app:
        yield app


def expect(app: Ekiden, *ids: str) -> str:
    queue = app.backend.expect(ids, app.opened_transport)
    assert queue is not None
    return queue


def answer(app: Ekiden, task_id: str, *, size: int = 20, expires: float | None = None, state: str = "SUCCESS") -> None:
    """Have a reply of ``size`` bytes arrive, and wait until it is there."""
    body = b'{"v":1,"value":"' + b"x" * (size - 18) + b'"}'
    app.transport.publish([reply_message([StoredResult(task_id, state, 0, body, expires)], expect(app), new_id())])
    eventually(lambda: not app.transport.depth(expect(app)).ready, what="it is received")


def is_known(app: Ekiden, task_id: str) -> bool:
    try:
        app.backend.get([task_id])
    except UnknownResult:
        return False
    return True


# What is kept.


def test_no_more_is_kept_than_the_options_say(small: Ekiden) -> None:
    expect(small, "a", "b", "c")

    expect(small, "d", "e")

    assert [is_known(small, each) for each in "abcde"] == [False, False, True, True, True]


def test_what_has_been_answered_goes_before_what_is_awaited(small: Ekiden) -> None:
    expect(small, "a", "b", "c")
    answer(small, "b")
    small.backend.wait(["b"], PATIENCE)

    expect(small, "d")

    assert [is_known(small, each) for each in "abcd"] == [True, False, True, True]


def test_fresh_answers_stay_while_old_calls_are_never_answered(small: Ekiden) -> None:
    expect(small, "never-1", "never-2", "never-3")

    for number in range(3):
        expect(small, f"fresh-{number}")
        answer(small, f"fresh-{number}")

    assert [is_known(small, f"fresh-{number}") for number in range(3)] == [True, True, True]
    assert [is_known(small, f"never-{number}") for number in (1, 2, 3)] == [False, False, False]


def test_what_was_fetched_goes_before_what_was_not(small: Ekiden) -> None:
    expect(small, "a", "b", "c")
    for each in "abc":
        answer(small, each)
    assert small.AsyncResult("c").get(PATIENCE) == "xx"

    expect(small, "d")

    assert [is_known(small, each) for each in "abcd"] == [True, True, False, True]


def test_how_far_tasks_have_come_is_bounded_too(small: Ekiden) -> None:
    expect(small, "a", "b", "c")
    for each in "abc":
        answer(small, each, size=600, state="PROGRESS")

    told = [None if found is None else found.state for found in small.backend.get(["a", "b", "c"])]
    assert told == [None, None, "PROGRESS"]
    answer(small, "a")
    assert [found.state for found in small.backend.wait(["a"], PATIENCE)] == ["SUCCESS"]


def test_no_more_bytes_are_kept_than_the_options_say(small: Ekiden, caplog: pytest.LogCaptureFixture) -> None:
    expect(small, "a", "b", "c")
    for each in "abc":
        answer(small, each, size=600)
    small.backend.wait(["c"], PATIENCE)

    assert [is_known(small, each) for each in "abc"] == [False, False, True]
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "ekiden.rpc"]
    assert "dropped before anybody fetched them" in warning
    with pytest.raises(UnknownResult, match="to make room as it did with 2"):
        small.backend.get(["a"])


def test_one_result_is_kept_however_large(small: Ekiden) -> None:
    expect(small, "a")

    answer(small, "a", size=5000)

    assert len(small.backend.wait(["a"], PATIENCE)[0].body) == 5000


def test_progress_counts_until_it_is_replaced(small: Ekiden) -> None:
    expect(small, "a", "b")
    answer(small, "a", size=900, state="PROGRESS")
    answer(small, "a", size=30, state="PROGRESS")
    answer(small, "b", size=800)
    answer(small, "a", size=30)

    assert [each.state for each in small.backend.wait(["a"], PATIENCE)] == ["SUCCESS"]
    assert is_known(small, "b")


def test_results_end_by_themselves_and_awaited_ones_do_not(app: Ekiden) -> None:
    expect(app, "kept", "short", "awaited")
    answer(app, "kept", expires=1000.0)
    answer(app, "short", expires=0.05)

    eventually(lambda: not is_known(app, "short"), what="it ends")
    assert app.backend.get(["awaited"]) == [None]
    assert is_known(app, "kept")


def test_who_waits_for_what_is_dropped_is_told(small: Ekiden) -> None:
    expect(small, "a")
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            small.AsyncResult("a").get(PATIENCE)
        except UnknownResult as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    eventually(lambda: len(small.backend._waits) == 1, what="it waits")  # type: ignore[attr-defined]
    expect(small, "b", "c", "d")
    thread.join(PATIENCE)

    assert raised


def test_others_go_on_awaiting_when_one_is_dropped(small: Ekiden) -> None:
    async def both() -> list[Any]:
        first, second = (asyncio.ensure_future(wait(each)) for each in ("a", "b"))
        await asyncio.sleep(0)
        while len(small.backend._waits) < 1:  # type: ignore[attr-defined]
            await asyncio.sleep(0.005)
        expect(small, "c", "d")
        error = (await asyncio.gather(first, return_exceptions=True))[0]
        await asyncio.to_thread(answer, small, "b")
        return [error, await second]

    async def wait(task_id: str) -> Any:
        return await small.AsyncResult(task_id)

    expect(small, "a", "b")
    error, value = asyncio.run(both())

    assert isinstance(error, UnknownResult)
    assert value == "xx"


def test_bad_options_are_named() -> None:
    with pytest.raises(ConfigurationError, match="max_result"):
        Ekiden("rpc", broker="memory://", backend="rpc://?max_result=3").opened_backend()
    with pytest.raises(ConfigurationError, match="max_results"):
        open_backend("rpc://?max_results=0")


# The thread.


class Away:
    """A consumer of the reply queue that fails as it is told to."""

    def __init__(self, consumer: Any, errors: list[Exception]) -> None:
        self._consumer = consumer
        self._errors = errors

    def receive(self, limit: int, timeout: float) -> list[Delivery]:
        if self._errors:
            raise self._errors.pop(0)
        found: list[Delivery] = self._consumer.receive(limit, timeout)
        return found

    def settle(self, endings: list[Ending]) -> list[Settled]:
        found: list[Settled] = self._consumer.settle(endings)
        return found

    def stop(self) -> None:
        self._consumer.stop()

    def close(self) -> None:
        self._consumer.close()


class TroubledApp(Ekiden):
    """Its transport's consumers raise ``errors`` first, and ``refusals`` are raised instead of making one."""

    def __init__(self, broker: str) -> None:
        super().__init__("troubled", broker=broker, backend="rpc://")
        self.errors: list[Exception] = []
        self.refusals: list[Exception] = []
        self.held_up: threading.Event | None = None
        """Nothing is opened before it is set."""

    def opened_transport(self) -> Any:
        transport = super().opened_transport()
        consumer = type(transport).consumer

        def make(*args: Any, **options: Any) -> Any:
            if self.held_up is not None:
                assert self.held_up.wait(PATIENCE)
            if self.refusals:
                raise self.refusals.pop(0)
            return Away(consumer(transport, *args, **options), self.errors)

        transport.consumer = make  # type: ignore[method-assign]
        return transport


@pytest.fixture
def troubled(broker_url: str) -> Iterator[TroubledApp]:
    with TroubledApp(broker_url) as app:
        yield app


def test_the_broker_may_be_away_for_a_while(troubled: TroubledApp, caplog: pytest.LogCaptureFixture) -> None:
    troubled.errors += [BrokerUnavailable("away")] * 2
    expect(troubled, "a")

    answer(troubled, "a")

    assert troubled.backend.wait(["a"], PATIENCE)
    assert [record.getMessage() for record in caplog.records if record.name == "ekiden.rpc"] == [
        "no replies can be received; tried again in 0.1 s: away",
        "no replies can be received; tried again in 0.2 s: away",
    ]


@pytest.mark.parametrize("error", [TransportClosed("closed elsewhere"), RuntimeError("a bug")])
def test_what_ends_the_thread_is_told_to_who_waits_and_another_one_begins(
    troubled: TroubledApp, error: Exception
) -> None:
    expect(troubled, "a")
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(troubled.backend.wait, ["a"], PATIENCE)
        troubled.errors.append(error)
        troubled.transport.publish([reply_message([], expect(troubled), new_id())])  # the thread receives once more

        with pytest.raises(BackendError, match="Ask again") as told:
            waiting.result(PATIENCE)

    assert told.value.__cause__ is error
    answer(troubled, "a")
    assert [result.task_id for result in troubled.backend.wait(["a"], PATIENCE)] == ["a"]


def test_who_waits_starts_the_thread_as_well(troubled: TroubledApp) -> None:
    queue = expect(troubled, "a")
    troubled.errors.append(RuntimeError("a bug"))
    troubled.transport.publish([reply_message([], queue, new_id())])
    eventually(lambda: not [each for each in threading.enumerate() if each.name == "ekiden-replies"], what="it ended")

    body = b'{"v":1,"value":1}'
    troubled.transport.publish([reply_message([StoredResult("a", "SUCCESS", 0, body, None)], queue, new_id())])

    assert [result.task_id for result in troubled.backend.wait(["a"], PATIENCE)] == ["a"]


def test_opening_the_reply_queue_is_tried_again_like_publishing(troubled: TroubledApp) -> None:
    troubled.refusals += [BrokerUnavailable("away")] * 3

    result = troubled.send_task("nobody.serves.it")

    assert result.state == "PENDING"
    assert reply_queue(the_message(troubled).message.headers) == expect(troubled)


def test_opening_the_reply_queue_ends_with_the_publish_timeout(troubled: TroubledApp) -> None:
    troubled.held_up = threading.Event()

    with pytest.raises(BrokerUnavailable, match="no reply queue could be opened"):
        troubled.send_task("nobody.serves.it", publish_timeout=0.1)

    assert troubled.transport.depth("default").ready == 0
    troubled.held_up.set()
    troubled.send_task("nobody.serves.it")
    assert troubled.transport.depth("default").ready == 1


def test_async_callers_wait_no_longer_for_the_reply_queue(troubled: TroubledApp) -> None:
    troubled.held_up = threading.Event()

    @troubled.task
    def add(x: int, y: int) -> int:
        return x + y

    with pytest.raises(BrokerUnavailable, match="no reply queue could be opened"):
        asyncio.run(add.aapply_async((1, 2), publish_timeout=0.1))

    troubled.held_up.set()
    asyncio.run(add.adelay(1, 2))
    assert troubled.transport.depth("default").ready == 1


def test_a_call_that_cannot_be_answered_is_not_sent(troubled: TroubledApp) -> None:
    troubled.refusals += [BrokerUnavailable("away")] * 3

    with pytest.raises(BrokerUnavailable, match="away"):
        troubled.send_task("nobody.serves.it", retry=False)

    assert troubled.transport.depth("default").ready == 0


def test_persisting_ends_with_the_publish_timeout() -> None:
    def fail(_: float) -> None:
        raise BrokerUnavailable("away")

    publisher = Publisher(lambda: pytest.fail("not asked"))
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        publisher.persist(fail, Publishing(0.2, PublishRetryPolicy()), began + 0.2)
    assert_quick(time.monotonic() - began, 0.2)

    once_more = PublishRetryPolicy(max_retries=1, interval_start=0.0)
    with pytest.raises(BrokerUnavailable):
        publisher.persist(fail, Publishing(10.0, once_more), time.monotonic() + 10.0)


def test_an_app_that_was_closed_opens_anew(app: Ekiden) -> None:
    queue = expect(app, "a")

    app.close()

    assert expect(app, "b") != queue
    assert not is_known(app, "a")


def test_a_backend_that_was_closed_is_refused() -> None:
    backend = open_backend("rpc://")
    backend.close()
    backend.close()

    with pytest.raises(BackendError, match="was closed here"):
        backend.wait(["a"], 1.0)
    with pytest.raises(BackendError, match="was closed here"):
        backend.expect(["a"], lambda: pytest.fail("not asked"))


# What is sent.


def test_a_message_names_the_reply_queue_only_where_a_result_is_wanted(app: Ekiden) -> None:
    @app.task(name="silent", ignore_result=True, queue="q")
    def silent() -> None: ...

    @app.task(name="heard", queue="q")
    def heard() -> None: ...

    silent.delay()
    silent.apply_async(ignore_result=False)
    heard.delay()
    heard.apply_async(ignore_result=True)
    silent.apply_async(link=heard.s())
    app.conf.task_ignore_result = True
    heard.delay()
    app.send_task("unknown", queue="q")

    sent = [seen.message for seen in app.transport.browse("q")]
    assert [REPLY_TO_HEADER in message.headers for message in sent] == [False, True, True, False, True, False, False]


def test_who_ignores_all_results_opens_no_reply_queue(app: Ekiden) -> None:
    app.send_task("unknown", ignore_result=True)

    assert "ekiden-replies" not in {thread.name for thread in threading.enumerate()}


def test_where_results_are_stored_nothing_is_replied(broker_url: str) -> None:
    with Ekiden("stores", broker=broker_url) as app:
        app.send_task("unknown")

        assert the_message(app).message.headers == {}
        assert app.backend.expect(["a"], app.opened_transport) is None


def test_a_users_headers_stay(app: Ekiden) -> None:
    app.send_task("unknown", headers={"trace": "1"})

    assert the_message(app).message.headers == {"trace": "1", REPLY_TO_HEADER: expect(app)}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("reply.abc", "reply.abc"),
        ("orders", None),
        ("reply." + "x" * 195, None),
        ("reply.\n", None),
        (None, None),
        (7, None),
    ],
)
def test_only_a_reply_queue_is_replied_to(value: Any, found: str | None) -> None:
    assert reply_queue({REPLY_TO_HEADER: value}) == found


def test_whose_results_a_call_brings() -> None:
    call = Call(
        task="a",
        id="root",
        sent=0.0,
        on_success=(Step("b", on_success=(Step("c"),), on_error=(Step("d", task_id="mine"),)), Step("e")),
        on_error=(Step("f", ignore_result=True, on_success=(Step("g"),)),),
    )
    b, f = derived_id("root", "success 0"), derived_id("root", "error 0")

    assert wanted_results(encode_call(call), ignored_by_default=False) == [
        "root",
        b,
        derived_id(b, "success 0"),
        "mine",
        derived_id("root", "success 1"),
        derived_id(f, "success 0"),
    ]
    assert "root" not in wanted_results(encode_call(call), ignored_by_default=True)
    explicit = msgspec.structs.replace(call, ignore_result=False)
    assert "root" in wanted_results(encode_call(explicit), ignored_by_default=True)


def test_a_reply_is_read_as_it_was_written() -> None:
    results = [
        StoredResult("a", "SUCCESS", 3, b'{"v":1,"value":[1,2]}', 86400.0),
        StoredResult("b", "COMPILING", 0, b'{"v":1}', None),
    ]

    message = reply_message(results, "reply.x", "id")

    assert (message.queue, message.id, read_reply(message.body)) == ("reply.x", "id", results)


@pytest.mark.parametrize(
    ("body", "error"),
    [(b"", MessageError), (b"[]", MessageError), (b'{"v":1}', MessageError), (b'{"v":2}', NewerFormat)],
)
def test_what_is_no_reply_is_said(body: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        read_reply(body)


def test_the_format_of_a_reply_stays() -> None:
    body = (
        b'{"v":1,"results":[{"id":"a","state":"SUCCESS","step":0,"outcome":{"v":1,"value":3},"expires":60.0},'
        b'{"id":"b","state":"RETRY","step":1,"outcome":{"v":1}}]}'
    )

    assert read_reply(body) == [
        StoredResult("a", "SUCCESS", 0, b'{"v":1,"value":3}', 60.0),
        StoredResult("b", "RETRY", 1, b'{"v":1}'),
    ]
    assert reply_message(read_reply(body), "reply.x", "id").body == body


@pytest.mark.parametrize("acks", ["late", "early"])
def test_many_results_for_one_caller_come_in_few_messages(app: Ekiden, acks: Any) -> None:
    @app.task(name="echo", acks=acks)
    def echo(number: int) -> int:
        return number

    app.backend.expect([], app.opened_transport)
    arrived: list[int] = []
    take = app.backend._take  # type: ignore[attr-defined]

    def counted(deliveries: list[Delivery]) -> None:
        arrived.append(len(deliveries))
        take(deliveries)

    app.backend._take = counted  # type: ignore[attr-defined]
    results = echo.enqueue_many([(number,) for number in range(1000)])
    with app.worker(threads=4):
        assert [result.get(PATIENCE) for result in results] == list(range(1000))

    if acks == "late":
        assert sum(arrived) < 500


def test_small_and_large_results_come_beside_each_other(broker_url: str) -> None:
    with Ekiden("rpc", broker=f"{broker_url}?max_message_bytes=9000", backend="rpc://") as app:

        @app.task(name="letters")
        def letters(number: int) -> str:
            return "x" * number

        sizes = [1, 1500, 3000, 8000] * 50
        results = letters.enqueue_many([(size,) for size in sizes])
        with app.worker(threads=2):
            assert [len(result.get(PATIENCE)) for result in results] == sizes


def test_a_reply_that_the_broker_refuses_is_a_failure_that_the_caller_hears_of(broker_url: str) -> None:
    with Ekiden("rpc", broker=f"{broker_url}?max_message_bytes=3000", backend="rpc://") as app:

        @app.task(name="large")
        def large() -> str:
            return "x" * 5000

        with app.worker(threads=1), pytest.raises(BrokerRefused, match="max_message_bytes is 3000"):
            large.delay().get(PATIENCE)

        assert app.transport.depth("default.dead").ready == 1


def test_progress_that_the_broker_refuses_is_raised_in_the_body(broker_url: str) -> None:
    with Ekiden("rpc", broker=f"{broker_url}?max_message_bytes=3000", backend="rpc://") as app:

        @app.task(name="tell", bind=True)
        def tell(self: Any) -> str:
            with pytest.raises(BrokerRefused, match="max_message_bytes is 3000"):
                self.update_state(meta="x" * 5000)
            return "went on"

        with app.worker(threads=1):
            assert tell.delay().get(PATIENCE) == "went on"


def test_progress_of_another_task_is_told_where_results_are_stored_only(app: Ekiden) -> None:
    @app.task(name="tell", bind=True)
    def tell(self: Any, other: str) -> None:
        self.update_state(task_id=other, meta="halfway")

    with app.worker(threads=1):
        other = app.send_task("unserved", queue="unserved")
        tell.delay(other.id).get(PATIENCE)

        assert other.state == "PENDING"


# What workers remember.


def test_a_worker_remembers_so_many_revocations_and_no_more() -> None:
    heard = HeardRevocations()
    heard.add(["first"], Revocation(100.0))
    heard.add([f"task-{number}" for number in range(MOST_REVOCATIONS_HEARD - 1)], Revocation(100.0, terminate=True))
    assert "first" in heard.by_id

    heard.add(["last"], Revocation(200.0))

    assert len(heard.by_id) == MOST_REVOCATIONS_HEARD
    assert heard.of(["first", "task-0", "last"], 200.0) == {
        "task-0": Revocation(100.0, terminate=True),
        "last": Revocation(200.0),
    }
    assert heard.of(["task-0", "last"], 150.0 + REVOCATION_KEPT_SECONDS) == {"last": Revocation(200.0)}


def test_thousands_are_revoked_at_once(app: Ekiden) -> None:
    ran: list[int] = []

    @app.task(name="note")
    def note(number: int) -> None:
        ran.append(number)

    results = note.enqueue_many([(number,) for number in range(1200)], countdown=2.0)
    with app.worker(threads=2):
        app.revoke([result.id for result in results[:-1]])
        results[-1].get(PATIENCE)
        eventually(lambda: all(each.state in {"REVOKED", "SUCCESS"} for each in results), what="all have ended")

    assert ran == [1199]


# What is said of it.


def test_a_worker_says_which_limits_do_not_hold_for_all(app: Ekiden) -> None:
    @app.task(name="limited", rate_limit="10/s")
    def limited() -> None: ...

    (warning,) = Worker(app, WorkerOptions()).warnings()

    assert "rate limits hold for each worker process by itself" in warning
    assert "limited" in warning


def test_a_worker_says_which_tasks_the_broker_will_not_wait_for(broker_url: str) -> None:
    class Impatient(memory.MemoryTransport):
        longest_hold = 1800.0

    app = Ekiden("impatient", broker=broker_url)
    app.adopt(Impatient(app.broker_url()), app.backend)

    @app.task(name="long")
    async def long() -> None: ...

    @app.task(name="longer", time_limit=3600)
    async def longer() -> None: ...

    @app.task(name="short", time_limit=60)
    async def short() -> None: ...

    with app:
        (warning,) = Worker(app, WorkerOptions()).warnings()
        findings = [each for each in examine(app) if each.level == "warning" and "takes back" in each.text]

    assert warning.endswith("the time_limit is longer of longer")
    assert [each.text for each in findings if each.check == "worker"] == [warning]
    assert [each.text.rpartition(": ")[2] for each in findings if each.check == "limits"] == ["long"]


def test_doctor_says_who_can_ask(app: Ekiden) -> None:
    @app.task
    def one() -> None: ...

    findings = {finding.check: finding for finding in examine(app)}

    assert findings["results"].level == "ok"
    assert "to the process that sent the call" in findings["results"].text


def test_explain_tells_of_the_reply(app: Ekiden) -> None:
    @app.task(name="one")
    def one() -> None: ...

    found = explain(app, one)
    names = [step.name for step in found.steps]

    assert {fact.name: fact.value for fact in found.facts}["results"] == "rpc://"
    assert names.index("RpcBackend.expect") < names.index("MemoryTransport.publish")
    assert names.index("reply_message") < names.index("MemoryConsumer.settle") < names.index("RpcBackend.wait")


def test_explain_of_one_app_leaves_nothing_for_the_next(app: Ekiden, broker_url: str) -> None:
    def steps(of: Ekiden) -> list[str]:
        task: Task[..., Any] = of.task(name="one")(lambda: None)
        return [step.name for step in explain(of, task).steps]

    with Ekiden("stores", broker=broker_url) as stores:
        before = steps(stores)
        steps(app)

        assert steps(Ekiden("stores", broker=broker_url)) == before
    assert "RpcBackend.expect" not in before


def test_a_broker_that_stores_nothing_has_rpc_without_another_word() -> None:
    pytest.importorskip("ekiden_rabbitmq", exc_type=ImportError)

    app = Ekiden("shop", broker="amqp://guest:guest@127.0.0.1:5672")

    assert str(app.backend_url()) == "rpc://"
    assert not app.stores_results()
    assert isinstance(app.backend, RpcBackend)
    app.close()


def test_the_outcome_of_a_call_is_composed_without_a_reply_queue() -> None:
    message = compose(Settings(), "one", None, args=(), kwargs={}, options=NOTHING_SAID)

    assert isinstance(message, Message)
    assert message.headers == {}
