"""The broker of the fault tests, and the ground that each of them has for itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ekiden.message import new_id

from tests.faults.ground import Ground


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them start real workers and end them: too long for what is run at every change."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def broker_url(tmp_path: Path) -> str:
    """The broker that the workers of a test share."""
    return f"sqlite:///{tmp_path}/broker.db"


@pytest.fixture
def ground(broker_url: str, tmp_path: Path) -> Iterator[Ground]:
    ground = Ground(broker_url, f"faults-{new_id()}", tmp_path)
    yield ground
    ground.close()
