"""Where the servers are that the tests share: each is found or started once per session.

In this order: the URL in TESTS_REDIS_URL, TESTS_RABBITMQ_URL, TESTS_MONGODB_URL or TESTS_COUCHDB_URL (an app reads
what begins with EKIDEN_ as a setting); a server on its standard port of this host, unless the directory in
TESTS_PROGRAMS holds its program; a server that is installed here, or what stands in for it, started on a port of its
own and ended with the session; a container of docker-compose.yml, where a Docker engine answers. Tests share what is
found with others: each works in a place of its own, by a prefix or a virtual host, and changes nothing else.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pika
import redis
from ekiden.message import new_id
from ekiden.urls import parse_url, without_password

from tests.servers.couchdb import CouchDBServer, couchdb_answers, pouchdb_command
from tests.servers.mongodb import DATABASE, MongoDBServer, mongodb_answers, mongodb_program
from tests.servers.places import with_path
from tests.servers.processes import HOST, CannotStart, find_program, is_chosen
from tests.servers.rabbitmq import (
    RabbitMQServer,
    VirtualHost,
    ctl_command,
    rabbitmq_answers,
    rabbitmq_program,
)
from tests.servers.redis import RedisServer, redis_answers, redis_program

ROOT = Path(__file__).parents[2]
REDIS_VARIABLE = "TESTS_REDIS_URL"
RABBITMQ_VARIABLE = "TESTS_RABBITMQ_URL"
MONGODB_VARIABLE = "TESTS_MONGODB_URL"
COUCHDB_VARIABLE = "TESTS_COUCHDB_URL"

_STANDARD_REDIS = f"redis://{HOST}:6379/0"
_STANDARD_RABBITMQ = f"amqp://guest:guest@{HOST}:5672/%2F"
_STANDARD_MONGODB = f"mongodb://{HOST}:27017/{DATABASE}"
_STANDARD_COUCHDB = f"couchdb://{HOST}:5984/"
_INSTALL = "python3 tests/servers/install.py"


class NoServer(Exception):
    """There is none, and none can be started; the message says in one line what to do about it."""


@contextmanager
def a_redis(directory: Path) -> Iterator[str]:
    """The URL of a Redis. Raises NoServer."""
    if url := _named_or_standard(REDIS_VARIABLE, _STANDARD_REDIS, _redis_answers_at, redis_program()):
        yield url
    elif redis_program():
        server = RedisServer(directory)
        try:
            server.start()
            yield server.url
        finally:
            server.kill()
    elif docker_compose():
        with a_container("redis"):
            yield _STANDARD_REDIS
    else:
        raise NoServer(_advice("Redis", "apt-get install redis-server", "redis", REDIS_VARIABLE))


@dataclass(frozen=True, slots=True)
class FoundRabbitMQ:
    """A RabbitMQ, and the virtual host there that is the session's own: None where we may not make one."""

    url: str
    host: VirtualHost | None


@contextmanager
def a_rabbitmq(directory: Path) -> Iterator[FoundRabbitMQ]:
    """A virtual host at a RabbitMQ. Raises NoServer."""
    if url := _named_or_standard(RABBITMQ_VARIABLE, _STANDARD_RABBITMQ, rabbitmq_answers, rabbitmq_program()):
        with _a_virtual_host_where_we_may(url) as found:
            yield found
    elif rabbitmq_program():
        server = RabbitMQServer(directory)
        try:
            server.start()
            host = VirtualHost(f"ekiden-tests-{new_id()}", ctl_command(), environment=server.environment)
            host.create("guest")
            yield FoundRabbitMQ(server.url_as("guest", "guest", vhost=host.name), host)
        finally:
            server.kill()
    elif compose := docker_compose():
        with a_container("rabbitmq"):
            host = VirtualHost(f"ekiden-tests-{new_id()}", [*compose, "exec", "-T", "rabbitmq", "rabbitmqctl"])
            host.create("guest")
            yield FoundRabbitMQ(with_path(_STANDARD_RABBITMQ, host.name), host)
    else:
        raise NoServer(_advice("RabbitMQ", "apt-get install rabbitmq-server", "rabbitmq", RABBITMQ_VARIABLE))


@dataclass(frozen=True, slots=True)
class FoundMongoDB:
    """The URL of a database for tests at a MongoDB. ``alone``: the server is the session's own."""

    url: str
    alone: bool


@contextmanager
def a_mongodb(directory: Path) -> Iterator[FoundMongoDB]:
    """A database for tests at a MongoDB. Raises NoServer."""
    if url := _named_or_standard(MONGODB_VARIABLE, _STANDARD_MONGODB, mongodb_answers):
        yield FoundMongoDB(url, alone=False)
    elif mongodb_program():
        server = MongoDBServer(directory)
        try:
            server.start()
            yield FoundMongoDB(server.url, alone=True)
        finally:
            server.kill()
    elif docker_compose():
        with a_container("mongodb"):
            yield FoundMongoDB(_STANDARD_MONGODB, alone=False)
    else:
        raise NoServer(_advice("MongoDB", _INSTALL, "mongodb", MONGODB_VARIABLE))


@contextmanager
def a_couchdb(directory: Path) -> Iterator[str]:
    """The URL of a CouchDB, for an administrator; the prefix of databases comes after it. Raises NoServer."""
    as_administrator = _for_the_administrator_of_a_container(_STANDARD_COUCHDB)
    if url := _named_or_standard(COUCHDB_VARIABLE, _STANDARD_COUCHDB, couchdb_answers):
        yield url
    elif couchdb_answers(as_administrator):
        yield as_administrator
    elif pouchdb_command():
        server = CouchDBServer(directory, in_memory=True)
        try:
            server.start()
            yield server.url
        finally:
            server.kill()
    elif docker_compose():
        with a_container("couchdb"):
            yield as_administrator
    else:
        raise NoServer(_advice("CouchDB", _INSTALL, "couchdb", COUCHDB_VARIABLE))


SHARED: dict[str, Callable[[Path], AbstractContextManager[Any]]] = {
    "redis": a_redis,
    "rabbitmq": a_rabbitmq,
    "mongodb": a_mongodb,
    "couchdb": a_couchdb,
}
"""By product: what finds its server, or starts one with its files in a directory."""


def _for_the_administrator_of_a_container(url: str) -> str:
    """``url`` with the name and password that docker-compose.yml gives its CouchDB."""
    username, password = (
        quote(os.environ.get(variable) or default, safe="")
        for variable, default in (("COUCHDB_USER", "admin"), ("COUCHDB_PASSWORD", "password"))
    )
    return url.replace("://", f"://{username}:{password}@")


def _named_or_standard(
    variable: str, standard: str, answers: Callable[[str], bool], program: str | None = None
) -> str | None:
    """The URL that the environment names, which then has to answer; else the standard one if it does.

    Where TESTS_PROGRAMS holds ``program``, the tests start that instead of using what has the standard port.
    """
    if named := os.environ.get(variable):
        if not answers(named):
            raise AssertionError(f"{variable} names {without_password(named)}, and nobody answers there")
        return named
    return standard if not is_chosen(program) and answers(standard) else None


def _redis_answers_at(url: str) -> bool:
    return redis_answers(redis.Redis.from_url(url, socket_timeout=5.0, socket_connect_timeout=2.0))


@contextmanager
def _a_virtual_host_where_we_may(url: str) -> Iterator[FoundRabbitMQ]:
    """A virtual host of our own, if the server is the one that this host's rabbitmqctl speaks to; else that of ``url``.

    Queues that tests leave in a virtual host that is not ours stay there: each has the prefix of its test.
    """
    parameters = pika.URLParameters(url)
    program = find_program("rabbitmqctl")
    host = VirtualHost(f"ekiden-tests-{new_id()}", [program] if program else [])
    username = parse_url(url).username or "guest"
    made = False
    try:
        if program and parameters.host in {HOST, "localhost"}:
            try:
                host.create(username)
                made = True
            except CannotStart:  # not as root, or the server runs in a container: then it is the URL's own
                made = False
        own = with_path(url, host.name)
        yield FoundRabbitMQ(own, host) if made and rabbitmq_answers(own) else FoundRabbitMQ(url, None)
    finally:
        if made:
            host.delete()


def docker_compose() -> list[str] | None:
    """The command for docker-compose.yml, if a Docker engine answers."""
    program = find_program("docker")
    if program is None:
        return None
    compose = [program, "compose", "--file", str(ROOT / "docker-compose.yml")]
    for question in ([program, "info"], [*compose, "version"]):
        try:
            if subprocess.run(question, capture_output=True, timeout=20, check=False).returncode:
                return None
        except subprocess.TimeoutExpired:
            return None
    return compose


@contextmanager
def a_container(service: str) -> Iterator[None]:
    """One service of docker-compose.yml, started and removed again."""
    compose = docker_compose()
    assert compose is not None
    try:
        subprocess.run([*compose, "up", "--detach", "--wait", service], check=True, timeout=600)
        yield
    finally:
        subprocess.run([*compose, "rm", "--stop", "--force", "--volumes", service], check=True, timeout=120)


def _advice(product: str, installation: str, service: str, variable: str) -> str:
    return (
        f"no {product}: install it ({installation}), or start one (docker compose up --wait {service}), "
        f"or name one in {variable}"
    )


def remove_redis_keys(url: str, prefix: str) -> None:
    """Delete every key with ``prefix`` in its name."""
    with redis.Redis.from_url(url) as client:
        for batch in _batches(client, prefix):
            client.unlink(*batch)


def _batches(client: redis.Redis, prefix: str) -> Iterator[list[bytes]]:
    found = [*client.scan_iter(match=f"*{prefix}*", count=1000)]
    for start in range(0, len(found), 500):
        yield found[start : start + 500]
