"""What Redis refuses is told in one clear sentence, in bounded time, and nothing else is lost by it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportError
from ekiden.message import SETTLED, STORED, Delivery, Ending, PublishOutcome, SettleOutcome, new_id
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import a_message, bodies, numbered, settle
from ekiden.transport import Transport
from ekiden_redis.keys import CLUSTER_SLOTS, queue_keys, slot_of

from tests.servers.certificates import Certificates
from tests.servers.processes import HOST, free_port
from tests.servers.redis import RedisClusterOfThree, RedisServer
from tests.servers.running import running

BOUNDED_SECONDS = 5.0
"""Every refusal has come by then, with ``timeout=1`` in the URL."""

PASSWORD = "s3cret"
USERS = {
    "no-scripts": ("~*", "+@read", "+@connection"),
    "other-keys": ("~other*", "+@all"),
    "no-administrator": ("~*", "+@all", "-@admin", "-@dangerous"),
}


@pytest.fixture
def queue() -> str:
    return f"queue-{new_id()}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server with a password, with users of few rights, which takes small messages only."""
    directory = tmp_path_factory.mktemp("redis-refusals")
    options = {"proto-max-bulk-len": "1mb"}
    with running(lambda: RedisServer(directory, password=PASSWORD, options=options)) as server:
        with server.client() as client:
            for name, rights in USERS.items():
                client.execute_command("ACL", "SETUSER", name, "on", f">{PASSWORD}", *rights)
        yield server


@pytest.fixture
def transport(server: RedisServer) -> Iterator[Transport]:
    with open_transport(f"{server.url}?timeout=5") as transport:
        yield transport


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[RedisServer]:
    directory = tmp_path_factory.mktemp("redis-tls")
    with running(lambda: RedisServer(directory, certificates=certificates)) as server:
        yield server


def complaint(url: str) -> TransportError:
    """What is raised when a message is sent there, which takes bounded time and shows no password."""
    began = time.monotonic()
    with open_transport(f"{url}{'&' if '?' in url else '?'}timeout=1") as transport:
        try:
            (answer,) = transport.publish([a_message("queue")])
        except TransportError as error:
            found: Exception | None = error
        else:
            assert answer.outcome is PublishOutcome.FAILED
            found = answer.error
    assert time.monotonic() - began < BOUNDED_SECONDS
    assert isinstance(found, TransportError)
    assert PASSWORD not in repr(found) + repr(found.__cause__)
    return found


class TestWhoMayNot:
    @pytest.mark.parametrize(
        ("username", "password", "words"),
        [
            (None, None, "wants a password"),
            (None, f"{PASSWORD}-wrong", "refused the user name or the password"),
            ("nobody", PASSWORD, "refused the user name or the password"),
            ("no-scripts", PASSWORD, "does not permit this user"),
            ("other-keys", PASSWORD, "does not permit this user"),
        ],
    )
    def test_it_is_said(self, server: RedisServer, username: str | None, password: str | None, words: str) -> None:
        error = complaint(server.url_as(username, password))

        assert isinstance(error, BrokerRefused)
        assert words in str(error)
        assert str(server.port) in str(error)

    def test_a_user_without_administrators_rights_can_work(self, server: RedisServer, queue: str) -> None:
        with open_transport(server.url_as("no-administrator", PASSWORD)) as transport:
            assert transport.publish([a_message(queue, b"x")]) == [STORED]
            with transport.consumer([queue], lease=60.0, prefetch=1, name=queue) as consumer:
                assert settle(consumer, consumer.receive(1, 5.0)) == [SettleOutcome.SETTLED]

            (warning,) = transport.warnings([queue])

        assert "may not send INFO" in warning

    def test_a_password_where_there_is_none_is_said(self, encrypted: RedisServer, certificates: Certificates) -> None:
        error = complaint(f"rediss://:{PASSWORD}@{HOST}:{encrypted.port}/0?cafile={certificates.authority}")

        assert isinstance(error, BrokerRefused)
        assert "has no password" in str(error)


class TestWhereNobodyIs:
    def test_an_unknown_host_is_said(self) -> None:
        error = complaint("redis://no-such-host.invalid/0")

        assert isinstance(error, BrokerUnavailable)
        assert "there is no host of this name" in str(error)

    def test_a_port_that_nobody_listens_on_is_said(self) -> None:
        error = complaint(f"redis://{HOST}:{free_port()}/0")

        assert isinstance(error, BrokerUnavailable)
        assert "Connection refused" in str(error)

    def test_a_socket_that_is_not_there_is_said(self) -> None:
        error = complaint("unix:///no/such/redis.sock")

        assert isinstance(error, BrokerUnavailable)
        assert "/no/such/redis.sock" in str(error)

    def test_a_server_that_says_nothing_is_given_up(self) -> None:
        with socket.create_server((HOST, 0)) as silent:
            error = complaint(f"redis://{HOST}:{silent.getsockname()[1]}/0")

        assert isinstance(error, BrokerUnavailable)
        assert "did not answer within 1 s" in str(error)


class TestWhatIsNotThere:
    def test_a_database_that_is_not_there_is_said(self, server: RedisServer) -> None:
        error = complaint(server.url.removesuffix("0") + "99")

        assert isinstance(error, BrokerRefused)
        assert "does not have that database" in str(error)

    def test_one_server_is_no_cluster(self, server: RedisServer) -> None:
        error = complaint(server.url.replace("redis://", "redis+cluster://"))

        assert isinstance(error, BrokerRefused)
        assert "write redis:// instead of redis+cluster://" in str(error)

    def test_a_server_is_no_sentinel(self, server: RedisServer) -> None:
        error = complaint(f"redis+sentinel://{HOST}:{server.port}/tasks?sentinel_password={PASSWORD}")

        assert isinstance(error, BrokerRefused)
        assert "does not know a command" in str(error)

    @pytest.mark.slow
    def test_one_of_a_cluster_is_not_one_server(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        with running(lambda: RedisClusterOfThree(tmp_path_factory.mktemp("cluster"))) as cluster:
            slot = slot_of(queue_keys("ekiden", "queue").messages)
            another = cluster.nodes[(slot * 3 // CLUSTER_SLOTS + 1) % 3]  # not the one that has the queue

            error = complaint(another.url)

        assert isinstance(error, BrokerRefused)
        assert "write redis+cluster:// instead of redis://" in str(error)


class TestTLS:
    def test_it_works_with_the_authority_and_with_a_certificate_of_ours(
        self, encrypted: RedisServer, certificates: Certificates, queue: str
    ) -> None:
        options = f"cafile={certificates.authority}&certfile={certificates.client}&keyfile={certificates.client_key}"
        with open_transport(f"{encrypted.url}?{options}") as transport:
            message = a_message(queue, bytes(range(256)) * 20_000)
            assert transport.publish([message, *numbered(queue, 300)]) == [STORED] * 301
            with transport.consumer([queue], lease=60.0, prefetch=1000, name=queue) as consumer:
                assert consumer.receive(1, 5.0)[0].message == message
                assert len(consumer.receive(256, 5.0)) == 256

    def test_without_its_authority_the_server_is_not_trusted(self, encrypted: RedisServer) -> None:
        error = complaint(encrypted.url)

        assert isinstance(error, BrokerRefused)
        assert "its certificate is not accepted" in str(error)

    def test_a_certificate_for_another_name_is_not_accepted(
        self, encrypted: RedisServer, certificates: Certificates
    ) -> None:
        error = complaint(f"{encrypted.url}?cafile={certificates.authority}&server_hostname=other.example")

        assert isinstance(error, BrokerRefused)
        assert "other.example" in str(error)

    def test_nothing_is_checked_where_that_is_said(self, encrypted: RedisServer, queue: str) -> None:
        with open_transport(f"{encrypted.url}?verify=false") as transport:
            assert transport.publish([a_message(queue)]) == [STORED]

    def test_tls_to_a_server_without_it_is_said(self, server: RedisServer) -> None:
        error = complaint(server.url.replace("redis://", "rediss://"))

        assert isinstance(error, BrokerUnavailable)
        assert "redis:// is without TLS" in str(error)

    def test_a_server_with_tls_that_is_spoken_to_without_is_said(self, encrypted: RedisServer) -> None:
        error = complaint(encrypted.url.replace("rediss://", "redis://"))

        assert isinstance(error, BrokerUnavailable)
        assert "rediss://" in str(error)


@pytest.mark.parametrize("size", [2_000_000, 20_000_000], ids=["2 MB", "20 MB"])
class TestWhatIsTooLarge:
    def test_it_is_refused_alone(self, transport: Transport, queue: str, size: int) -> None:
        good = [a_message(queue, b"%d" % number) for number in range(4)]
        large = a_message(queue, b"x" * size)

        answers = transport.publish([*good[:2], large, good[2], a_message(f"{queue}-other")])
        later = transport.publish([good[3]])

        assert [answer.outcome for answer in answers] == [
            PublishOutcome.STORED,
            PublishOutcome.STORED,
            PublishOutcome.FAILED,
            PublishOutcome.STORED,
            PublishOutcome.STORED,
        ]
        assert isinstance(answers[2].error, BrokerRefused)
        assert "proto-max-bulk-len" in str(answers[2].error)
        assert later == [STORED]
        assert bodies(self.received(transport, queue, 4)) == [b"0", b"1", b"2", b"3"]

    def test_an_ending_that_it_follows_stays_held_alone(self, transport: Transport, queue: str, size: int) -> None:
        transport.publish(numbered(queue, 3))
        with transport.consumer([queue], lease=60.0, prefetch=10, name=queue) as consumer:
            held = consumer.receive(3, 5.0)
            large = a_message(f"{queue}-next", b"x" * size)
            endings = [Ending(held[0], (a_message(f"{queue}-next"),)), Ending(held[1], (large,)), Ending(held[2])]

            answers = consumer.settle(endings)

            assert [answer.outcome for answer in answers] == [
                SettleOutcome.SETTLED,
                SettleOutcome.FAILED,
                SettleOutcome.SETTLED,
            ]
            assert isinstance(answers[1].error, BrokerRefused)
            assert consumer.extend([held[1]]) == [SETTLED]
            assert consumer.settle([Ending(held[1])]) == [SETTLED]

    def received(self, transport: Transport, queue: str, count: int) -> list[Delivery]:
        with transport.consumer([queue], lease=60.0, prefetch=count, name=queue) as consumer:
            return consumer.receive(count, 5.0)


def test_a_body_above_max_message_bytes_is_refused_alone(server: RedisServer, queue: str) -> None:
    with open_transport(f"{server.url}?max_message_bytes=10") as transport:
        answers = transport.publish([a_message(queue, b"x" * 11), a_message(queue, b"x" * 10)])

        assert [answer.outcome for answer in answers] == [PublishOutcome.FAILED, PublishOutcome.STORED]
        assert "max_message_bytes is 10" in str(answers[0].error)
