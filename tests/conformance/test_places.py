"""Two prefixes of one server never meet, nor two files or names, whatever the queues and keys in them are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from ekiden.testing.conformance import BackendPlacesConformance, PlacesConformance

from tests.servers.places import with_path, with_prefix

PlaceOf = Callable[[str], str]


class InMemory:
    @pytest.fixture
    def place_of(self) -> PlaceOf:
        return "memory://{}".format


class InFiles:
    endings = ("", "b", "-b", "%62", "b ", "\N{EN DASH}")

    @pytest.fixture
    def place_of(self, tmp_path: Path) -> PlaceOf:
        return lambda name: f"sqlite:///{tmp_path}/{quote(name)}"


class InRedis:
    endings = ("", "b", "-b", ":b", "}:b", "{b", "%3Ab", ":result")

    @pytest.fixture
    def place_of(self, redis_place: str) -> PlaceOf:
        return lambda name: f"{redis_place}{quote(name, safe='')}"  # its last option is the prefix


class InMongoDB:
    endings = ("", "b", "-b", ".messages", ".b")

    @pytest.fixture
    def place_of(self, mongodb_place: str) -> PlaceOf:
        return lambda name: f"{mongodb_place}{quote(name, safe='')}"


class InCouchDB:
    endings = ("", "b", "-messages")  # a database takes this server its time

    @pytest.fixture
    def place_of(self, couchdb_place: str) -> PlaceOf:
        own = couchdb_place.partition("?")[0].rpartition("/")[2]
        return lambda name: with_path(couchdb_place, f"{own}{name}")


class InRabbitMQ:
    """A prefix is put before each name as it is, so that queues that exist can be served: its dot ends it."""

    endings = ("", "b", "-b")

    @pytest.fixture
    def place_of(self, rabbitmq_url: str) -> PlaceOf:
        return lambda name: with_prefix(rabbitmq_url, f"{name}.")


class TestPlacesInMemory(InMemory, PlacesConformance):
    """Names."""


class TestPlacesInFiles(InFiles, PlacesConformance):
    """Paths."""


class TestPlacesInRedis(InRedis, PlacesConformance):
    """Prefixes."""


class TestPlacesInMongoDB(InMongoDB, PlacesConformance):
    """Prefixes."""


@pytest.mark.slow
class TestPlacesInCouchDB(InCouchDB, PlacesConformance):
    """Prefixes."""


@pytest.mark.slow
class TestPlacesInRabbitMQ(InRabbitMQ, PlacesConformance):
    """Prefixes."""


class TestStoresInMemory(InMemory, BackendPlacesConformance):
    """Names."""


class TestStoresInFiles(InFiles, BackendPlacesConformance):
    """Paths."""


class TestStoresInRedis(InRedis, BackendPlacesConformance):
    """Prefixes."""


class TestStoresInMongoDB(InMongoDB, BackendPlacesConformance):
    """Prefixes."""


@pytest.mark.slow
class TestStoresInCouchDB(InCouchDB, BackendPlacesConformance):
    """Prefixes."""
