"""What MongoDB refuses is told in one clear sentence, in bounded time, and nothing else is lost by it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable, ConfigurationError, TransportError
from ekiden.message import SETTLED, STORED, Ending, PublishOutcome, SettleOutcome, new_id
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import a_message, bodies, numbered, settle
from ekiden.transport import Transport

from tests.servers.certificates import Certificates
from tests.servers.mongodb import MongoDBServer
from tests.servers.processes import HOST, free_port
from tests.servers.running import running

BOUNDED_SECONDS = 8.0
"""Every refusal has come by then, with ``timeout=2`` in the URL."""

ROOT, READER, WRITER, PASSWORD = "root", "reader", "writer", "s3cret"

MIB = 1024 * 1024


@pytest.fixture
def queue() -> str:
    return f"queue-{new_id()}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoDBServer]:
    """A server that asks everybody who they are, with a user who may only read, and one who may read and write."""
    directory = tmp_path_factory.mktemp("mongodb-refusals")
    with running(lambda: MongoDBServer(directory, username=ROOT, password=PASSWORD)) as server:
        server.add_user(READER, PASSWORD, "read")
        server.add_user(WRITER, PASSWORD, "readWrite")
        yield server


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[MongoDBServer]:
    directory = tmp_path_factory.mktemp("mongodb-tls")
    with running(lambda: MongoDBServer(directory, certificates=certificates)) as server:
        yield server


@pytest.fixture
def transport(mongodb_place: str) -> Iterator[Transport]:
    with open_transport(mongodb_place) as transport:
        yield transport


def with_option(url: str, option: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{option}"


def complaint(url: str) -> TransportError:
    """What is raised when a message is sent there, which takes bounded time and shows no password."""
    began = time.monotonic()
    with open_transport(with_option(url, "timeout=2")) as transport:
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
            (None, None, "does not permit somebody without user name and password"),
            (ROOT, f"{PASSWORD}-wrong", "refused the user name or the password"),
            ("nobody", PASSWORD, "refused the user name or the password"),
        ],
    )
    def test_it_is_said(self, server: MongoDBServer, username: str | None, password: str | None, words: str) -> None:
        error = complaint(server.url_as(username, password))

        assert isinstance(error, BrokerRefused)
        assert words in str(error)
        assert str(server.port) in str(error)

    def test_where_the_user_is_known_is_asked(self, server: MongoDBServer) -> None:
        error = complaint(server.url_as(ROOT, PASSWORD).replace("authSource=admin", "w=1"))

        assert isinstance(error, BrokerRefused)
        assert "authSource=admin" in str(error)

    def test_a_user_without_the_right_to_write_is_told_which_role_is_missing(
        self, server: MongoDBServer, queue: str
    ) -> None:
        url = server.url_as(READER, PASSWORD)

        error = complaint(url)

        assert isinstance(error, BrokerRefused)
        assert f"does not permit the user {READER!r}" in str(error)
        assert "role readWrite on the database 'ekiden-tests'" in str(error)

    def test_a_consumer_of_such_a_user_is_refused_and_holds_nothing(self, server: MongoDBServer, queue: str) -> None:
        with open_transport(server.url) as allowed:
            allowed.publish(numbered(queue, 3))
            with open_transport(server.url_as(READER, PASSWORD)) as transport, pytest.raises(BrokerRefused):
                transport.consumer([queue], lease=60.0, prefetch=10, name=queue).receive(1, 0)

            assert allowed.depth(queue).ready == 3

    def test_a_user_who_may_read_and_write_can_work(self, server: MongoDBServer, queue: str) -> None:
        with open_transport(server.url_as(WRITER, PASSWORD)) as transport, transport.listen(queue) as listener:
            assert transport.publish([a_message(queue, b"x")]) == [STORED]
            with transport.consumer([queue], lease=60.0, prefetch=1, name=queue) as consumer:
                (delivery,) = consumer.receive(1, 5.0)
                assert consumer.settle([Ending(delivery, (a_message(f"{queue}-next"),))]) == [SETTLED]
            transport.broadcast(queue, [b"heard"])
            assert listener.receive(5.0) == [b"heard"]
            assert transport.purge(f"{queue}-next") == 1


class TestWhereNobodyIs:
    def test_an_unknown_host_is_said(self) -> None:
        error = complaint("mongodb://no-such-host.invalid/")

        assert isinstance(error, BrokerUnavailable)
        assert "no-such-host.invalid" in str(error)

    def test_a_port_that_nobody_listens_on_is_said(self) -> None:
        error = complaint(f"mongodb://{HOST}:{free_port()}/")

        assert isinstance(error, BrokerUnavailable)
        assert "Connection refused" in str(error)

    def test_a_server_that_says_nothing_is_given_up(self) -> None:
        with socket.create_server((HOST, 0)) as silent:
            error = complaint(f"mongodb://{HOST}:{silent.getsockname()[1]}/")

        assert isinstance(error, BrokerUnavailable)
        assert "did not answer within 2 s" in str(error)

    def test_another_replica_set_is_said(self, server: MongoDBServer) -> None:
        error = complaint(with_option(server.url_as(ROOT, PASSWORD), "replicaSet=another"))

        assert isinstance(error, BrokerUnavailable)
        assert "replicaSet=" in str(error)


class TestTLS:
    def test_it_works_with_the_authority(self, encrypted: MongoDBServer, queue: str) -> None:
        with open_transport(encrypted.url) as transport:
            message = a_message(queue, bytes(range(256)) * 20_000)
            assert transport.publish([message]) == [STORED]
            with transport.consumer([queue], lease=60.0, prefetch=10, name=queue) as consumer:
                assert consumer.receive(1, 5.0)[0].message == message

    def test_without_its_authority_the_server_is_not_trusted(self, encrypted: MongoDBServer) -> None:
        error = complaint(f"mongodb://{HOST}:{encrypted.port}/?tls=true")

        assert isinstance(error, BrokerRefused)
        assert "its certificate is not accepted" in str(error)

    def test_a_server_with_tls_that_is_spoken_to_without_is_said(self, encrypted: MongoDBServer) -> None:
        error = complaint(f"mongodb://{HOST}:{encrypted.port}/")

        assert isinstance(error, BrokerUnavailable)
        assert "tls=true" in str(error)


class TestWhatIsWrongWithAURL:
    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("mongodb://h/?no_such_option=1", "there is no option 'no_such_option'"),
            ("mongodb://h/?Prefix=1", "there is no option 'Prefix'"),
            ("mongodb+srv://h/?no_such_option=1", "there is no option 'no_such_option'"),
            ("mongodb://h/?w=1&w=2", "'w' is given twice"),
            ("mongodb://h/?readPreference=nearby", "nearby"),
            ("mongodb://h/?timeout=0", "timeout is a number of seconds"),
            ("mongodb://h/?timeout=soon", "timeout"),
            ("mongodb://h/?max_message_bytes=-1", "max_message_bytes"),
            ("mongodb://h/?prefix=", "a prefix has 1 to 100"),
            ("mongodb://h/?prefix=a$b", "cannot begin the name of a collection"),
            ("mongodb://h/?prefix=system.a", "cannot begin the name of a collection"),
            ("mongodb://h/?prefix=a.", "cannot begin the name of a collection"),
            ("mongodb://h/?tlsCAFile=/no/such/file", "/no/such/file"),
            ("mongodb://h/a.b", "is not the name of a database"),
            ("mongodb://h/a%20b", "is not the name of a database"),
            ("mongodb://h/a/b", "is not the name of a database"),
            ("mongodb://h/a$b", "is not the name of a database"),
            (f"mongodb://h/{'d' * 64}", "at most 63 bytes"),
            ("mongodb+srv://h:27017/", "one host without a port"),
            ("mongodb+srv://a,b/", "one host without a port"),
            ("mongodb+tcp://h/", "there is no variant 'tcp'"),
            ("mongodb://user:s3cr@t@h/", "must be escaped"),
            ("mongodb://a,b/?directConnection=true", "multiple hosts"),
        ],
    )
    def test_it_is_said_before_anything_is_connected(self, url: str, words: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            open_transport(url)

        assert words in str(caught.value)
        assert "s3cr" not in str(caught.value)


class TestWhatIsTooLarge:
    def test_a_message_is_refused_alone(self, transport: Transport, queue: str) -> None:
        large = a_message(queue, b"x" * (15 * MIB + 1))
        wordy = a_message(queue, b"x" * 15 * MIB, headers={"long": "x" * MIB})

        answers = transport.publish([*numbered(queue, 2), large, wordy, a_message(f"{queue}-other")])

        stored, failed = PublishOutcome.STORED, PublishOutcome.FAILED
        assert [answer.outcome for answer in answers] == [stored, stored, failed, failed, stored]
        assert isinstance(answers[2].error, BrokerRefused)
        assert "max_message_bytes is 15728640" in str(answers[2].error)
        assert isinstance(answers[3].error, BrokerRefused)
        assert "16 MiB" in str(answers[3].error)
        with transport.consumer([queue], lease=60.0, prefetch=10, name=queue) as consumer:
            assert bodies(consumer.receive(10, 5.0)) == [b"0", b"1"]

    @pytest.mark.slow
    def test_the_largest_messages_go_through(self, mongodb_place: str, queue: str) -> None:
        messages = [a_message(queue, b"%d" % number + b"x" * (15 * MIB - 1)) for number in range(3)]

        with (
            open_transport(with_option(mongodb_place, "timeout=60")) as transport,
            transport.consumer([queue], lease=60.0, prefetch=10, name=queue) as consumer,
        ):
            assert transport.publish(messages) == [STORED] * 3
            received = consumer.receive(10, 5.0)
            assert [delivery.message.body[:1] for delivery in received] == [b"0", b"1", b"2"]
            assert set(settle(consumer, received)) == {SettleOutcome.SETTLED}

    def test_an_ending_that_it_follows_stays_held_alone(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 3))
        with transport.consumer([queue], lease=60.0, prefetch=10, name=queue) as consumer:
            held = consumer.receive(3, 5.0)
            large = a_message(f"{queue}-next", b"x" * (15 * MIB + 1))
            endings = [Ending(held[0], (a_message(f"{queue}-next"),)), Ending(held[1], (large,)), Ending(held[2])]

            answers = consumer.settle(endings)

            settled, failed = SettleOutcome.SETTLED, SettleOutcome.FAILED
            assert [answer.outcome for answer in answers] == [settled, failed, settled]
            assert isinstance(answers[1].error, BrokerRefused)
            assert consumer.extend([held[1]]) == [SETTLED]
            assert consumer.settle([Ending(held[1])]) == [SETTLED]

    @pytest.mark.parametrize("headers", [{"x": float("nan")}, {"x": float("inf")}, {"x": "\ud800"}])
    def test_what_cannot_be_written_is_refused_alone(
        self, transport: Transport, queue: str, headers: dict[str, float | str]
    ) -> None:
        answers = transport.publish([a_message(queue), a_message(queue, headers={**headers})])

        assert [answer.outcome for answer in answers] == [PublishOutcome.STORED, PublishOutcome.FAILED]
        assert isinstance(answers[1].error, BrokerRefused)

    def test_a_due_time_that_is_none_is_refused_and_one_that_is_far_away_is_not(
        self, transport: Transport, queue: str
    ) -> None:
        never, far = a_message(queue, due_in=float("inf")), a_message(queue, due_in=9e8 * 30)

        answers = transport.publish([never, far])

        assert [answer.outcome for answer in answers] == [PublishOutcome.FAILED, PublishOutcome.STORED]
        assert [seen.message for seen in transport.browse(queue)] == [far]
        assert transport.depth(queue).delayed == 1
