"""``rpc://`` brings results back over every transport."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ekiden import Ekiden, memory
from ekiden.errors import (
    BrokerUnavailable,
    ConfigurationError,
    MisuseError,
    ResultTimeout,
    TaskExpired,
    TaskRevoked,
    UnknownResult,
)
from ekiden.message import Message, new_id
from ekiden.options import NOTHING_SAID
from ekiden.replies import REPLY_TO_HEADER, reply_message
from ekiden.results import StoredResult
from ekiden.task import compose
from ekiden.urls import parse_url

from tests.servers.processes import ServerProcess
from tests.working import PATIENCE, Gate, eventually

APPS = Path(__file__).parents[1] / "apps"
FAR = 30.0
"""Seconds for what starts processes."""


class RpcConformance:
    """Subclass it with a ``url`` fixture: a broker that is the test's own."""

    @pytest.fixture
    def shop(self, url: str) -> Iterator[Ekiden]:
        """The worker's app."""
        with Ekiden("shop", broker=url, backend="rpc://") as app:
            declare(app)
            yield app

    @pytest.fixture
    def caller(self, url: str) -> Iterator[Ekiden]:
        """An app that knows no task: with a transport and a reply queue of its own."""
        with Ekiden("caller", broker=url, backend="rpc://") as app:
            yield app

    @pytest.fixture
    def worker(self, shop: Ekiden) -> Iterator[None]:
        with shop.worker(threads=4):
            yield

    # What comes back.

    @pytest.mark.usefixtures("worker")
    def test_a_result_comes_back(self, caller: Ekiden) -> None:
        result = caller.send_task("add", (1, 2))

        assert result.get(PATIENCE) == 3
        assert (result.state, result.name, result.retries, result.successful()) == ("SUCCESS", "add", 0, True)
        assert caller.AsyncResult(result.id).get(PATIENCE) == 3

    @pytest.mark.usefixtures("worker")
    def test_a_failure_comes_back_with_its_traceback(self, caller: Ekiden) -> None:
        result = caller.send_task("fail", ("no",))

        with pytest.raises(ValueError, match="no") as raised:
            result.get(PATIENCE)

        assert "In the worker:" in raised.value.__notes__[0]
        assert result.state == "FAILURE"
        assert "def fail" not in (result.traceback or "")

    @pytest.mark.usefixtures("worker")
    def test_the_last_try_is_what_a_caller_gets(self, caller: Ekiden) -> None:
        result = caller.send_task("third_time", ("x",))

        assert result.get(PATIENCE) == "x"
        assert result.retries == 2

    @pytest.mark.usefixtures("worker")
    def test_a_retry_is_seen_meanwhile(self, caller: Ekiden) -> None:
        result = caller.send_task("retry_later")

        eventually(lambda: result.state == "RETRY", what="RETRY is seen")

        assert isinstance(result.info, ValueError)

    @pytest.mark.usefixtures("worker")
    def test_what_is_linked_comes_back_to_who_sent_the_first_call(self, shop: Ekiden) -> None:
        add = shop.find_task("add")
        assert add is not None

        result = add.apply_async((1, 2), link=add.s(10).link(add.s(100)))

        assert result.get(PATIENCE) == 3
        assert [each.get(PATIENCE) for each, _ in result.collect(PATIENCE)] == [3, 13, 113]

    @pytest.mark.usefixtures("worker")
    def test_what_is_linked_to_an_error_comes_back_under_its_own_id(self, shop: Ekiden) -> None:
        fail, echo = shop.find_task("fail"), shop.find_task("echo")
        assert fail is not None
        assert echo is not None

        result = fail.apply_async(("no",), link_error=echo.s().set(task_id="sorry"))

        assert shop.AsyncResult("sorry").get(PATIENCE) == result.id

    def test_what_starts_and_tells_how_far_it_is_is_seen(self, shop: Ekiden, caller: Ekiden) -> None:
        gates = {name: Gate() for name in ("started", "halfway")}

        @shop.task(name="slow", bind=True, track_started=True)
        def slow(self: Any) -> str:
            gates["started"].pass_through()
            self.update_state(state="HALFWAY", meta={"percent": 50})
            gates["halfway"].pass_through()
            return "done"

        with shop.worker(threads=1):
            result = caller.send_task("slow")
            eventually(lambda: result.state == "STARTED", what="STARTED is seen")
            gates["started"].open.set()
            eventually(lambda: result.state == "HALFWAY", what="its own state is seen")
            assert result.info == {"percent": 50}
            gates["halfway"].open.set()
            assert result.get(PATIENCE) == "done"

    @pytest.mark.usefixtures("worker")
    def test_many_results_at_once(self, shop: Ekiden) -> None:
        echo = shop.find_task("echo")
        assert echo is not None

        results = echo.enqueue_many([(number,) for number in range(1000)])

        assert [result.get(FAR) for result in results] == list(range(1000))

    @pytest.mark.usefixtures("worker")
    def test_forty_threads_wait(self, caller: Ekiden) -> None:
        with ThreadPoolExecutor(40) as threads:
            found = threads.map(lambda number: caller.send_task("add", (number, 1)).get(FAR), range(200))

            assert list(found) == [number + 1 for number in range(200)]

    @pytest.mark.usefixtures("worker")
    def test_awaiting(self, shop: Ekiden) -> None:
        echo = shop.find_task("echo")
        assert echo is not None

        async def one(number: int) -> Any:
            return await (await echo.adelay(number))

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*(one(number) for number in range(100)))

        assert asyncio.run(all_of_them()) == list(range(100))

    @pytest.mark.usefixtures("worker")
    def test_a_callback_is_called(self, caller: Ekiden) -> None:
        called = threading.Event()

        caller.send_task("add", (1, 2)).then(lambda _: called.set())

        assert called.wait(PATIENCE)

    @pytest.mark.usefixtures("worker")
    def test_a_task_may_wait_for_one_that_it_sent(self, shop: Ekiden, caller: Ekiden) -> None:
        @shop.task(name="outer")
        def outer(number: int) -> Any:
            add = shop.find_task("add")
            assert add is not None
            return add.delay(number, 1).get(PATIENCE, allow_join=True)

        result = caller.send_task("outer", (1,))

        assert result.get(PATIENCE) == 2
        (child,) = result.children
        with pytest.raises(UnknownResult, match="to the process that sent the call"):
            child.get(PATIENCE)

    # What does not.

    def test_an_answer_may_come_after_the_caller_gave_up(self, shop: Ekiden, caller: Ekiden) -> None:
        result = caller.send_task("add", (1, 2))
        with pytest.raises(ResultTimeout, match=r"is PENDING and goes on.*reply was lost"):
            result.get(0.05)

        with shop.worker(threads=1):
            assert result.get(PATIENCE) == 3

    def test_states_never_move_back(self, caller: Ekiden) -> None:
        result, queue = expected(caller)

        for state, step, value in (
            ("RETRY", 1, b"1"),
            ("STARTED", 1, b"2"),
            ("RETRY", 0, b"3"),
            ("STARTED", 2, b"4"),
            ("SUCCESS", 2, b"5"),
            ("SUCCESS", 2, b"6"),
            ("FAILURE", 2, b"7"),
            ("STARTED", 3, b"8"),
        ):
            tell(caller, queue, a_result(result.id, state, step, value))
        other, _ = expected(caller)
        tell(caller, queue, a_result(other.id, "SUCCESS", 0, b"9"))

        assert other.get(PATIENCE) == 9  # what was told before has arrived, too
        assert (result.state, result.get(PATIENCE)) == ("SUCCESS", 5)

    def test_what_is_no_reply_is_passed_over(self, caller: Ekiden) -> None:
        result, queue = expected(caller)

        caller.transport.publish([Message(new_id(), queue, body) for body in (b"", b"{}", b"\xff", b'{"v":9}')])
        tell(caller, queue, a_result("nobody-asked", "SUCCESS", 0, b"1"))
        tell(caller, queue, a_result(result.id, "SUCCESS", 0, b"2"))

        assert result.get(PATIENCE) == 2
        with pytest.raises(UnknownResult):
            caller.backend.get(["nobody-asked"])

    @pytest.mark.usefixtures("worker")
    def test_a_reply_queue_that_is_gone_holds_up_nothing(self, shop: Ekiden, caller: Ekiden) -> None:
        messages = [
            compose(shop.conf, "third_time", None, args=(number,), kwargs={}, options=NOTHING_SAID)
            for number in range(3)
        ]
        gone = {REPLY_TO_HEADER: f"reply.{new_id()}"}

        caller.transport.publish([Message(each.id, each.queue, each.body, gone, each.priority) for each in messages])

        eventually(lambda: shop.done.count("third_time") == 3, what="all are worked off")  # type: ignore[attr-defined]
        assert caller.send_task("add", (1, 2)).get(PATIENCE) == 3

    @pytest.mark.parametrize("queue", ["default", 7, "reply." + "x" * 300, None])
    @pytest.mark.usefixtures("worker")
    @pytest.mark.slow
    def test_a_message_cannot_have_its_outcome_sent_anywhere_else(
        self, shop: Ekiden, caller: Ekiden, queue: Any
    ) -> None:
        message = compose(shop.conf, "count", None, args=(), kwargs={}, options=NOTHING_SAID)

        caller.transport.publish([Message(message.id, "default", message.body, {REPLY_TO_HEADER: queue})])

        eventually(lambda: shop.done == ["count"], what="it is worked off")  # type: ignore[attr-defined]
        assert caller.send_task("add", (1, 2)).get(PATIENCE) == 3
        assert shop.done == ["count"]  # type: ignore[attr-defined]

    def test_an_id_that_this_process_has_not_sent_is_refused_at_once(self, shop: Ekiden, caller: Ekiden) -> None:
        result = shop.send_task("add", (1, 2))
        elsewhere = caller.AsyncResult(result.id)
        began = time.monotonic()

        async def wait() -> Any:
            return await elsewhere

        asks: list[Callable[[], Any]] = [
            lambda: elsewhere.get(PATIENCE),
            lambda: elsewhere.state,
            elsewhere.ready,
            lambda: elsewhere.result,
            lambda: elsewhere.then(print),
            lambda: asyncio.run(wait()),
        ]
        for ask in asks:
            with pytest.raises(UnknownResult, match=f"{result.id}.*This one did not send it.*set result_backend"):
                ask()

        assert time.monotonic() - began < PATIENCE

    @pytest.mark.usefixtures("worker")
    def test_a_call_that_ignores_its_result_gets_none(self, shop: Ekiden, caller: Ekiden) -> None:
        result = caller.send_task("count", ignore_result=True)

        eventually(lambda: shop.done == ["count"], what="it is worked off")  # type: ignore[attr-defined]
        assert result.get(PATIENCE) is None
        with pytest.raises(UnknownResult, match="ignore_result"):
            caller.AsyncResult(result.id).get(PATIENCE)

    @pytest.mark.usefixtures("worker")
    def test_results_are_kept_for_as_long_as_the_worker_says(self, shop: Ekiden, caller: Ekiden) -> None:
        shop.conf.result_expires = 0.1
        result = caller.send_task("add", (1, 2))

        def is_refused() -> bool:
            try:
                return caller.AsyncResult(result.id).state not in {"PENDING", "SUCCESS"}
            except UnknownResult:
                return True

        eventually(is_refused, what="it has expired")

    @pytest.mark.usefixtures("worker")
    def test_what_is_forgotten_is_unknown(self, caller: Ekiden) -> None:
        result = caller.send_task("add", (1, 2))
        result.get(PATIENCE)

        result.forget()

        with pytest.raises(UnknownResult):
            result.get(PATIENCE)

    @pytest.mark.usefixtures("worker")
    def test_an_id_of_ones_own_may_be_used_again(self, caller: Ekiden) -> None:
        assert caller.send_task("add", (1, 2), task_id="mine").get(PATIENCE) == 3

        assert caller.send_task("add", (3, 4), task_id="mine").get(PATIENCE) == 7

    # What else must work with nothing but a broker.

    def test_revoking_reaches_the_workers_that_run(self, shop: Ekiden, caller: Ekiden) -> None:
        with shop.worker(threads=1):
            result = caller.send_task("count", countdown=0.5)
            caller.revoke(result.id)

            with pytest.raises(TaskRevoked):
                result.get(PATIENCE)
            assert shop.done == []  # type: ignore[attr-defined]

    def test_revoking_ends_what_runs(self, shop: Ekiden, caller: Ekiden) -> None:
        @shop.task(name="endless")
        def endless() -> None:
            gate.arrived.set()
            while True:
                time.sleep(0.01)

        gate = Gate()
        with shop.worker(threads=1):
            result = caller.send_task("endless")
            assert gate.arrived.wait(PATIENCE)

            result.revoke(terminate=True)

            with pytest.raises(TaskRevoked):
                result.get(PATIENCE)

    def test_what_has_expired_says_so(self, shop: Ekiden, caller: Ekiden) -> None:
        result = caller.send_task("count", expires=datetime.now(UTC) - timedelta(seconds=1))

        with shop.worker(threads=1), pytest.raises(TaskExpired):
            result.get(PATIENCE)

    @pytest.mark.usefixtures("worker")
    def test_rate_limits_hold_in_each_worker_process(self, shop: Ekiden, caller: Ekiden) -> None:
        @shop.task(name="limited", rate_limit="20/s")
        def limited() -> float:
            return time.monotonic()

        results = [caller.send_task("limited") for _ in range(8)]
        starts = sorted(result.get(PATIENCE) for result in results)

        assert starts[-1] - starts[0] > 0.15

    @pytest.mark.usefixtures("worker")
    def test_at_most_once_answers_too(self, shop: Ekiden, caller: Ekiden) -> None:
        @shop.task(name="early", acks="early")
        def early(number: int) -> int:
            return number

        assert caller.send_task("early", (5,)).get(PATIENCE) == 5

    def test_a_result_too_large_is_a_failure_that_says_so(self, shop: Ekiden, caller: Ekiden) -> None:
        shop.conf.result_max_bytes = 1000

        with shop.worker(threads=1), pytest.raises(MisuseError, match="result_max_bytes"):
            caller.send_task("echo", ("x" * 2000,)).get(PATIENCE)

    def test_a_worker_that_stores_answers_who_cannot_ask_its_store(
        self, url: str, caller: Ekiden, tmp_path: Path
    ) -> None:
        with Ekiden("stores", broker=url, backend=f"sqlite:///{tmp_path}/results.db") as stores:
            declare(stores)
            with stores.worker(threads=1):
                result = caller.send_task("third_time", (1,))

                assert result.get(PATIENCE) == 1
                assert stores.AsyncResult(result.id).get(PATIENCE) == 1

    def test_what_needs_storage_is_refused(self, caller: Ekiden) -> None:
        backend = caller.backend
        for refused in (
            lambda: backend.join("join", "member", b"", size=2, expires=None),
            lambda: backend.begin([]),
            lambda: backend.put([]),
            lambda: backend.read(["key"]),
            lambda: backend.write("key", b"value"),
            lambda: backend.scan("key"),
        ):
            with pytest.raises(ConfigurationError, match=r"needs a result backend that stores.*set result_backend"):
                refused()

    def test_closing_wakes_who_waits(self, caller: Ekiden) -> None:
        result, _ = expected(caller)
        backend = caller.backend
        raised: list[Exception] = []

        def wait() -> None:
            try:
                result.get(FAR)
            except Exception as error:  # noqa: BLE001 - the test looks at what it is
                raised.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        eventually(lambda: len(backend._waits) == 1, what="it waits")  # type: ignore[attr-defined]
        began = time.monotonic()
        backend.close()
        waiting.join(PATIENCE)

        assert time.monotonic() - began < PATIENCE
        assert "closed" in str(raised[0])


class RpcProcessConformance:
    """For brokers that processes share."""

    @pytest.fixture
    def environment(self, url: str) -> dict[str, str]:
        search_path = os.pathsep.join([str(APPS), *(each for each in sys.path if each)])
        return {
            **os.environ,
            "EKIDEN_BROKER_URL": url,
            "EKIDEN_RESULT_BACKEND": "rpc://",
            "EKIDEN_LEASE": "2",
            "PYTHONPATH": search_path,
        }

    @pytest.fixture
    def caller(self, url: str) -> Iterator[Ekiden]:
        with Ekiden("caller", broker=url, backend="rpc://") as app:
            yield app

    @pytest.fixture
    def start_worker(
        self, environment: dict[str, str], tmp_path: Path
    ) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
        with ExitStack() as ending:

            def start() -> subprocess.Popen[bytes]:
                log = ending.enter_context((tmp_path / f"worker-{new_id()}.log").open("wb"))
                command = [sys.executable, "-m", "ekiden", "worker", "replies:app", "--processes", "1"]
                process = subprocess.Popen(command, env=environment, stderr=log, cwd=tmp_path)
                ending.callback(process.wait, FAR)
                ending.callback(process.send_signal, signal.SIGTERM)
                return process

            yield start

    @pytest.mark.slow
    def test_a_worker_that_is_killed_in_the_middle_is_answered_for_by_the_next(
        self, caller: Ekiden, start_worker: Callable[[], object], tmp_path: Path
    ) -> None:
        start_worker()

        assert caller.send_task("die_once", (str(tmp_path / "died"),)).get(FAR) == 1

    @pytest.mark.slow
    def test_bodies_in_processes_of_their_own_tell_wait_and_answer(
        self, caller: Ekiden, start_worker: Callable[[], object]
    ) -> None:
        start_worker()

        assert caller.send_task("add_inside", (1, 2)).get(FAR) == 3
        assert caller.send_task("told", ("how far",)).get(FAR) == "how far"

    @pytest.mark.slow
    def test_a_caller_may_go_before_its_answer_comes(
        self, caller: Ekiden, environment: dict[str, str], start_worker: Callable[[], object], tmp_path: Path
    ) -> None:
        sent = subprocess.run(
            [sys.executable, str(APPS / "replies.py")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=FAR,
            check=True,
            cwd=tmp_path,
        )
        start_worker()

        assert caller.send_task("add", (3, 4)).get(FAR) == 7
        with pytest.raises(UnknownResult):
            caller.AsyncResult(sent.stdout.strip()).get(FAR)
        asked = subprocess.run(
            [sys.executable, "-m", "ekiden", "result", "replies:app", sent.stdout.strip()],
            env=environment,
            capture_output=True,
            text=True,
            timeout=FAR,
            check=False,
            cwd=tmp_path,
        )
        assert asked.returncode == 1
        assert "passes results on to the process that sent the call" in asked.stderr
        assert asked.stderr.count("\n") == 1

    @pytest.mark.slow
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
    def test_a_forked_child_has_a_reply_queue_of_its_own(
        self, caller: Ekiden, start_worker: Callable[[], object]
    ) -> None:
        start_worker()
        before = caller.send_task("add", (1, 2))
        before.get(FAR)

        child = os.fork()
        if child == 0:
            os._exit(_in_the_child(caller, before.id))
        _, status = os.waitpid(child, 0)

        assert os.waitstatus_to_exitcode(status) == 0
        assert caller.send_task("add", (3, 4)).get(FAR) == 7
        assert before.get(FAR) == 3


def _in_the_child(caller: Ekiden, sent_by_parent: str) -> int:
    try:
        if caller.send_task("add", (5, 6)).get(FAR) != 11:
            return 2
        caller.AsyncResult(sent_by_parent).get(FAR)
    except UnknownResult:
        caller.close()
        return 0
    except BaseException as error:  # noqa: BLE001 - nothing may come out of a forked child but its status
        print(repr(error), file=sys.stderr)
        return 3
    return 4


class TestRpcOverMemory(RpcConformance):
    @pytest.fixture
    def url(self) -> Iterator[str]:
        name = new_id()
        yield f"memory://{name}"
        memory.discard(name)


@pytest.mark.slow
class TestRpcOverSQLite(RpcConformance, RpcProcessConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/tasks.db"


@pytest.mark.slow
class TestRpcOverRedis(RpcConformance, RpcProcessConformance):
    @pytest.fixture
    def url(self, redis_place: str) -> str:
        return redis_place


class TestRpcOverRabbitMQ(RpcConformance, RpcProcessConformance):
    @pytest.fixture
    def url(self, rabbitmq_place: str) -> str:
        return rabbitmq_place

    @pytest.mark.usefixtures("worker")
    @pytest.mark.slow
    def test_a_reply_queue_that_somebody_deletes_is_made_again(self, url: str, caller: Ekiden) -> None:
        import pika  # which only this transport needs

        lost, queue = expected(caller)
        parameters, prefix = pika.URLParameters(url.partition("?")[0]), parse_url(url).options["prefix"]

        with pika.BlockingConnection(parameters) as connection:
            connection.channel().queue_delete(f"{prefix}{queue}")

        eventually(lambda: is_answered(caller), what="replies come again", within=FAR)
        with pytest.raises(ResultTimeout, match="reply was lost"):
            lost.get(0.01)


def declare(app: Ekiden) -> None:
    """The tasks of the worker's side. ``app.done`` names those of which a test counts the runs."""
    done: list[str] = []
    app.done = done  # type: ignore[attr-defined]

    @app.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="echo")
    def echo(value: Any) -> Any:
        return value

    @app.task(name="fail")
    def fail(reason: str) -> None:
        raise ValueError(reason)

    @app.task(name="third_time", bind=True)
    def third_time(self: Any, value: Any) -> Any:
        if self.request.retries < 2:
            raise self.retry(countdown=0.01)
        done.append("third_time")
        return value

    @app.task(name="retry_later", bind=True)
    def retry_later(self: Any) -> None:
        raise self.retry(exc=ValueError("not yet"), countdown=3600)

    @app.task(name="count")
    def count() -> None:
        done.append("count")


def expected(caller: Ekiden) -> tuple[Any, str]:
    """A call that no worker answers, and the queue at which its replies are expected."""
    result = caller.send_task("add", (1, 2), queue=f"unserved-{new_id()}")
    return result, caller.backend.expect([], caller.opened_transport) or ""


def a_result(task_id: str, state: str, step: int, value: bytes) -> StoredResult:
    """What a worker would tell."""
    return StoredResult(task_id, state, step, b'{"v":1,"value":' + value + b"}")


def tell(caller: Ekiden, queue: str, told: StoredResult) -> None:
    """Send a reply as a worker would."""
    (answer,) = caller.transport.publish([reply_message([told], queue, new_id())])
    assert answer.error is None


class RestartConformance:
    """Subclass it with a ``server`` that may be restarted."""

    @pytest.mark.slow
    @pytest.mark.timeout(180)
    @pytest.mark.parametrize("by_kill", [False, True], ids=["stopped", "killed"])
    def test_results_come_again_after_the_broker_was_restarted(self, server: ServerProcess, by_kill: bool) -> None:
        with Ekiden("rpc", broker=f"{server.url}?prefix=test-{new_id()}", backend="rpc://", lease=5) as app:  # type: ignore[attr-defined]
            declare(app)
            with app.worker(threads=2):
                before = app.send_task("add", (1, 2))
                assert before.get(FAR) == 3
                waiting = ThreadPoolExecutor(1)
                unanswered = waiting.submit(expected(app)[0].get, 5.0)

                server.restart(by_kill=by_kill)

                eventually(lambda: is_answered(app), what="results come again", within=90.0)
                assert before.get(FAR) == 3
                with pytest.raises(ResultTimeout):
                    unanswered.result(FAR)
                waiting.shutdown()


class TestRpcThroughARestartOfRedis(RestartConformance):
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[ServerProcess]:
        from tests.servers.redis import RedisServer
        from tests.servers.running import running

        with running(lambda: RedisServer(tmp_path)) as server:
            yield server


class TestRpcThroughARestartOfRabbitMQ(RestartConformance):
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[ServerProcess]:
        from tests.servers.rabbitmq import RabbitMQServer
        from tests.servers.running import running

        with running(lambda: RabbitMQServer(tmp_path)) as server:
            yield server


def is_answered(caller: Ekiden) -> bool:
    """Whether a call is answered now."""
    try:
        return bool(caller.send_task("add", (1, 2), publish_timeout=2.0).get(1.0) == 3)
    except (ResultTimeout, BrokerUnavailable):
        return False
