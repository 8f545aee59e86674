"""The broker of the fault tests, and the ground that each of them has for itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ekiden.message import Depth, new_id
from ekiden.plugins import BACKENDS, is_installed
from ekiden.urls import parse_url

from tests.faults.ground import Ground
from tests.servers.places import BROKERS, place_at
from tests.servers.shared import shared_server

if TYPE_CHECKING:
    from tests.servers.discovery import FoundRabbitMQ


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them start real workers and end them: too long for what is run at every change."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FoundRabbitMQ]:
    """A virtual host for these tests alone: what is delayed can only be counted for a whole one."""
    yield from shared_server("rabbitmq", tmp_path_factory)


@pytest.fixture(scope="session")
def rabbitmq_url(rabbitmq: FoundRabbitMQ) -> str:
    """That virtual host."""
    return rabbitmq.url


@pytest.fixture(params=BROKERS)
def broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The broker that the workers of a test share. Results are where its URL alone has them."""
    with place_at(request.param, request, tmp_path) as url:
        # RabbitMQ gives a stopped worker up after two heartbeats; by default that takes longer than a test should.
        yield f"{url}&heartbeat=3" if request.param == "amqp" else url


@pytest.fixture
def storing_ground(ground: Ground, tmp_path: Path) -> Ground:
    """The same ground with results that are stored: in a file, where the broker stores none."""
    if not is_installed(BACKENDS, parse_url(ground.broker_url).scheme):
        ground.store_results_in(f"sqlite:///{tmp_path}/results.db")
    return ground


@pytest.fixture
def ground(request: pytest.FixtureRequest, broker_url: str, tmp_path: Path) -> Iterator[Ground]:
    url = parse_url(broker_url)
    queue = f"faults-{new_id()}"
    depth: Callable[[], Depth] | None = None
    if url.scheme == "amqp":
        host = request.getfixturevalue("rabbitmq").host
        if host is None:
            pytest.skip("what RabbitMQ holds only its rabbitmqctl knows: run these tests on its machine, as its user")
        depth = functools.partial(host.depth, url.options.get("prefix", "") + queue)
    ground = Ground(broker_url, queue, tmp_path, depth=depth)
    yield ground
    ground.close()
