"""The rules for every test, and the servers that tests share.

On CI (CI=true) nothing may be skipped. No thread of ekiden's outlives a test.

redis_url, rabbitmq_url,        a server for the whole session, found or started by tests/servers/discovery.py
mongodb_url, couchdb_url
redis_place, rabbitmq_place,    the same with a prefix that no other test uses
mongodb_place, couchdb_place
certificates                    for servers of a test's own that speak TLS
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from tests.servers.certificates import Certificates
    from tests.servers.discovery import FoundMongoDB, FoundRabbitMQ

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return refuse_a_skip(report)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return refuse_a_skip(report)


def refuse_a_skip(report: Report) -> Report:
    """The same report, as a failure where it was a skip on CI. An expected failure is not a skip."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        _, _, reason = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"On CI no test may be skipped. {reason}"
    return report


_THREADS_END_WITHIN = 2.0


@pytest.fixture(autouse=True)
def no_thread_of_ekiden_outlives_a_test() -> Iterator[None]:
    """What a test starts, it stops: a thread that stays behind works on while other tests run."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + _THREADS_END_WITHIN
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("ekiden-"):
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"the thread {thread.name} has outlived its test"


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis that others may use too. Tests use ``redis_place``."""
    from tests.servers.shared import shared_server

    yield from shared_server("redis", tmp_path_factory)


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FoundRabbitMQ]:
    """A RabbitMQ that others may use too, and a virtual host there that is ours, where possible."""
    from tests.servers.shared import shared_server

    yield from shared_server("rabbitmq", tmp_path_factory)


@pytest.fixture(scope="session")
def rabbitmq_url(rabbitmq: FoundRabbitMQ) -> str:
    """A virtual host at a RabbitMQ. Tests use ``rabbitmq_place``."""
    return rabbitmq.url


@pytest.fixture(scope="session")
def mongodb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FoundMongoDB]:
    """A database at a MongoDB that others may use too."""
    from tests.servers.shared import shared_server

    yield from shared_server("mongodb", tmp_path_factory)


@pytest.fixture(scope="session")
def mongodb_url(mongodb: FoundMongoDB) -> str:
    """A database at a MongoDB. Tests use ``mongodb_place``."""
    return mongodb.url


@pytest.fixture(scope="session")
def couchdb_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A CouchDB that others may use too. Tests use ``couchdb_place``."""
    from tests.servers.shared import shared_server

    yield from shared_server("couchdb", tmp_path_factory)


@pytest.fixture
def redis_place(redis_url: str) -> Iterator[str]:
    """A place of the test's own at the Redis of the session, empty before and afterwards."""
    from tests.servers.discovery import remove_redis_keys
    from tests.servers.places import own_prefix, with_prefix

    prefix = own_prefix()
    yield with_prefix(redis_url, prefix)
    remove_redis_keys(redis_url, prefix)


@pytest.fixture
def rabbitmq_place(rabbitmq_url: str) -> str:
    """A place of the test's own at the RabbitMQ of the session.

    Its queues go when nobody has used them for half a minute (a policy there says so), and with the virtual host at the
    end of the session. To ask which queues there are takes longer than most tests.
    """
    from tests.servers.places import own_prefix, with_prefix

    return with_prefix(rabbitmq_url, own_prefix())


@pytest.fixture
def mongodb_place(mongodb: FoundMongoDB) -> Iterator[str]:
    """A place of the test's own at the MongoDB of the session, empty before and afterwards."""
    from tests.servers.mongodb import remove_collections
    from tests.servers.places import own_prefix, with_prefix

    prefix = own_prefix()
    yield with_prefix(mongodb.url, prefix)
    remove_collections(mongodb.url, prefix, alone=mongodb.alone)


@pytest.fixture
def couchdb_place(couchdb_url: str) -> Iterator[str]:
    """A place of the test's own at the CouchDB of the session, empty before and afterwards."""
    from tests.servers.couchdb import remove_databases
    from tests.servers.places import own_prefix, with_path

    prefix = own_prefix()
    yield with_path(couchdb_url, prefix)
    remove_databases(couchdb_url, prefix)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority's and two signed certificates."""
    from tests.servers.certificates import make_certificates
    from tests.servers.processes import CannotStart

    try:
        return make_certificates(tmp_path_factory.mktemp("certificates"))
    except CannotStart as error:
        pytest.skip(str(error))
