"""TLS in front of a server that does not speak it, as a reverse proxy puts it there."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Self

from tests.servers.certificates import Certificates
from tests.servers.processes import HOST

_CHUNK_BYTES = 65_536
_WITHIN_SECONDS = 10.0


class TLSFront:
    """Listens with TLS on a port of this host and passes on what it hears to the plain ``port``, and back.

    ``asks_for_certificate``: whoever has none, signed by the same authority, is not let in. One thread does everything,
    from ``__enter__`` to ``__exit__``.
    """

    def __init__(self, port: int, certificates: Certificates, *, asks_for_certificate: bool = False) -> None:
        self._plain_port = port
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates.authority)
        self._context.load_cert_chain(certificates.server, certificates.server_key)
        if asks_for_certificate:
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="TLS in front of a server", daemon=True)
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, HOST, 0, ssl=self._context))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_WITHIN_SECONDS)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):
            plain_reader, plain_writer = await asyncio.open_connection(HOST, self._plain_port)
            try:
                directions = (_pass_on(reader, plain_writer), _pass_on(plain_reader, writer))
                await asyncio.wait([*map(asyncio.ensure_future, directions)], return_when=asyncio.FIRST_COMPLETED)
            finally:
                plain_writer.transport.abort()
        writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        everything = asyncio.all_tasks() - {asyncio.current_task()}
        for task in everything:
            task.cancel()
        await asyncio.gather(*everything, return_exceptions=True)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_WITHIN_SECONDS)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one side hangs up."""
    with suppress(OSError):
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
