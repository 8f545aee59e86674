"""What the classes of the kit share: how a broker is opened, and short words for what the tests do with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from ekiden.message import Delivery, Depth, Ending, HeaderValue, Message, SettleOutcome, new_id
from ekiden.plugins import open_backend, open_transport
from ekiden.results import Backend, StoredResult
from ekiden.states import SUCCESS, State
from ekiden.transport import Consumer, Transport, TransportDescription

Found = TypeVar("Found")

LONG_LEASE = 60.0
"""For every test that is not about the end of a lease."""

PATIENCE = 10.0
"""How long (seconds) a test waits for what must happen, before it says that it did not."""

DAY = 86_400.0
"""How long (seconds) a store keeps what must not expire meanwhile."""

A_USERS_OWN_STATE = "COMPILING"
STATES = [*(state.value for state in State), A_USERS_OWN_STATE]


def eventually(look: Callable[[], Found | None], *, what: str, within: float = PATIENCE) -> Found:
    """Call ``look`` until it returns something true, and return that. Fails with ``what`` after ``within`` seconds."""
    give_up = time.monotonic() + within
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > give_up:
            raise AssertionError(f"{what}: not within {within} s; last seen: {found!r}")
        time.sleep(0.01)


def let_it_wait(seconds: float = 0.1) -> None:
    """Give a thread that was just started time to begin to wait. Where it has not, the test holds as well."""
    time.sleep(seconds)


def a_result(
    state: str = SUCCESS, *, task_id: str | None = None, step: int = 0, body: bytes = b"1", expires: float | None = DAY
) -> StoredResult:
    """A result of a task of its own."""
    return StoredResult(task_id or new_id(), state, step, body, expires)


def a_message(
    queue: str,
    body: bytes = b"",
    *,
    headers: dict[str, HeaderValue] | None = None,
    priority: int = 4,
    due_in: float | None = None,
    id: str | None = None,  # noqa: A002
) -> Message:
    """A message with an id of its own; ``due_in`` is in seconds from now."""
    due = None if due_in is None else time.time() + due_in
    return Message(id or new_id(), queue, body, headers or {}, priority, due)


def numbered(queue: str, count: int, **options: Any) -> list[Message]:
    """``count`` messages whose bodies are ``b"0"``, ``b"1"``, ..."""
    return [a_message(queue, b"%d" % number, **options) for number in range(count)]


def bodies(deliveries: list[Delivery]) -> list[bytes]:
    """What the deliveries carry, in their order."""
    return [delivery.message.body for delivery in deliveries]


def ids(deliveries: list[Delivery]) -> list[str]:
    """The ids of the delivered messages, in their order."""
    return [delivery.message.id for delivery in deliveries]


def settle(consumer: Consumer, deliveries: list[Delivery]) -> list[SettleOutcome]:
    """End ``deliveries`` with nothing to publish, and return what became of each."""
    return [settled.outcome for settled in consumer.settle([Ending(delivery) for delivery in deliveries])]


class TransportFixtures:
    """Opens the broker of a test. A plugin author overrides ``url``, and ``open_transport`` only if it must be."""

    @pytest.fixture
    def url(self) -> str:
        """The URL of a broker that holds nothing that these tests could meet: override this."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'url'.")

    @pytest.fixture
    def transport(self, url: str) -> Iterator[Transport]:
        """The broker, as the publisher and the first worker have it."""
        with self.open_transport(url) as transport:
            yield transport

    @pytest.fixture
    def other(self, url: str) -> Iterator[Transport]:
        """The same broker, opened a second time, as another process would."""
        with self.open_transport(url) as transport:
            yield transport

    @pytest.fixture
    def description(self, transport: Transport) -> TransportDescription:
        """What the transport under test says of itself."""
        return transport.description

    @pytest.fixture
    def queue(self) -> str:
        """The name of a queue that no other test uses."""
        return f"queue-{new_id()}"

    def open_transport(self, url: str) -> Transport:
        """How ``url`` is opened: by its entry point, as a user would."""
        return open_transport(url)

    def consume(
        self,
        transport: Transport,
        *queues: str,
        lease: float = LONG_LEASE,
        prefetch: int = 10_000,
        name: str | None = None,
        strict: bool = False,
    ) -> Consumer:
        """A consumer with a name of its own, which ``transport.close()`` closes."""
        return transport.consumer(queues, lease=lease, prefetch=prefetch, name=name or new_id(), strict=strict)

    def collect(self, consumer: Consumer, count: int, *, limit: int = 1000, within: float = PATIENCE) -> list[Delivery]:
        """``count`` deliveries, received in as many calls as it takes."""
        give_up = time.monotonic() + within
        collected: list[Delivery] = []
        while len(collected) < count and time.monotonic() < give_up:
            collected += consumer.receive(min(limit, count - len(collected)), max(0.0, give_up - time.monotonic()))
        assert len(collected) == count, f"{len(collected)} of {count} messages arrived within {within} s"
        return collected

    def collect_one(self, consumer: Consumer, *, within: float = PATIENCE) -> Delivery:
        """The next delivery."""
        return self.collect(consumer, 1, within=within)[0]

    def assert_nothing_comes(self, consumer: Consumer, *, within: float = 0.1) -> None:
        """Nothing is there, and nothing arrives within some time."""
        assert bodies(consumer.receive(100, within)) == []

    def assert_depth(self, transport: Transport, queue: str, *, ready: int, delayed: int = 0, leased: int = 0) -> None:
        """The queue holds this many, as far as this broker counts them; a broker may count a little late."""
        description = transport.description
        expected = Depth(
            ready, delayed if description.counts_delayed else None, leased if description.counts_leased else None
        )
        eventually(
            lambda: transport.depth(queue) == expected,
            what=f"depth of {queue} is {expected} (now {transport.depth(queue)})",
        )


class BackendFixtures:
    """Opens the result store of a test. A plugin author overrides ``url``."""

    @pytest.fixture
    def url(self) -> str:
        """The URL of a store that holds nothing that these tests could meet: override this."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'url'.")

    @pytest.fixture
    def backend(self, url: str) -> Iterator[Backend]:
        """The store, as one process has it."""
        with self.open_backend(url) as backend:
            yield backend

    @pytest.fixture
    def other(self, url: str) -> Iterator[Backend]:
        """The same store, opened a second time, as another process would."""
        with self.open_backend(url) as backend:
            yield backend

    def open_backend(self, url: str) -> Backend:
        """How ``url`` is opened: by its entry point, as a user would."""
        return open_backend(url)

    def assert_same(self, found: StoredResult | None, put: StoredResult) -> None:
        """All but the time of expiry, which a backend need not tell."""
        assert found is not None
        assert (found.task_id, found.state, found.step, found.body) == (put.task_id, put.state, put.step, put.body)
