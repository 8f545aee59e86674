"""A broker that does not take what follows from a call, or its dead letter: less is tried; others are settled."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from ekiden import Ekiden
from ekiden.errors import BrokerRefused
from ekiden.memory import MemoryBackend, MemoryConsumer, MemoryTransport
from ekiden.message import Ending, Message, Published, PublishOutcome, Settled, SettleOutcome, new_id
from ekiden.transport import Consumer
from ekiden.urls import parse_url

from tests.working import PATIENCE, eventually, is_empty, the_dead_letter, the_message


class Broker(MemoryTransport):
    """A broker in memory that does not take some of what a worker publishes while it settles."""

    error: Exception = BrokerRefused("the broker does not take this")
    refuses: Callable[[Message], bool] = staticmethod(lambda _: False)

    def consumer(self, queues: Sequence[str], **options: Any) -> Consumer:
        consumer = super().consumer(queues, **options)
        assert isinstance(consumer, MemoryConsumer)
        settle = consumer.settle

        def settle_some(endings: Sequence[Ending]) -> list[Settled]:
            answers = []
            for ending in endings:
                if any(map(self.refuses, ending.publish)):
                    answers.append(Settled(SettleOutcome.FAILED, self.error))
                else:
                    answers += settle([ending])
            return answers

        consumer.settle = settle_some  # type: ignore[method-assign]
        return consumer


@pytest.fixture
def url() -> str:
    return f"memory://{new_id()}"


@pytest.fixture
def broker(url: str) -> Broker:
    return Broker(parse_url(url))


@pytest.fixture
def app(url: str, broker: Broker) -> Iterator[Ekiden]:
    with Ekiden("refused", broker=url, worker_grace=2.0) as app:
        app.adopt(broker, MemoryBackend(parse_url(url)))
        yield app


def work(app: Ekiden) -> tuple[Any, Any]:
    """Two tasks: one that fails, one that does not."""

    @app.task(max_retries=0)
    def fails() -> None:
        raise ValueError("wrong")

    @app.task
    def innocent() -> int:
        return 1

    return fails, innocent


@pytest.mark.parametrize("error", [BrokerRefused("too large"), ValueError("caf\udce9"), None], ids=repr)
def test_a_dead_letter_whose_headers_are_refused_is_buried_without_them(
    app: Ekiden, broker: Broker, error: Exception | None
) -> None:
    fails, innocent = work(app)
    broker.refuses = lambda message: "odd" in message.headers
    broker.error = error  # type: ignore[assignment]  # a transport that answers without an error
    with app.worker(threads=2):
        result = fails.apply_async(headers={"odd": "x"})
        others = [innocent.delay() for _ in range(5)]

        assert [each.get(PATIENCE) for each in others] == [1] * 5
        eventually(lambda: is_empty(app), what="all is settled")
    letter = the_dead_letter(app)
    assert letter.headers["ekiden-dead-queue"] == "default"
    assert "odd" not in letter.headers
    assert result.state == "FAILURE"


def test_what_cannot_be_buried_is_set_aside_and_stops_nothing(
    app: Ekiden, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    fails, innocent = work(app)
    broker.refuses = lambda message: message.queue.endswith(".dead")
    with app.worker(threads=2):
        result = fails.delay()
        eventually(lambda: app.transport.depth("default").delayed == 1, what="it is set aside")

        assert [innocent.delay().get(PATIENCE) for _ in range(3)] == [1] * 3
    assert the_message(app).message.id == result.id
    assert result.state == "FAILURE"
    assert "cannot be buried, and is set aside" in caplog.text


def test_a_settled_call_whose_dead_letter_is_refused_stops_nothing(app: Ekiden, broker: Broker) -> None:
    @app.task(acks="early", max_retries=0)
    def fails() -> None:
        raise ValueError("wrong")

    _, innocent = work(app)
    publish = broker.publish

    def publish_some(messages: Sequence[Message], **options: Any) -> Any:
        if any(each.queue.endswith(".dead") for each in messages):
            return [Published(PublishOutcome.FAILED, broker.error) for _ in messages]
        return publish(messages, **options)

    broker.publish = publish_some  # type: ignore[method-assign]
    with app.worker(threads=2):
        result = fails.delay()
        eventually(result.ready, what="it has ended")

        assert [innocent.delay().get(PATIENCE) for _ in range(3)] == [1] * 3
        eventually(lambda: is_empty(app), what="all is settled")
