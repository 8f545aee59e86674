"""What RabbitMQ refuses is told in one clear sentence, in bounded time, and nothing else is lost by it."""

import json
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256

import pika
import pytest
from ekiden import Ekiden
from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportError
from ekiden.message import STORED, Ending, PublishOutcome, SettleOutcome, new_id
from ekiden.plan import WorkerOptions
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import PATIENCE, a_message, bodies, eventually, numbered, settle
from ekiden.transport import Consumer, Transport
from ekiden.urls import parse_url
from ekiden.worker import Worker
from ekiden_rabbitmq import RabbitMQTransport
from ekiden_rabbitmq.topology import queue_name
from pika.adapters.blocking_connection import BlockingChannel

from tests.servers.certificates import Certificates
from tests.servers.processes import HOST, free_port
from tests.servers.rabbitmq import RabbitMQServer
from tests.servers.running import running

BOUNDED_SECONDS = 5.0
"""Every refusal has come by then, with ``timeout=2`` in the URL."""

LARGEST_MESSAGE = 256 * 1024


@pytest.fixture
def queue() -> str:
    return f"queue-{new_id()}"


# configure, write, read
RIGHTS = {
    "guest": (".*", ".*", ".*"),
    "may-not-configure": ("^$", ".*", ".*"),
    "may-not-publish": (".*", "^(?!amq.default$).*", ".*"),
    "may-not-write": (".*", "^$", ".*"),
    "may-not-read": (".*", ".*", "^(ekiden|amq.gen)"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    """A node of this file's own, with users of few rights, which takes small messages only."""
    directory = tmp_path_factory.mktemp("rabbitmq-refusals")
    definitions = directory / "definitions.json"
    definitions.write_text(json.dumps(users_with(RIGHTS)))
    settings = {"max_message_size": str(LARGEST_MESSAGE), "load_definitions": str(definitions)}
    with running(lambda: RabbitMQServer(directory, settings=settings)) as server:
        yield server


def users_with(rights: dict[str, tuple[str, str, str]]) -> dict[str, object]:
    """What a server loads when it starts: each user's password is ``secret``, but for guest's."""
    passwords = {user: "guest" if user == "guest" else "secret" for user in [*rights, "nobody"]}
    hashes = {user: b"salt" + sha256(b"salt" + password.encode()).digest() for user, password in passwords.items()}
    return {
        "vhosts": [{"name": "/"}],
        "users": [
            {
                "name": user,
                "password_hash": b64encode(digest).decode(),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": [],
            }
            for user, digest in hashes.items()
        ],
        "permissions": [
            {"user": user, "vhost": "/", "configure": configure, "write": write, "read": read}
            for user, (configure, write, read) in rights.items()
        ],
    }


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[RabbitMQServer]:
    directory = tmp_path_factory.mktemp("rabbitmq-tls")
    with running(lambda: RabbitMQServer(directory, certificates=certificates)) as server:
        yield server


@contextmanager
def channel_at(url: str) -> Iterator[BlockingChannel]:
    """Somebody else's channel, who uses the server without ekiden."""
    connection = pika.BlockingConnection(pika.URLParameters(url.partition("?")[0]))
    try:
        yield connection.channel()
    finally:
        connection.close()


def at_server(url: str, queue: str) -> str:
    """The queue's name at the server."""
    return queue_name(parse_url(url).options.get("prefix", ""), queue)


def with_option(url: str, **options: object) -> str:
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return f"{url}{'&' if '?' in url else '?'}{query}"


def refused(url: str, *, user: str = "guest", password: str = "hidden-secret", vhost: str | None = None) -> str:
    """The same server, for somebody else."""
    parsed = parse_url(url)
    path = parsed.path if vhost is None else vhost
    ((name, port),) = [(host.name, host.port) for host in parsed.hosts]
    return f"{parsed.scheme}://{user}:{password}@{name}:{port}/{path.replace('/', '%2F')}?timeout=2"


def how_publishing_fails(url: str, queue: str) -> TransportError:
    """The error of publishing, which comes in bounded time, and of the same class from every other call."""
    with open_transport(url) as transport:
        started = time.monotonic()
        error = publishing_error(transport, queue)
        assert time.monotonic() - started < BOUNDED_SECONDS
        assert isinstance(error, TransportError)
        with pytest.raises(type(error)):
            transport.depth(queue)
        with pytest.raises(type(error)):
            consume_one(transport, queue)
        assert time.monotonic() - started < 3 * BOUNDED_SECONDS
    return error


def publishing_error(transport: Transport, queue: str) -> Exception | None:
    """Why one message was not stored, whether it is raised or answered; None: it was stored."""
    try:
        (answer,) = transport.publish([a_message(queue)])
    except TransportError as error:
        return error
    assert (answer.error is None) is (answer.outcome is PublishOutcome.STORED)
    return answer.error


def consume_one(transport: Transport, queue: str) -> list[bytes]:
    """Open a consumer and receive once."""
    with transport.consumer([queue], lease=60, prefetch=10, name=new_id()) as consumer:
        return bodies(consumer.receive(1, BOUNDED_SECONDS))


def how_a_message_fails(url: str, queue: str) -> Exception | None:
    """The error that answers one message."""
    with open_transport(url) as transport:
        return publishing_error(transport, queue)


def collect(consumer: Consumer, count: int) -> list[bytes]:
    """Receive and settle ``count`` messages, through trouble; each is counted once."""
    found: dict[str, bytes] = {}

    def received_all() -> bool:
        try:
            deliveries = consumer.receive(100, 0.5)
        except BrokerUnavailable:
            return False
        settle(consumer, deliveries)
        found.update((delivery.message.id, delivery.message.body) for delivery in deliveries)
        return len(found) >= count

    eventually(received_all, what=f"{count} messages arrive", within=30)
    return list(found.values())


def published(transport: Transport, queue: str, body: bytes) -> bool:
    """Whether it was stored by this call."""
    try:
        return transport.publish([a_message(queue, body)]) == [STORED]
    except BrokerUnavailable:
        return False


# At the address of the URL.


def test_a_wrong_password_is_refused(rabbitmq_url: str, queue: str) -> None:
    error = how_publishing_fails(refused(rabbitmq_url, password="hidden-secret"), queue)

    assert type(error) is BrokerRefused
    assert "user name and password" in str(error)
    assert "hidden-secret" not in repr(error)


def test_an_unknown_virtual_host_is_refused(rabbitmq_url: str, queue: str) -> None:
    password = parse_url(rabbitmq_url).password or "guest"

    error = how_publishing_fails(refused(rabbitmq_url, password=password, vhost="no-such-host"), queue)

    assert type(error) is BrokerRefused
    assert "no virtual host no-such-host" in str(error)


def test_where_nobody_listens_is_unavailable(queue: str) -> None:
    error = how_publishing_fails(f"amqp://{HOST}:{free_port()}/?timeout=2", queue)

    assert type(error) is BrokerUnavailable
    assert "connection refused" in str(error)


def test_an_unknown_host_is_unavailable(queue: str) -> None:
    error = how_publishing_fails("amqp://no-such-host.invalid/?timeout=2", queue)

    assert type(error) is BrokerUnavailable
    assert "host is not known" in str(error)


def test_a_port_where_nobody_speaks_is_unavailable_in_bounded_time(queue: str) -> None:
    with socket.create_server((HOST, 0)) as silent:
        error = how_publishing_fails(f"amqp://{HOST}:{silent.getsockname()[1]}/?timeout=1", queue)

    assert type(error) is BrokerUnavailable


def test_tls_at_a_plain_port_is_refused(rabbitmq_url: str, queue: str) -> None:
    url = refused(rabbitmq_url, password=parse_url(rabbitmq_url).password or "guest")

    error = how_publishing_fails(url.replace("amqp://", "amqps://"), queue)

    assert type(error) is BrokerRefused
    assert "write amqp:// instead of amqps://" in str(error)


# TLS.


def carries_a_message(url: str, queue: str) -> bool:
    """Whether one goes through."""
    with open_transport(url) as transport, transport.consumer([queue], lease=60, prefetch=1, name="one") as consumer:
        transport.publish([a_message(queue, b"through")])
        deliveries = consumer.receive(1, PATIENCE)
        return bodies(deliveries) == [b"through"] and settle(consumer, deliveries) == [SettleOutcome.SETTLED]


@pytest.mark.slow
def test_tls_works_with_the_authority_of_the_certificate(
    tls_server: RabbitMQServer, certificates: Certificates, queue: str
) -> None:
    assert carries_a_message(with_option(tls_server.url, cafile=certificates.authority), queue)


@pytest.mark.slow
def test_tls_works_with_a_certificate_of_the_client(
    tls_server: RabbitMQServer, certificates: Certificates, queue: str
) -> None:
    url = with_option(
        tls_server.url, cafile=certificates.authority, certfile=certificates.client, keyfile=certificates.client_key
    )

    assert carries_a_message(url, queue)


@pytest.mark.slow
def test_tls_works_where_nobody_looks_at_the_certificate(tls_server: RabbitMQServer, queue: str) -> None:
    assert carries_a_message(with_option(tls_server.url, verify="false"), queue)


@pytest.mark.slow
def test_a_certificate_of_an_unknown_authority_is_refused(tls_server: RabbitMQServer, queue: str) -> None:
    error = how_publishing_fails(with_option(tls_server.url, timeout=2), queue)

    assert type(error) is BrokerRefused
    assert "cafile=" in str(error)


@pytest.mark.slow
def test_a_certificate_of_another_name_is_refused(
    tls_server: RabbitMQServer, certificates: Certificates, queue: str
) -> None:
    url = with_option(tls_server.url, cafile=certificates.authority, server_hostname="other.example", timeout=2)

    error = how_publishing_fails(url, queue)

    assert type(error) is BrokerRefused
    assert "other.example" in str(error)
    assert "server_hostname=" in str(error)


@pytest.mark.slow
def test_a_plain_connection_to_a_tls_port_is_told(tls_server: RabbitMQServer, queue: str) -> None:
    error = how_publishing_fails(with_option(tls_server.url.replace("amqps://", "amqp://"), timeout=2), queue)

    assert type(error) is BrokerUnavailable
    assert "write amqps:// instead of amqp://" in str(error)


# Rights.


@pytest.mark.slow
def test_who_may_not_configure_makes_no_queue_and_uses_those_that_are_there(server: RabbitMQServer, queue: str) -> None:
    url = server.url_as("may-not-configure", "secret")

    error = how_a_message_fails(url, queue)

    assert type(error) is BrokerRefused
    assert "may-not-configure has not the configure right on the queue" in str(error)
    with channel_at(server.url) as channel:
        channel.queue_declare(queue, durable=True)
    with open_transport(url) as transport:
        assert transport.publish([a_message(queue)]) == [STORED]


@pytest.mark.slow
@pytest.mark.parametrize("user", ["may-not-publish", "may-not-write"])
def test_who_may_not_write_is_refused_and_told_the_name_to_add(server: RabbitMQServer, queue: str, user: str) -> None:
    error = how_a_message_fails(server.url_as(user, "secret"), queue)

    assert type(error) is BrokerRefused
    assert "amq.default" in str(error)
    assert "secret" not in repr(error)


@pytest.mark.slow
def test_who_may_not_read_consumes_nothing(server: RabbitMQServer, queue: str) -> None:
    with open_transport(server.url_as("may-not-read", "secret")) as transport:
        assert transport.publish([a_message(queue)]) == [STORED]
        with pytest.raises(BrokerRefused, match="has not the read right on the queue"):
            consume_one(transport, queue)


@pytest.mark.slow
def test_who_has_no_rights_in_the_virtual_host_is_refused(server: RabbitMQServer, queue: str) -> None:
    error = how_publishing_fails(with_option(server.url_as("nobody", "secret"), timeout=2), queue)

    assert type(error) is BrokerRefused
    assert "nobody has no rights in the virtual host /" in str(error)


@pytest.mark.slow
def test_who_may_not_publish_gives_back_what_was_received_as_it_is(server: RabbitMQServer, queue: str) -> None:
    """No copy can be published, and the worker goes on."""
    with open_transport(server.url) as owner:
        owner.publish(numbered(queue, 3))
    with (
        open_transport(server.url_as("may-not-publish", "secret")) as transport,
        transport.consumer([queue], lease=60, prefetch=1, name="one") as consumer,
    ):
        (first,) = consumer.receive(1, PATIENCE)

        consumer.release([first])

        attempts = {}
        while len(attempts) < 3:
            (each,) = consumer.receive(1, PATIENCE)
            attempts[each.message.id] = each.attempt
            assert settle(consumer, [each]) == [SettleOutcome.SETTLED]
        assert attempts.pop(first.message.id) == 2
        assert set(attempts.values()) == {1}


# Queues of other people's.


OTHERWISE: dict[str, dict[str, object]] = {
    "classic, with priorities": {"x-max-priority": 5},
    "classic, bounded": {"x-max-length": 1000, "x-message-ttl": 3_600_000},
    "lazy": {"x-queue-mode": "lazy"},
    "quorum, with a limit": {"x-queue-type": "quorum", "x-delivery-limit": 50},
}


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
@pytest.mark.parametrize("arguments", OTHERWISE.values(), ids=OTHERWISE)
def test_a_queue_that_somebody_declared_otherwise_is_used_as_it_is(
    rabbitmq_place: str, queue: str, queue_type: str, arguments: dict[str, object]
) -> None:
    with channel_at(rabbitmq_place) as channel:
        channel.queue_declare(at_server(rabbitmq_place, queue), durable=True, arguments=arguments)

    with (
        open_transport(with_option(rabbitmq_place, queue_type=queue_type)) as transport,
        transport.consumer([queue], lease=60, prefetch=10, name="one") as consumer,
    ):
        assert transport.publish(numbered(queue, 5)) == [STORED] * 5
        assert transport.publish([a_message(queue, b"later", due_in=0.2)]) == [STORED]
        assert sorted(collect(consumer, 6)) == [b"0", b"1", b"2", b"3", b"4", b"later"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"x-max-length": 10}, "its x-"), ({"x-queue-type": "classic"}, "its x-queue-type differs")],
)
def test_the_doctor_tells_of_queues_that_somebody_declared_otherwise(
    rabbitmq_place: str, queue: str, arguments: dict[str, object], words: str
) -> None:
    with channel_at(rabbitmq_place) as channel:
        channel.queue_declare(at_server(rabbitmq_place, queue), durable=True, arguments=arguments)
    with open_transport(rabbitmq_place) as transport:
        transport.publish([a_message(f"{queue}-ours")])

        found = transport.warnings([queue, f"{queue}-ours", f"{queue}-missing", f"reply.{queue}"])

    (warning,) = [warning for warning in found if queue in warning]
    assert f"the queue {at_server(rabbitmq_place, queue)} was not declared by ekiden" in warning
    assert words in warning


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        ({"x-queue-type": "quorum"}, None),
        ({"x-queue-type": "quorum", "x-delivery-limit": 7}, 7),
        ({"x-queue-type": "classic"}, 0),
    ],
    ids=["no limit", "a limit", "classic"],
)
def test_a_queue_that_drops_what_comes_back_too_often_is_told(
    rabbitmq_place: str, queue: str, arguments: dict[str, object], limit: int | None
) -> None:
    """Without a limit of its own, a quorum queue has the server's: 20 from 4.0 on, none before."""
    with channel_at(rabbitmq_place) as channel:
        channel.queue_declare(at_server(rabbitmq_place, queue), durable=True, arguments=arguments)
    with open_transport(rabbitmq_place) as transport:
        assert isinstance(transport, RabbitMQTransport)
        transport.publish([a_message(f"{queue}-ours")])
        assert transport._publishing.server is not None
        of_the_server = transport._publishing.server.differences.delivery_limit
        expected = of_the_server if limit is None else limit

        found = transport.delivery_limits([queue, f"{queue}-ours", f"{queue}-missing", f"reply.{queue}"])
        warnings = " ".join(transport.warnings([queue]))

    assert found == ({queue: expected} if expected else {})
    assert (f"comes back more than {expected} times" in warnings) is bool(expected)


def test_a_worker_says_at_its_start_what_the_server_would_drop(rabbitmq_place: str) -> None:
    with channel_at(rabbitmq_place) as channel:
        limited = {"x-queue-type": "quorum", "x-delivery-limit": 7}
        channel.queue_declare(at_server(rabbitmq_place, "default"), durable=True, arguments=limited)
    with Ekiden("ours", broker=rabbitmq_place) as app:

        @app.task(max_deliveries=8)
        def stubborn() -> None: ...

        @app.task(max_deliveries=7)
        def ordinary() -> None: ...

        found = [warning for warning in Worker(app, WorkerOptions()).warnings() if "drops" in warning]

    (warning,) = found
    assert "more than 7 times" in warning
    assert stubborn.name in warning
    assert ordinary.name not in warning


@pytest.mark.parametrize("name", ["ü" * 64, "世" * 40])
def test_asking_how_a_queue_was_declared_harms_no_consumer(rabbitmq_url: str, name: str) -> None:
    """Servers from 4.0 on end the connection for an answer that is too long in bytes."""
    with channel_at(rabbitmq_url) as channel, open_transport(rabbitmq_url) as transport:
        channel.queue_declare(name, durable=True, arguments={"x-max-length": 10, "x-queue-type": "classic"})
        queue = f"test-{new_id()}"
        transport.publish([a_message(queue)])
        with transport.consumer([queue], lease=60, prefetch=1, name="one") as consumer:
            held = consumer.receive(1, PATIENCE)

            assert name in " ".join(transport.warnings([name]))
            assert transport.delivery_limits([name]) == {}

            assert settle(consumer, held) == [SettleOutcome.SETTLED]
        channel.queue_delete(name)


def test_a_queue_for_whose_name_the_server_hangs_up_harms_no_other(rabbitmq_url: str) -> None:
    """What a server of 4.0 says of one that is another connection's own has too many bytes."""
    name, queue = "世" * 20, f"test-{new_id()}"
    with channel_at(rabbitmq_url) as channel, open_transport(rabbitmq_url) as transport:
        channel.queue_declare(name, exclusive=True)

        for _ in range(3):
            answers = transport.publish([a_message(queue), a_message(name), a_message(queue)])

            assert [answer.outcome.value for answer in answers] == ["stored", "failed", "stored"]
            assert isinstance(answers[1].error, BrokerUnavailable)


def test_the_doctor_tells_of_a_queue_that_the_server_forgets(rabbitmq_place: str, queue: str) -> None:
    with channel_at(rabbitmq_place) as channel:
        channel.queue_declare(at_server(rabbitmq_place, queue), durable=False)

        with open_transport(f"{rabbitmq_place}&queue_type=classic") as transport:
            found = transport.warnings([queue])

    assert any("is not durable" in warning for warning in found)


def test_a_queue_that_is_one_connections_own_is_told(rabbitmq_place: str, queue: str) -> None:
    name = at_server(rabbitmq_place, queue)
    with channel_at(rabbitmq_place) as channel:
        channel.queue_declare(name, exclusive=True)

        error = how_a_message_fails(rabbitmq_place, queue)

    assert type(error) is BrokerUnavailable
    assert f"{name} belongs to another connection alone" in str(error)


def test_a_name_of_the_servers_own_is_refused_and_spoils_no_batch(rabbitmq_url: str, queue: str) -> None:
    queue = f"test-{queue}"
    with open_transport(rabbitmq_url) as transport:
        answers = transport.publish([a_message(queue), a_message("amq.mine"), a_message(queue)])

    assert [answer.outcome for answer in answers] == [
        PublishOutcome.STORED,
        PublishOutcome.FAILED,
        PublishOutcome.STORED,
    ]
    assert type(answers[1].error) is BrokerRefused
    assert "begin with amq." in str(answers[1].error)


def test_a_queue_deleted_under_a_publisher_is_made_again(rabbitmq_place: str, queue: str) -> None:
    with open_transport(rabbitmq_place) as transport:
        transport.publish([a_message(queue, b"deleted")])
        with channel_at(rabbitmq_place) as channel:
            channel.queue_delete(at_server(rabbitmq_place, queue))

        assert transport.publish(numbered(queue, 3)) == [STORED] * 3

        with transport.consumer([queue], lease=60, prefetch=10, name="one") as consumer:
            assert collect(consumer, 3) == [b"0", b"1", b"2"]


def test_a_queue_deleted_under_a_consumer_is_made_again(rabbitmq_place: str, queue: str) -> None:
    with (
        open_transport(rabbitmq_place) as transport,
        transport.consumer([queue], lease=60, prefetch=10, name="one") as consumer,
    ):
        transport.publish([a_message(queue, b"before")])
        assert collect(consumer, 1) == [b"before"]
        with channel_at(rabbitmq_place) as channel:
            channel.queue_delete(at_server(rabbitmq_place, queue))

        eventually(lambda: published(transport, queue, b"after"), what="published")

        assert collect(consumer, 1) == [b"after"]


@pytest.mark.slow
def test_delays_find_a_queue_that_was_deleted_and_made_again(rabbitmq_place: str, queue: str) -> None:
    name = at_server(rabbitmq_place, queue)
    with (
        open_transport(rabbitmq_place) as transport,
        transport.consumer([queue], lease=60, prefetch=10, name="one") as consumer,
    ):
        transport.publish([a_message(queue, b"first", due_in=0.1)])
        assert collect(consumer, 1) == [b"first"]
        transport.publish([a_message(queue, b"delayed before", due_in=2.0)])
        with channel_at(rabbitmq_place) as channel:
            channel.queue_delete(name)
        eventually(lambda: published(transport, queue, b"now"), what="published")

        assert transport.publish([a_message(queue, b"delayed after", due_in=0.3)]) == [STORED]

        assert sorted(collect(consumer, 3)) == [b"delayed after", b"delayed before", b"now"]


# Too large.


@pytest.mark.slow
def test_a_message_that_is_too_large_is_refused_and_spoils_no_batch(server: RabbitMQServer, queue: str) -> None:
    large = a_message(queue, b"x" * (LARGEST_MESSAGE + 1))
    good = numbered(queue, 20)
    with (
        open_transport(server.url) as transport,
        transport.consumer([queue], lease=60, prefetch=100, name="one") as consumer,
    ):
        answers = transport.publish([*good[:10], large, *good[10:]])

        assert [answer.outcome for answer in answers].count(PublishOutcome.FAILED) == 1
        assert type(answers[10].error) is BrokerRefused
        assert f"this server takes {LARGEST_MESSAGE}" in str(answers[10].error)
        assert set(collect(consumer, 20)) == {b"%d" % number for number in range(20)}
        assert transport.publish([a_message(queue, b"x" * LARGEST_MESSAGE)]) == [STORED]


@pytest.mark.slow
def test_a_follow_up_that_is_too_large_fails_its_ending_and_the_delivery_stays_held(
    server: RabbitMQServer, queue: str
) -> None:
    with (
        open_transport(server.url) as transport,
        transport.consumer([queue], lease=60, prefetch=10, name="one") as consumer,
    ):
        transport.publish(numbered(queue, 2))
        first, second = [delivery for _ in range(2) for delivery in consumer.receive(1, PATIENCE)]
        large = a_message(f"{queue}-next", b"x" * (LARGEST_MESSAGE + 1))

        spoiled, good = consumer.settle([Ending(first, (large,)), Ending(second)])

        assert spoiled.outcome is SettleOutcome.FAILED
        assert type(spoiled.error) is BrokerRefused
        assert good.outcome is SettleOutcome.SETTLED
        assert settle(consumer, [first]) == [SettleOutcome.SETTLED]


# Alarms and operators.


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_alarm_stops_publishing_in_bounded_time_and_nothing_else(server: RabbitMQServer, queue: str) -> None:
    url = with_option(server.url, timeout=3)
    with (
        open_transport(url) as transport,
        transport.consumer([queue], lease=60, prefetch=5, name="one") as consumer,
    ):
        transport.publish(numbered(queue, 10))
        held = consumer.receive(5, PATIENCE)
        server.ctl("set_vm_memory_high_watermark", "0.00001")
        try:
            error = eventually(lambda: how_it_is_blocked(transport, queue), what="publishing is blocked", within=30)
            assert "low on memory" in str(error)
            assert settle(consumer, held) == [SettleOutcome.SETTLED] * len(held)
            assert len(collect(consumer, 10 - len(held))) == 10 - len(held)
        finally:
            server.ctl("set_vm_memory_high_watermark", "0.4")

        eventually(lambda: published(transport, queue, b"recovered"), what="publishing recovers", within=30)
        assert b"recovered" in collect(consumer, 1) or b"recovered" in collect(consumer, 1)


def how_it_is_blocked(transport: Transport, queue: str) -> BrokerUnavailable | None:
    """The error of a publish that ended in bounded time; None when it was stored."""
    started = time.monotonic()
    error = publishing_error(transport, f"{queue}-blocked")
    assert time.monotonic() - started < BOUNDED_SECONDS
    assert error is None or isinstance(error, BrokerUnavailable)
    return error


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_connections_that_an_operator_closes_are_opened_again(server: RabbitMQServer, queue: str) -> None:
    with (
        open_transport(server.url) as transport,
        transport.consumer([queue], lease=60, prefetch=5, name="one") as consumer,
        transport.listen(queue) as listener,
    ):
        transport.publish([a_message(queue, b"before")])
        (held,) = consumer.receive(1, PATIENCE)

        server.ctl("close_all_connections", "for maintenance")

        assert eventually(lambda: settled(consumer, held), what="answered", within=30) is SettleOutcome.LOST
        eventually(lambda: published(transport, queue, b"after"), what="publishing works again", within=30)
        assert set(collect(consumer, 2)) == {b"before", b"after"}
        eventually(lambda: heard(transport, listener.receive, queue), what="a broadcast is heard", within=30)


def settled(consumer: Consumer, held: object) -> SettleOutcome | None:
    """What became of it, once the server could be asked."""
    (outcome,) = settle(consumer, [held])  # type: ignore[list-item]
    return None if outcome is SettleOutcome.FAILED else outcome


def heard(transport: Transport, receive: Callable[[float], list[bytes]], topic: str) -> bool:
    """Whether a broadcast reaches the listener."""
    try:
        transport.broadcast(topic, [b"still there?"])
        return bool(receive(1.0))
    except BrokerUnavailable:
        return False
