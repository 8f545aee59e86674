"""RabbitMQ in trouble: stopped, killed, frozen, out of memory, and behind a bad wire.

The server that is harmed is one for the whole module: it takes many seconds to start. Whoever harms it, heals it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import pytest
from ekiden import Ekiden
from ekiden.codec import decode_call
from ekiden.errors import BrokerUnavailable
from ekiden.message import STORED, Ending, PublishOutcome, SettleOutcome, new_id
from ekiden.testing.conformance import (
    BrokerRestartConformance,
    LostReplyConformance,
    SilentAddressConformance,
    SilentBrokerConformance,
    SlowWireConformance,
)
from ekiden.testing.conformance.fixtures import TransportFixtures, a_message, bodies, eventually, settle
from ekiden.testing.proxy import Proxy
from ekiden.transport import Transport

from tests.servers.rabbitmq import RabbitMQServer
from tests.servers.running import running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    with running(lambda: RabbitMQServer(tmp_path_factory.mktemp("rabbitmq"))) as server:
        yield server


class OwnServer:
    """The broker is a server of this module's own."""

    query = ""

    @pytest.fixture
    def url(self, server: RabbitMQServer) -> str:
        return f"{server.url}?prefix=test-{new_id()}{self.query}"


@pytest.mark.parametrize(
    ("queue_type", "by_kill"),
    [("quorum", False), ("quorum", True), ("classic", True)],
    ids=["quorum, stopped", "quorum, killed", "classic, killed"],
)
class TestRestartedRabbitMQ(BrokerRestartConformance):
    @pytest.fixture
    def url(self, server: RabbitMQServer, queue_type: str) -> str:
        return f"{server.url}?prefix=test-{new_id()}&queue_type={queue_type}"

    @pytest.fixture
    def restart_broker(self, server: RabbitMQServer, queue_type: str, by_kill: bool) -> Callable[[], None]:
        def restart() -> None:
            if queue_type == "quorum" and by_kill:
                # Killed in the half second after it was made, the server has lost a quorum queue for ever.
                eventually(server.remembers_all_quorum_queues, what="the new queues are on the disk")
            server.restart(by_kill=by_kill)

        return restart


@pytest.mark.parametrize("by_kill", [False, True], ids=["stopped", "killed"])
def test_no_call_that_is_sent_while_the_server_restarts_is_lost(server: RabbitMQServer, by_kill: bool) -> None:
    url = f"{server.url}?prefix=test-{new_id()}"
    with Ekiden("ours", broker=url, task_publish_timeout=60.0) as app, ThreadPoolExecutor(4) as threads:

        @app.task(ignore_result=True)
        def note(number: int) -> None: ...

        note.delay(-1)
        eventually(server.remembers_all_quorum_queues, what="the queue is on the disk", within=30)
        begun, over = threading.Event(), threading.Event()

        def send_all_the_time() -> list[str]:
            sent = []
            while not over.is_set():
                sent.append(note.delay(len(sent)).id)
                begun.set()
            return sent

        sending = [threads.submit(send_all_the_time) for _ in range(4)]
        assert begun.wait(30)
        server.restart(by_kill=by_kill)
        over.set()

        sent = {task_id for each in sending for task_id in each.result(60)}
        consumer = app.transport.consumer(["default"], lease=60, prefetch=1000, name=new_id())
        seen: set[str] = set()

        def all_are_there() -> bool:
            try:
                deliveries = consumer.receive(1000, 0.5)
            except BrokerUnavailable:
                return False
            settle(consumer, deliveries)
            seen.update(decode_call(each.message.body, each.message.headers).id for each in deliveries)
            return sent <= seen

        eventually(all_are_there, what="every call that was sent is there", within=60)


class TestFrozenRabbitMQ(OwnServer, SilentBrokerConformance):
    query = "&timeout=2&heartbeat=5"
    deadline_seconds = 6.0

    @pytest.fixture
    def silent(self, server: RabbitMQServer) -> Callable[[], AbstractContextManager[None]]:
        return server.frozen


class TestRabbitMQBehindAFrozenWire(SilentBrokerConformance):
    deadline_seconds = 6.0

    @pytest.fixture
    def proxy(self, server: RabbitMQServer) -> Iterator[Proxy]:
        with Proxy("127.0.0.1", server.port) as proxy:
            yield proxy

    @pytest.fixture
    def url(self, server: RabbitMQServer, proxy: Proxy) -> str:
        return proxy.through(f"{server.url}?prefix=test-{new_id()}&timeout=2&heartbeat=5")

    @pytest.fixture
    def silent(self, proxy: Proxy) -> Callable[[], AbstractContextManager[None]]:
        return proxy.frozen


class TestRabbitMQThatLosesReplies(OwnServer, LostReplyConformance):
    connection_is_lease = True
    query = "&timeout=5&heartbeat=5"
    turns = 25  # each costs a new connection


class TestRabbitMQAtItsSecondAddress(OwnServer, SilentAddressConformance):
    pass


class TestRabbitMQOverABadWire(OwnServer, SlowWireConformance):
    pass


class TestRabbitMQOutOfMemory(TransportFixtures):
    """Its memory alarm stops whoever publishes; consumers go on, and so it is drained."""

    @pytest.fixture
    def url(self, server: RabbitMQServer) -> str:
        return f"{server.url}?prefix=test-{new_id()}&timeout=3"

    @pytest.fixture
    def out_of_memory(self, server: RabbitMQServer) -> Callable[[], AbstractContextManager[None]]:
        @contextmanager
        def out_of_memory() -> Iterator[None]:
            server.ctl("set_vm_memory_high_watermark", "absolute", "1")
            try:
                eventually(
                    lambda: "memory" in server.ctl("eval", "rabbit_alarm:get_alarms()."),
                    what="the alarm is on",
                    within=30,
                )
                yield
            finally:
                server.ctl("set_vm_memory_high_watermark", "0.6")

        return out_of_memory

    def test_publishing_fails_in_time_and_consumers_drain_the_queue(
        self,
        transport: Transport,
        queue: str,
        out_of_memory: Callable[[], AbstractContextManager[None]],
    ) -> None:
        assert transport.publish([a_message(queue, b"%d" % number) for number in range(10)]) == [STORED] * 10
        consumer = self.consume(transport, queue)
        first = self.collect_one(consumer)

        with out_of_memory():
            # The first message that a connection publishes during an alarm is taken, and blocks the connection.
            trouble = eventually(lambda: self.trouble(transport, f"{queue}-other"), what="publishing fails")
            assert isinstance(trouble, BrokerUnavailable)
            (follow_up,) = consumer.settle([Ending(first, (a_message(f"{queue}-next"),))])
            assert follow_up.outcome is SettleOutcome.FAILED
            assert isinstance(follow_up.error, BrokerUnavailable)
            drained = self.collect(consumer, 9)
            assert settle(consumer, drained) == [SettleOutcome.SETTLED] * 9

        eventually(lambda: self.trouble(transport, f"{queue}-after") is None, what="publishing works again", within=60)
        (ended,) = consumer.settle([Ending(first, (a_message(f"{queue}-next", b"next"),))])
        assert ended.outcome is SettleOutcome.SETTLED
        assert b"next" in bodies(self.collect(self.consume(transport, f"{queue}-next"), 1))

    def trouble(self, transport: Transport, queue: str) -> Exception | None:
        """Why a message could not be published, if it could not."""
        try:
            (answer,) = transport.publish([a_message(queue)])
        except BrokerUnavailable as error:
            return error
        return answer.error if answer.outcome is PublishOutcome.FAILED else None
