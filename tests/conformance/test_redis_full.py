"""A Redis that has reached its maxmemory, with noeviction: workers end everything that is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ekiden import Ekiden
from ekiden.errors import BackendError, BackendRefused, BrokerRefused, BrokerUnavailable, EkidenError
from ekiden.message import DEAD_SUFFIX, SETTLED, STORED, Ending, PublishOutcome, SettleOutcome, new_id
from ekiden.plugins import open_backend, open_transport
from ekiden.results import Backend, BeginOutcome, Start
from ekiden.states import FAILURE, RETRY, STARTED, SUCCESS
from ekiden.testing.conformance.fixtures import DAY, a_message, a_result, bodies, eventually, numbered, settle
from ekiden.transport import Consumer, Transport
from ekiden_redis.full import FOLLOWING_BYTES, SMALL_BYTES

from tests.servers.redis import RedisClusterOfThree, RedisServer
from tests.servers.running import running
from tests.working import dead_letters, is_empty

MIB = 1024 * 1024
WITHIN = 120.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running(lambda: RedisServer(tmp_path, options={"maxmemory": "6mb"})) as server:
        yield server


@pytest.fixture
def queue() -> str:
    return f"queue-{new_id()}"


@pytest.fixture
def transport(server: RedisServer) -> Iterator[Transport]:
    with open_transport(server.url) as transport:
        yield transport


@pytest.fixture
def backend(server: RedisServer) -> Iterator[Backend]:
    with open_backend(server.url) as backend:
        yield backend


@pytest.fixture
def consume(transport: Transport, queue: str) -> Callable[[], Consumer]:
    return lambda: transport.consumer([queue], lease=60.0, prefetch=10_000, name=new_id())


def make_full(server: RedisServer) -> None:
    """From now on it has a little more than it may have."""
    with server.client() as client:
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 0.9))


def fill(send: Callable[[], object]) -> int:
    """Send until the broker says that it is full; returns how often that was."""
    count = 0
    while not isinstance(refused := refusal_of(send), BrokerUnavailable):
        assert refused is None
        count += 1
    assert "full" in str(refused)
    return count


class TestWorkers:
    """The broker and the store are one, as they are unless something else is said."""

    @pytest.fixture
    def app(self, server: RedisServer) -> Iterator[Ekiden]:
        app = Ekiden("full", broker=server.url, task_publish_retry=False, worker_threads=4)
        yield app
        app.close()

    def drain(self, app: Ekiden) -> None:
        """A worker ends all that is there."""
        with app.worker():
            eventually(lambda: is_empty(app), what="nothing is left", within=WITHIN)

    @pytest.mark.timeout(240)
    @pytest.mark.slow
    def test_all_calls_are_ended_and_their_results_are_kept(self, app: Ekiden) -> None:
        @app.task
        def double(number: int, _ballast: str) -> int:
            return number * 2

        app.backend.put([a_result(body=b"x" * 1000) for _ in range(1000)])
        results = []
        fill(lambda: results.append(double.delay(len(results), "x" * 500)))
        assert len(results) > 100

        self.drain(app)

        assert [result.get(timeout=10) for result in results] == [number * 2 for number in range(len(results))]
        assert double.delay(1, "there is room again") is not None

    @pytest.mark.timeout(240)
    @pytest.mark.slow
    def test_also_calls_that_are_smaller_than_their_results(self, app: Ekiden) -> None:
        @app.task
        def answer(number: int) -> str:
            return f"{number} " + "x" * 400

        results = []
        fill(lambda: results.append(answer.delay(len(results))))

        self.drain(app)

        assert all(result.get(timeout=10).startswith(f"{number} ") for number, result in enumerate(results))

    @pytest.mark.timeout(240)
    @pytest.mark.slow
    def test_failures_tries_dead_letters_and_limits_of_rates_are_ended(self, app: Ekiden) -> None:
        tries: list[int] = []

        @app.task
        def fail(number: int, _ballast: str) -> None:
            raise ValueError(number)

        @app.task(bind=True, max_retries=2)
        def again(self: object, number: int, _ballast: str) -> int:
            if tries.count(number) < 2:
                tries.append(number)
                self.retry(countdown=0.01)  # type: ignore[attr-defined]
            return number

        @app.task(rate_limit="1000/s", track_started=True)
        def limited(number: int, _ballast: str) -> int:
            return number

        @app.task
        def ballast(_ballast: str) -> None:
            return

        failing = [fail.delay(number, "x" * 200) for number in range(50)]
        retried = [again.delay(number, "x" * 200) for number in range(50)]
        rated = [limited.delay(number, "x" * 200) for number in range(50)]
        unknown = [app.send_task("nobody.knows", ("x" * 200,)) for _ in range(1)]
        fill(lambda: ballast.delay("x" * 1000))
        app.conf.unknown_task_grace = 0.0

        self.drain(app)

        assert {result.state for result in failing} == {FAILURE}
        assert [result.get(timeout=10) for result in retried + rated] == [*range(50), *range(50)]
        assert unknown[0].state == FAILURE
        assert len(dead_letters(app)) >= 1

    @pytest.mark.timeout(240)
    @pytest.mark.slow
    def test_what_is_linked_follows_and_what_is_revoked_does_not_run(self, app: Ekiden) -> None:
        ended: list[int] = []

        @app.task
        def one(number: int, _ballast: str = "") -> int:
            return number

        @app.task
        def note(number: int) -> None:
            ended.append(number)

        for number in range(50):
            one.apply_async((number, "x" * 200), link=note.s())
        revoked = one.delay(1, "x" * 200)
        fill(lambda: one.delay(1, "x" * 1000))
        revoked.revoke(terminate=True)

        self.drain(app)

        assert sorted(ended) == list(range(50))
        assert revoked.state == "REVOKED"


class TestWhatGoesBeyond:
    """Against the transport and the backend by themselves."""

    def test_a_worker_begins_tells_and_joins(self, server: RedisServer, backend: Backend) -> None:
        make_full(server)
        start = Start(new_id(), 0, "message", DAY)

        assert backend.begin([start])[0].outcome is BeginOutcome.GO
        for state in (STARTED, RETRY, SUCCESS):
            assert backend.put([a_result(state, task_id=start.task_id)]) == [True]
        assert backend.join("join", "a", b"1", size=2, expires=DAY).arrived == 1
        assert backend.join("join", "b", b"2", size=2, expires=DAY).outcomes == {"a": b"1", "b": b"2"}
        assert backend.write("rate/task", b"{}", expected_version=0, expires=60.0) == 1
        assert backend.write("rate/task", b"{}", expected_version=1, expires=60.0) == 2

    @pytest.mark.slow
    def test_large_results_go_in_until_half_as_much_again_is_in_use(
        self, server: RedisServer, backend: Backend
    ) -> None:
        fill_store(backend, 4096)

        with server.client() as client:
            memory = client.info("memory")
        assert 1.4 < memory["used_memory"] / memory["maxmemory"] < 1.6
        assert backend.put([a_result(body=b"small")]) == [True]
        with pytest.raises(BackendError, match="full"):
            backend.join("join", "a", b"x" * 4096, size=2, expires=DAY)
        with pytest.raises(BackendError, match="full"):
            backend.write("key", b"x" * 4096)

    @pytest.mark.slow
    def test_the_small_results_of_a_batch_go_in_although_a_large_one_does_not(
        self, server: RedisServer, backend: Backend
    ) -> None:
        fill_store(backend, 4096)
        small, large = a_result(body=b"small"), a_result(body=b"x" * 4096)

        with pytest.raises(BackendError, match="full") as caught:
            backend.put([small, large])

        assert not isinstance(caught.value, BackendRefused)
        found = backend.get([small.task_id, large.task_id])
        assert [each and each.body for each in found] == [b"small", None]

    def test_what_follows_goes_in_if_it_is_hardly_larger(
        self, server: RedisServer, transport: Transport, consume: Callable[[], Consumer], queue: str
    ) -> None:
        transport.publish(numbered(queue, 5))
        consumer = consume()
        held = consumer.receive(5, 5.0)
        make_full(server)
        assert refusal(transport, queue) == BrokerUnavailable
        dead = a_message(f"{queue}{DEAD_SUFFIX}", headers={"why": "x" * 2000})
        endings = [
            Ending(held[0], (a_message(queue, b"next try"),)),
            Ending(held[1], (dead,)),
            Ending(held[2], (a_message(queue, b"x" * (FOLLOWING_BYTES + 100)),)),
            Ending(held[3], (a_message(queue, b"delayed", due_in=0.1),)),
            Ending(held[4]),
        ]

        answers = consumer.settle(endings)

        assert [answer.outcome for answer in answers] == [
            SettleOutcome.SETTLED,
            SettleOutcome.SETTLED,
            SettleOutcome.FAILED,
            SettleOutcome.SETTLED,
            SettleOutcome.SETTLED,
        ]
        assert type(answers[2].error) is BrokerUnavailable
        assert [seen.message for seen in transport.browse(dead.queue)] == [dead]
        assert sorted(bodies([*consumer.receive(1, 5.0), *consumer.receive(1, 5.0)])) == [b"delayed", b"next try"]
        assert consumer.extend([held[2]]) == [SETTLED]

    def test_holding_giving_back_and_waking_go_on(
        self, server: RedisServer, transport: Transport, consume: Callable[[], Consumer], queue: str
    ) -> None:
        transport.publish([*numbered(queue, 6), a_message(queue, b"due", due_in=0.1)])
        consumer, other = consume(), consume()
        held = consumer.receive(6, 5.0)
        make_full(server)

        assert consumer.extend(held) == [SETTLED] * 6
        consumer.release(held[:2])
        consumer.release(held[2:4], delay=0.05)
        assert settle(consumer, held[4:]) == [SettleOutcome.SETTLED] * 2
        received = other.receive(1, 5.0)
        while found := other.receive(10, 1.0):
            received += found
        assert len(received) == 5
        consumer.stop()
        other.close()
        assert len(consume().receive(10, 5.0)) == 5

    def test_replies_and_small_broadcasts_go_through(
        self, server: RedisServer, transport: Transport, queue: str
    ) -> None:
        reply_queue = f"reply.{queue}"
        with (
            transport.consumer([reply_queue], lease=60.0, prefetch=10, name="caller") as caller,
            transport.listen(queue) as listener,
        ):
            make_full(server)

            assert transport.publish([a_message(reply_queue, b"x" * 5000)]) == [STORED]
            assert len(caller.receive(1, 5.0)) == 1
            transport.broadcast(queue, [b"end that task"])
            assert listener.receive(5.0) == [b"end that task"]
            with pytest.raises(BrokerUnavailable, match="full"):
                transport.broadcast(queue, [b"x" * 5000])


class TestWhatNeverFits:
    """It is refused for good, so that nobody waits for ever for room; and nothing beside it is."""

    def test_a_result_is_refused(self, backend: Backend) -> None:
        for store in (
            lambda: backend.put([a_result(body=b"x" * 8 * MIB)]),
            lambda: backend.join("join", "a", b"x" * 8 * MIB, size=2, expires=DAY),
            lambda: backend.write("key", b"x" * 8 * MIB),
        ):
            with pytest.raises(BackendRefused, match="maxmemory"):
                store()
        assert backend.put([a_result(body=b"x" * MIB)]) == [True]

    def test_a_message_is_refused_alone(self, transport: Transport, queue: str) -> None:
        answers = transport.publish([a_message(queue), a_message(queue, b"x" * 8 * MIB), a_message(queue)])

        assert [answer.outcome for answer in answers] == [
            PublishOutcome.STORED,
            PublishOutcome.FAILED,
            PublishOutcome.STORED,
        ]
        assert isinstance(answers[1].error, BrokerRefused)

    def test_an_ending_that_it_follows_is_refused_alone(
        self, transport: Transport, consume: Callable[[], Consumer], queue: str
    ) -> None:
        transport.publish(numbered(queue, 3))
        consumer = consume()
        held = consumer.receive(3, 5.0)

        answers = consumer.settle(
            [
                Ending(held[0]),
                Ending(held[1], (a_message(queue, b"x" * 8 * MIB),)),
                Ending(held[2], (a_message(queue),)),
            ]
        )

        assert [answer.outcome for answer in answers] == [
            SettleOutcome.SETTLED,
            SettleOutcome.FAILED,
            SettleOutcome.SETTLED,
        ]
        assert isinstance(answers[1].error, BrokerRefused)
        assert settle(consumer, [held[1]]) == [SettleOutcome.SETTLED]


@pytest.mark.slow
class TestAFullCluster:
    @pytest.fixture
    def cluster(self, tmp_path: Path) -> Iterator[RedisClusterOfThree]:
        with running(lambda: RedisClusterOfThree(tmp_path)) as cluster:
            yield cluster

    def test_what_workers_need_goes_in(self, cluster: RedisClusterOfThree, queue: str) -> None:
        with open_transport(cluster.url) as transport, open_backend(cluster.url) as backend:
            transport.publish(numbered(queue, 20))
            with transport.consumer([queue], lease=60.0, prefetch=100, name=queue) as consumer:
                held = consumer.receive(20, 5.0)
                for node in cluster.nodes:
                    make_full(node)

                assert backend.put([a_result() for _ in range(20)]) == [True] * 20
                starts = [Start(new_id(), 0, "message", DAY) for _ in range(20)]
                assert {begun.outcome for begun in backend.begin(starts)} == {BeginOutcome.GO}
                endings = [Ending(each, (a_message(f"{queue}-{number}"),)) for number, each in enumerate(held)]
                assert consumer.settle(endings) == [SETTLED] * 20


def fill_store(backend: Backend, size: int) -> None:
    """Store results of so many bytes until the store says that it is full."""
    assert size > SMALL_BYTES
    while (refused := refusal_of(lambda: backend.put([a_result(body=b"x" * size)]))) is None:
        continue
    assert "full" in str(refused)


def refusal_of(act: Callable[[], object]) -> EkidenError | None:
    """What an act raises."""
    try:
        act()
    except EkidenError as error:
        return error
    return None


def refusal(transport: Transport, queue: str) -> type[Exception] | None:
    """As what a new message is refused."""
    (answer,) = transport.publish([a_message(queue)])
    return None if answer.error is None else type(answer.error)
