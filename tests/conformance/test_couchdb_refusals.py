"""What CouchDB refuses is told in one clear sentence, in bounded time, and nothing else is lost by it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportError
from ekiden.message import (
    DUPLICATE,
    SETTLED,
    STORED,
    Delivery,
    Ending,
    Message,
    PublishOutcome,
    SettleOutcome,
    new_id,
)
from ekiden.plugins import open_backend, open_transport
from ekiden.results import BeginOutcome, Begun, Start, StoredResult
from ekiden.testing.conformance.fixtures import a_message, bodies, eventually, numbered, settle
from ekiden.testing.conformance.pace import assert_quick
from ekiden.testing.proxy import Proxy
from ekiden.transport import Consumer, Transport
from ekiden.urls import parse_url

from tests.servers.certificates import Certificates
from tests.servers.couchdb import CouchDBServer, GivenCouchDB, remove_databases
from tests.servers.couchdb_cluster import CouchDBCluster, playing
from tests.servers.couchdb_http import ADMIN
from tests.servers.discovery import COUCHDB_VARIABLE
from tests.servers.places import own_prefix, with_path
from tests.servers.processes import HOST, free_port
from tests.servers.running import running
from tests.servers.tls_front import TLSFront

BOUNDED_SECONDS = 5.0
"""Every refusal has come by then, with ``timeout=1`` in the URL."""

ADMINISTRATOR, USER, PASSWORD = "administrator", "jane", "s3cret"
"""At a server of these tests' own; at one that TESTS_COUCHDB_URL names, the administrator is the URL's."""

SESSION_SECONDS = 2


@pytest.fixture
def queue() -> str:
    return f"queue-{new_id()}"


Server = CouchDBServer | GivenCouchDB


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an administrator and a user who is nothing but a user; sessions end after a moment.

    pouchdb-server counts whole seconds, rounded, and begins a session for each request with a password: if they lasted
    one second, some would be over at once. It then takes who asks for nobody, and crashes when nobody asks for a new
    database.
    """
    if named := os.environ.get(COUCHDB_VARIABLE):
        given = GivenCouchDB(named)
        with given.with_user(USER, PASSWORD, session_seconds=SESSION_SECONDS):
            yield given
        return
    directory = tmp_path_factory.mktemp("couchdb-refusals")
    configuration = {"admins": {ADMINISTRATOR: PASSWORD}, "couch_httpd_auth": {"timeout": SESSION_SECONDS}}
    (directory / "config.json").write_text(json.dumps(configuration))
    with running(lambda: CouchDBServer(directory, in_memory=True, username=ADMINISTRATOR, password=PASSWORD)) as server:
        with server.client() as client:
            client.add_user(USER, PASSWORD)
        yield server


@pytest.fixture
def place(server: Server) -> Iterator[str]:
    """Where nobody has been, for the administrator."""
    prefix = own_prefix()
    yield with_path(server.url, prefix)
    remove_databases(server.url, prefix)


@contextmanager
def a_server_that_says(answer: bytes, status: int, kind: str, *, with_date: bool = True) -> Iterator[str]:
    """The URL of a web server that says the same to everything."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status) if with_date else self.send_response_only(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer((HOST, 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.05,), name="a web server", daemon=True)
        thread.start()
        yield f"couchdb://{HOST}:{web.server_port}/"
        web.shutdown()
        thread.join()


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


def goes_through(transport: Transport, queue: str) -> bool:
    """A message is published, received and settled."""
    assert transport.publish([a_message(queue, b"x")]) == [STORED]
    with transport.consumer([queue], lease=60.0, prefetch=1, name=queue) as consumer:
        return settle(consumer, consumer.receive(1, 5.0)) == [SettleOutcome.SETTLED]


class TestWhoMayNot:
    @pytest.mark.parametrize("session", ["", "?auth=session"], ids=["basic", "session"])
    @pytest.mark.parametrize(
        ("username", "password"), [(ADMINISTRATOR, f"{PASSWORD}-wrong"), ("nobody", PASSWORD), (USER, "")]
    )
    def test_a_wrong_name_or_password_is_said(self, server: Server, username: str, password: str, session: str) -> None:
        name = server.username if username == ADMINISTRATOR else username
        error = complaint(server.url_as(name, password) + session)

        assert isinstance(error, BrokerRefused)
        assert "refused the user name or the password" in str(error)
        assert str(server.port) in str(error)

    @pytest.mark.parametrize("user", [None, USER])
    def test_who_may_not_make_databases_is_told_which_are_needed(self, user: str | None) -> None:
        with playing(copies=1, users={USER: (PASSWORD, [])}) as single:
            error = complaint(single.url("shop", user=user))

        assert isinstance(error, BrokerRefused)
        assert "has no database 'shop-messages' and does not permit us to make it" in str(error)

    @pytest.mark.parametrize("session", ["", "?auth=session"], ids=["basic", "session"])
    def test_a_user_without_administrators_rights_can_work_where_the_databases_are(
        self, server: Server, place: str, queue: str, session: str
    ) -> None:
        with open_transport(place) as transport, server.client() as client:
            assert goes_through(transport, queue)
            client.permit(USER, parse_url(place).path)  # CouchDB makes databases for administrators only

        with open_transport(with_path(server.url_as(USER, PASSWORD), parse_url(place).path) + session) as transport:
            assert goes_through(transport, queue)

    @pytest.mark.slow
    def test_a_session_that_has_ended_is_begun_anew(self, place: str, queue: str) -> None:
        # So that no database is to be made in a session that may be over; see ``server``.
        with open_transport(place) as transport:
            assert goes_through(transport, queue)

        with open_transport(f"{place}?auth=session") as transport:
            assert goes_through(transport, queue)
            later = time.monotonic() + 3.5
            eventually(lambda: time.monotonic() > later, what="the session has ended")

            assert goes_through(transport, queue)


class TestWhatIsRefusedUnread:
    """CouchDB answers who lacks a database or a session without reading what was sent, and closes the connection."""

    LARGE = 3 * 1024 * 1024

    @pytest.fixture
    def single(self) -> Iterator[CouchDBCluster]:
        with playing(copies=1, users={ADMINISTRATOR: (PASSWORD, [ADMIN])}) as single:
            yield single

    @pytest.mark.parametrize("size", [1, LARGE])
    def test_a_session_that_has_ended_is_begun_anew_by_every_call(
        self, single: CouchDBCluster, queue: str, size: int
    ) -> None:
        url = single.url("p", user=ADMINISTRATOR, options="?auth=session")
        body = b"x" * size
        with (
            open_transport(url) as transport,
            open_backend(url) as backend,
            transport.consumer([queue], lease=60.0, prefetch=9, name=queue) as consumer,
            transport.listen("topic") as listener,
        ):
            for number in range(4):
                held = self.first_of(consumer, transport, queue, body)
                result = StoredResult(f"{number}", "SUCCESS", 0, body)
                calls: list[tuple[Callable[..., object], tuple[object, ...], object]] = [
                    (transport.publish, ([a_message(queue, body)],), [STORED]),
                    (consumer.extend, (held,), [SETTLED]),
                    (consumer.settle, ([Ending(held[0])],), [SETTLED]),
                    (transport.broadcast, ("topic", [body]), None),
                    (backend.put, ([result],), [True]),
                    (backend.begin, ([Start(result.task_id, 1, "m")],), [Begun(BeginOutcome.ENDED, result)]),
                    (backend.write, (f"key {number}", body), 1),
                ]
                for call, arguments, expected in calls:
                    if number:  # the first time, databases are made
                        single.end_sessions()
                    assert call(*arguments) == expected
                assert listener.receive(5.0) == [body]
                held = consumer.receive(1, 5.0)
                assert consumer.settle([Ending(held[0])]) == [SETTLED]

    def first_of(self, consumer: Consumer, transport: Transport, queue: str, body: bytes) -> list[Delivery]:
        """A message that is held."""
        assert transport.publish([a_message(queue, body)]) == [STORED]
        return consumer.receive(1, 5.0)

    def test_large_broadcasts_go_where_the_databases_are_made(self, single: CouchDBCluster) -> None:
        url = single.url("p", user=ADMINISTRATOR)
        with open_transport(url) as transport:
            for _ in range(3):
                transport.broadcast("topic", [b"x" * self.LARGE])
            refused = [path for method, path, status in single.requests if method == "POST" and status == 404]

            with transport.listen("topic") as listener:
                transport.broadcast("topic", [b"heard"])
                assert listener.receive(5.0) == [b"heard"]

        assert refused == []

    def test_large_broadcasts_go_through_a_slow_wire(self, single: CouchDBCluster) -> None:
        host = parse_url(single.url("p", user=ADMINISTRATOR)).hosts[0]
        with (
            Proxy(host.name, host.port or 0) as proxy,
            open_transport(proxy.through(single.url("p", user=ADMINISTRATOR))) as transport,
            proxy.slow(piece_bytes=97, piece_seconds=0.002),
        ):
            for _ in range(3):
                transport.broadcast("topic", [bytes(range(256)) * 16])

    @pytest.mark.parametrize("part", ["messages", "results", "records", "events", "generations", "signals"])
    def test_a_database_that_is_lost_is_made_anew_by_what_is_large(
        self, single: CouchDBCluster, queue: str, part: str
    ) -> None:
        url = single.url("p", user=ADMINISTRATOR)
        with open_transport(url) as transport, open_backend(url) as backend:
            for again in (False, True):
                if again:
                    with single.changed:
                        for name in [name for name in single.databases if part in name]:
                            del single.databases[name]
                assert transport.publish([a_message(queue, b"x" * self.LARGE)]) == [STORED]
                transport.broadcast("topic", [b"x" * self.LARGE])
                assert backend.put([StoredResult(f"{again}", "SUCCESS", 0, b"x" * self.LARGE)]) == [True]
                assert backend.write(f"{again}", b"x" * self.LARGE) == 1

    def test_a_right_that_is_lacking_is_told_also_of_what_is_large(self, single: CouchDBCluster, queue: str) -> None:
        with open_transport(single.url("p", user=ADMINISTRATOR)) as transport:
            assert goes_through(transport, queue)
            single.users = {ADMINISTRATOR: (PASSWORD, [])}

            (answer,) = answers_of(transport, a_message(queue, b"x" * self.LARGE))

        assert isinstance(answer, BrokerRefused)
        assert "does not permit" in str(answer)


def answers_of(transport: Transport, message: Message) -> list[Exception | None]:
    """What is raised when it is published, or answered."""
    try:
        return [answer.error for answer in transport.publish([message])]
    except TransportError as error:
        return [error]


class TestWhereNobodyIs:
    def test_an_unknown_host_is_said(self) -> None:
        error = complaint("couchdb://no-such-host.invalid/")

        assert isinstance(error, BrokerUnavailable)
        assert "there is no host of this name" in str(error)

    def test_that_nobody_listens_is_said(self) -> None:
        port = free_port()

        error = complaint(f"couchdb://{HOST}:{port}/")

        assert isinstance(error, BrokerUnavailable)
        assert f"CouchDB at {HOST}:{port} cannot be reached: Connection refused." in str(error)

    def test_a_silent_server_is_given_up(self) -> None:
        with socket.create_server((HOST, 0)) as silent:
            error = complaint(f"couchdb://{HOST}:{silent.getsockname()[1]}/")

        assert isinstance(error, BrokerUnavailable)
        assert "did not answer within 1 s" in str(error)

    def test_the_next_of_several_hosts_is_asked(self, server: Server, place: str, queue: str) -> None:
        several = place.replace(f"{HOST}:{server.port}", f"{HOST}:{free_port()},{HOST}:{server.port}")

        with open_transport(several) as transport:
            assert goes_through(transport, queue)


class TestWhatIsNotCouchDB:
    @pytest.mark.parametrize(
        ("answer", "status", "kind", "error_type", "words"),
        [
            (b"<h1>Hello</h1>", 200, "text/html", BrokerRefused, "is not CouchDB, or something stands in front of it"),
            (b"<h1>Who?</h1>", 404, "text/html", BrokerRefused, "is not CouchDB, or something stands in front of it"),
            (b"<h1>Bad</h1>", 502, "text/html", BrokerUnavailable, "a proxy in front of it answered 502 (text/html)"),
            (b"", 503, "text/html", BrokerUnavailable, "it answered 503"),
            (b'{"detail": "No"}', 403, "application/json", BrokerRefused, "is not CouchDB"),
            (b'{"error": "x", "reason": "y"}', 500, "application/json", BrokerUnavailable, "it answered 500 (x: y)"),
            (b'{"error": "x", "reason": "y"}', 429, "application/json", BrokerUnavailable, "is busy (x: y)"),
        ],
        ids=["a page", "a page of 404", "a proxy", "an empty answer", "another API", "500", "429"],
    )
    def test_it_is_said(
        self, answer: bytes, status: int, kind: str, error_type: type[TransportError], words: str
    ) -> None:
        with a_server_that_says(answer, status, kind) as url:
            error = complaint(url)

        assert isinstance(error, error_type)
        assert words in str(error)

    def test_a_server_without_http_is_said(self) -> None:
        def greet(listening: socket.socket) -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"+OK ready\r\n")
                connection.recv(1000)

        with socket.create_server((HOST, 0)) as listening:
            thread = threading.Thread(target=greet, args=(listening,), name="another server", daemon=True)
            thread.start()
            error = complaint(f"couchdb://{HOST}:{listening.getsockname()[1]}/")
            thread.join()

        assert isinstance(error, BrokerRefused)
        assert "does not speak HTTP" in str(error)


class TestTLS:
    @pytest.fixture
    def front(self, server: Server, certificates: Certificates) -> Iterator[TLSFront]:
        with TLSFront(server.port, certificates) as front:
            yield front

    def url(self, place: str, front: TLSFront, options: str) -> str:
        parsed = parse_url(place)
        return f"couchdbs://{parsed.username}:{parsed.password}@{HOST}:{front.port}/{parsed.path}?{options}"

    def test_it_works_with_the_authority_and_with_a_certificate_of_ours(
        self, server: Server, certificates: Certificates, place: str, queue: str
    ) -> None:
        options = f"cafile={certificates.authority}&certfile={certificates.client}&keyfile={certificates.client_key}"
        with (
            TLSFront(server.port, certificates, asks_for_certificate=True) as front,
            open_transport(self.url(place, front, options)) as transport,
        ):
            message = a_message(queue, bytes(range(256)) * 4_000)
            assert transport.publish([message, *numbered(queue, 100)]) == [STORED] * 101
            with transport.consumer([queue], lease=60.0, prefetch=1000, name=queue) as consumer:
                assert consumer.receive(1, 5.0)[0].message == message
                assert len(consumer.receive(100, 5.0)) == 100

    def test_without_its_authority_the_server_is_not_trusted(self, front: TLSFront, place: str) -> None:
        error = complaint(self.url(place, front, "q=1"))

        assert isinstance(error, BrokerRefused)
        assert "its certificate is not accepted" in str(error)

    def test_a_certificate_for_another_name_is_not_accepted(
        self, front: TLSFront, certificates: Certificates, place: str
    ) -> None:
        error = complaint(self.url(place, front, f"cafile={certificates.authority}&server_hostname=other.example"))

        assert isinstance(error, BrokerRefused)
        assert "other.example" in str(error)

    def test_nothing_is_checked_where_that_is_said(self, front: TLSFront, place: str, queue: str) -> None:
        with open_transport(self.url(place, front, "verify=false")) as transport:
            assert transport.publish([a_message(queue)]) == [STORED]

    def test_tls_to_a_server_without_it_is_said(self, place: str) -> None:
        error = complaint(place.replace("couchdb://", "couchdbs://"))

        assert isinstance(error, BrokerRefused)
        assert "couchdb:// for those without" in str(error)

    def test_tls_to_a_server_that_does_not_answer_it_is_said(self) -> None:
        """CouchDB says nothing to the beginning of TLS on its plain port."""
        with playing(copies=1) as single:
            error = complaint(single.url("p").replace("couchdb://", "couchdbs://"))

        assert isinstance(error, BrokerRefused)
        assert "speaks HTTP without TLS" in str(error)

    def test_it_is_said_long_before_the_timeout(self) -> None:
        with (
            playing(copies=1) as single,
            open_transport(single.url("p").replace("couchdb", "couchdbs", 1)) as transport,
        ):
            began = time.monotonic()
            with pytest.raises(BrokerRefused, match="without TLS"):
                transport.publish([a_message("queue")])

            assert_quick(time.monotonic() - began, 6.0)

    def test_a_server_that_answers_nothing_at_all_is_given_up_with_a_hint(self) -> None:
        with socket.create_server((HOST, 0)) as silent:
            error = complaint(f"couchdbs://{HOST}:{silent.getsockname()[1]}/")

        assert isinstance(error, BrokerUnavailable)
        assert "did not answer TLS within 1 s" in str(error)
        assert "couchdb:// for those without" in str(error)

    def test_a_server_with_tls_that_is_spoken_to_without_is_said(self, front: TLSFront, place: str) -> None:
        error = complaint(self.url(place, front, "q=1").replace("couchdbs://", "couchdb://"))

        assert isinstance(error, BrokerUnavailable)
        assert "couchdbs://" in str(error)


class TestWhatIsTooLarge:
    def test_a_body_above_max_message_bytes_is_refused_alone(self, place: str, queue: str) -> None:
        with open_transport(f"{place}?max_message_bytes=10") as transport:
            answers = transport.publish([a_message(queue, b"x" * 11), a_message(queue, b"x" * 10)])

            assert [answer.outcome for answer in answers] == [PublishOutcome.FAILED, PublishOutcome.STORED]
            assert isinstance(answers[0].error, BrokerRefused)
            assert "max_message_bytes is 10" in str(answers[0].error)

    def test_an_ending_that_it_follows_stays_held_alone(self, place: str, queue: str) -> None:
        with open_transport(f"{place}?max_message_bytes=10") as transport:
            transport.publish(numbered(queue, 3))
            with transport.consumer([queue], lease=60.0, prefetch=10, name=queue) as consumer:
                held = consumer.receive(3, 5.0)
                large = a_message(f"{queue}-next", b"x" * 11)
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


def test_a_database_that_is_lost_under_a_running_transport_is_made_anew(server: Server, place: str, queue: str) -> None:
    message = a_message(queue, b"after")
    with open_transport(place) as transport:
        assert goes_through(transport, queue)
        with server.client() as client:
            for name in client.databases(parse_url(place).path):
                client.request("DELETE", f"/{name}")

        def is_stored() -> bool:
            try:
                return transport.publish([message]) in ([STORED], [DUPLICATE])
            except TransportError:
                return False

        eventually(is_stored, what="published again")
        with transport.consumer([queue], lease=60.0, prefetch=1, name=queue) as consumer:
            assert bodies(consumer.receive(1, 5.0)) == [b"after"]


def test_what_another_has_written_into_the_database_is_left_alone(server: Server, place: str, queue: str) -> None:
    with open_transport(place) as transport:
        transport.publish([a_message(queue, b"first", priority=9)])
        with server.client() as client:
            (database,) = client.databases(f"{parse_url(place).path}-messages")
            foreign = [
                {"_id": f"{queue}:r:0:x", "format": 1, "message": "!"},
                {"_id": f"{queue}:r:0:{'0' * 16}:y", "format": 99, "message": {"of": "a later version"}},
                {"_id": f"{queue}:r:0:{'0' * 16}:z"},
            ]
            assert client.request("POST", f"/{database}/_bulk_docs", {"docs": foreign})[0] == 201
        transport.publish([a_message(queue, b"second")])
        with transport.consumer([queue], lease=60.0, prefetch=10, name=queue) as consumer:
            received = consumer.receive(10, 5.0) + consumer.receive(10, 0.1)

        assert bodies(received) == [b"first", b"second"]
        assert [seen.message.body for seen in transport.browse(queue)] == [b"first", b"second"]
