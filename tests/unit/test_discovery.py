"""How the tests find servers: by the environment, at the standard port, among what is installed; or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pika
import pytest
import redis

from tests.servers import discovery
from tests.servers.couchdb import CouchDBServer, couchdb_answers
from tests.servers.discovery import (
    COUCHDB_VARIABLE,
    MONGODB_VARIABLE,
    RABBITMQ_VARIABLE,
    REDIS_VARIABLE,
    NoServer,
    a_couchdb,
    a_mongodb,
    a_rabbitmq,
    a_redis,
)
from tests.servers.mongodb import mongodb_answers
from tests.servers.processes import HOST, free_port
from tests.servers.redis import RedisServer
from tests.servers.running import running


@pytest.fixture
def nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the environment names servers, nor is one at a standard port."""
    for variable in (REDIS_VARIABLE, RABBITMQ_VARIABLE, MONGODB_VARIABLE, COUCHDB_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(discovery, "_STANDARD_REDIS", f"redis://{HOST}:{free_port()}/0")
    monkeypatch.setattr(discovery, "_STANDARD_RABBITMQ", f"amqp://guest:guest@{HOST}:{free_port()}/%2F")
    monkeypatch.setattr(discovery, "_STANDARD_MONGODB", f"mongodb://{HOST}:{free_port()}/")
    monkeypatch.setattr(discovery, "_STANDARD_COUCHDB", f"couchdb://{HOST}:{free_port()}/")


@pytest.fixture
def nothing_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for finder in ("redis_program", "rabbitmq_program", "mongodb_program", "pouchdb_command", "docker_compose"):
        monkeypatch.setattr(discovery, finder, lambda: None)


def test_a_server_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(lambda: RedisServer(tmp_path / "named", password="secret")) as server:
        monkeypatch.setenv(REDIS_VARIABLE, server.url)

        with a_redis(tmp_path / "unused") as url:
            assert url == server.url


@pytest.mark.parametrize(
    ("find", "variable", "url"),
    [
        (a_redis, REDIS_VARIABLE, "redis://:secret@{host}:{port}/0"),
        (a_rabbitmq, RABBITMQ_VARIABLE, "amqp://a:secret@{host}:{port}/"),
        (a_mongodb, MONGODB_VARIABLE, "mongodb://a:secret@{host}:{port}/?serverSelectionTimeoutMS=300"),
        (a_couchdb, COUCHDB_VARIABLE, "couchdb://a:secret@{host}:{port}/"),
    ],
)
def test_a_server_that_is_named_and_not_there_is_an_error_that_hides_the_password(
    find: Callable[[Path], AbstractContextManager[object]],
    variable: str,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, url.format(host=HOST, port=free_port()))

    with pytest.raises(AssertionError, match="and nobody answers there") as told, find(tmp_path):
        pass

    assert variable in str(told.value)
    assert "***" in str(told.value)
    assert "secret" not in str(told.value)


@pytest.mark.usefixtures("nobody_listens")
def test_what_is_installed_is_started_on_a_port_of_its_own_and_ended(tmp_path: Path) -> None:
    with a_redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        pid = client.info("server")["process_id"]
        assert ":6379" not in url

    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.usefixtures("nobody_listens")
def test_what_stands_in_for_mongodb_is_started_and_ended(tmp_path: Path) -> None:
    with a_mongodb(tmp_path) as found:
        assert found.alone
        assert mongodb_answers(found.url)

    assert not mongodb_answers(found.url)


@pytest.mark.usefixtures("nobody_listens")
def test_what_stands_in_for_couchdb_is_started_and_ended(tmp_path: Path) -> None:
    with a_couchdb(tmp_path) as url:
        assert couchdb_answers(url)

    assert not couchdb_answers(url)


def test_a_couchdb_as_docker_compose_makes_it_is_found_with_its_administrator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(COUCHDB_VARIABLE, raising=False)
    monkeypatch.setenv("COUCHDB_USER", "ad min")
    monkeypatch.delenv("COUCHDB_PASSWORD", raising=False)
    with running(lambda: CouchDBServer(tmp_path / "standard", username="ad min", password="password")) as server:
        monkeypatch.setattr(discovery, "_STANDARD_COUCHDB", server.url_as(None, None))

        with a_couchdb(tmp_path / "unused") as url:
            assert url == server.url


@pytest.mark.slow
@pytest.mark.usefixtures("nobody_listens")
def test_an_installed_rabbitmq_is_started_with_a_virtual_host_for_the_tests(tmp_path: Path) -> None:
    with a_rabbitmq(tmp_path) as found:
        assert found.host is not None
        assert ":5672" not in found.url
        with pika.BlockingConnection(pika.URLParameters(found.url)) as connection:
            connection.channel().queue_declare("test-queue", durable=True)
        assert found.host.depth("test-queue").ready == 0


@pytest.mark.usefixtures("nobody_listens", "nothing_is_installed")
@pytest.mark.parametrize(
    ("find", "installation", "variable"),
    [
        (a_redis, "apt-get install redis-server", REDIS_VARIABLE),
        (a_rabbitmq, "apt-get install rabbitmq-server", RABBITMQ_VARIABLE),
        (a_mongodb, "python3 tests/servers/install.py", MONGODB_VARIABLE),
        (a_couchdb, "python3 tests/servers/install.py", COUCHDB_VARIABLE),
    ],
)
def test_what_cannot_be_had_says_in_one_line_what_to_do(
    find: Callable[[Path], AbstractContextManager[object]], installation: str, variable: str, tmp_path: Path
) -> None:
    with pytest.raises(NoServer) as refusal, find(tmp_path):
        pass

    (line,) = str(refusal.value).splitlines()
    assert installation in line
    assert "docker compose up --wait" in line
    assert variable in line
