"""Loads pika without asyncio, which a worker otherwise pays for: 4 MiB and a tenth of its start.

pika's package of adapters imports every adapter, the one for asyncio among them. ekiden uses SelectConnection alone. A
program that asks for the other adapter still gets it: then it is loaded.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

_ADAPTERS = "pika.adapters"
_FOR_ASYNCIO = "pika.adapters.asyncio_connection"
_CLASS = "AsyncioConnection"


def load_pika() -> None:
    """Import pika. Nothing else is done where pika, or asyncio, is loaded already."""
    if "pika" in sys.modules or "asyncio" in sys.modules:
        return
    stand_in = ModuleType(_FOR_ASYNCIO)
    setattr(stand_in, _CLASS, None)
    sys.modules[_FOR_ASYNCIO] = stand_in
    try:
        import pika.adapters
    finally:
        del sys.modules[_FOR_ASYNCIO]
    adapters: Any = pika.adapters
    if getattr(adapters, _CLASS, stand_in) is None:
        delattr(adapters, _CLASS)
        adapters.__getattr__ = _adapter


def _adapter(name: str) -> Any:
    """What ``pika.adapters`` has not, but for the class that was left out. (PEP 562)"""
    if name != _CLASS:
        raise AttributeError(f"module {_ADAPTERS!r} has no attribute {name!r}")
    from pika.adapters.asyncio_connection import AsyncioConnection

    return AsyncioConnection
