"""A worker on RabbitMQ loads no asyncio until somebody needs it, and takes nothing from who uses pika beside it."""

import subprocess
import sys

import pytest


def printed(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()


def test_the_transport_loads_no_asyncio() -> None:
    assert (
        printed("import sys, ekiden_rabbitmq; print('asyncio' in sys.modules, 'pika' in sys.modules)") == "False True"
    )


@pytest.mark.parametrize(
    "use",
    [
        "from pika.adapters import AsyncioConnection",
        "from pika.adapters.asyncio_connection import AsyncioConnection",
        "import pika; AsyncioConnection = pika.adapters.AsyncioConnection",
        "import pika.adapters.asyncio_connection as module; AsyncioConnection = module.AsyncioConnection",
    ],
)
@pytest.mark.parametrize("order", ["before", "after"])
def test_pikas_connection_for_asyncio_is_there_for_others(use: str, order: str) -> None:
    ours = "import ekiden_rabbitmq"
    program = f"{use}; {ours}" if order == "before" else f"{ours}; {use}"

    assert printed(f"{program}; print(AsyncioConnection.__mro__[1].__name__)") == "BaseConnection"


def test_what_pikas_adapters_lack_they_lack_by_the_usual_error() -> None:
    assert printed("import ekiden_rabbitmq, pika; print(hasattr(pika.adapters, 'NoConnection'))") == "False"
