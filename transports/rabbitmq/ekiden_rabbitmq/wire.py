"""A pika connection that reads contents by itself.

pika decodes every frame into objects, looks for callbacks, assembles; three times for each message. Here frames that
belong to a content (a delivery, a message that was asked for, a returned one) and the confirms of publishes go straight
to their channel's ``Reader``; every other frame goes the way that pika knows. This is the one module that leans on what
is private in pika:

    _on_data_available     called with the bytes that arrived: overridden
    _frame_buffer          the beginning of a frame whose rest has not arrived
    _process_frame         pika's way of a decoded frame
    _output_marshaled_frames, _transport, _terminate_stream, _body_max_length
    _AsyncPlaintextTransport, with its _sock, to which ``write`` sends what need not wait
"""

# pika has no types, and pyright infers too little from its code.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import pika
import pika.exceptions
from pika.adapters.select_connection import IOLoop, SelectConnection
from pika.adapters.utils import nbio_interface
from pika.adapters.utils.connection_workflow import AbstractAMQPConnectionWorkflow
from pika.adapters.utils.io_services_utils import _AsyncPlaintextTransport
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter
from pika.frame import decode_frame

from ekiden_rabbitmq import frames

READ_AT_ONCE_BYTES = 128 * 1024
"""pika reads 4 KiB at a time, some nine small messages."""


class Reader(Protocol):
    """A channel, as the one to whom contents and confirms belong."""

    def content(self, method: int, arguments: bytes, properties: bytes, body: bytes) -> None:
        """A message came with ``basic.deliver``, ``basic.get-ok`` or ``basic.return``."""

    def confirm_arrived(self, method: int, arguments: bytes) -> None:
        """``basic.ack`` or ``basic.nack`` for what was published."""

    def burst_ended(self) -> None:
        """All that arrived at once has been told."""


class _Content:
    """A message of which not every frame has arrived."""

    __slots__ = ("arguments", "body", "method", "missing", "properties")

    def __init__(self, method: int, arguments: bytes) -> None:
        self.method = method
        self.arguments = arguments
        self.properties = b""
        self.body: list[bytes] = []
        self.missing = 0


_CONTENT_METHODS = frozenset((frames.BASIC_DELIVER, frames.BASIC_GET_OK, frames.BASIC_RETURN))
_CONFIRMS = frozenset((frames.BASIC_ACK, frames.BASIC_NACK))


_PROTOCOL = b"AMQP"


class NotAMQP(pika.exceptions.AMQPError):
    """What came is no frame."""


class WireConnection(SelectConnection):
    """SelectConnection, whose contents go to ``readers`` by the number of their channel.

    ``heard_at``: when something came last, on the monotonic clock.
    """

    def __init__(
        self,
        parameters: pika.connection.Parameters,
        nbio: nbio_interface.AbstractIOServices,
        failed: Callable[[Exception], None],
    ) -> None:
        self.readers: dict[int, Reader] = {}
        self.heard_at = time.monotonic()
        self._failed = failed
        self._contents: dict[int, _Content] = {}
        super().__init__(parameters=parameters, custom_ioloop=nbio, internal_connection_workflow=False)

    @property
    def frame_max(self) -> int:
        """The largest frame, in bytes, that both sides agreed on."""
        return self._body_max_length + frames.OVERHEAD

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be sent any more. pika tells each channel in turn; until then the others look open."""
        return self._transport is None or self.is_closed

    def write(self, data: Iterable[bytes]) -> None:
        """Send whole frames, in one write. Raises AMQPConnectionError when the connection is lost.

        Where nothing waits to be sent they go at once: pika would buffer them, have the loop look whether the socket
        takes them, and have it stop looking.
        """
        packed = b"".join(data)
        transport = self._transport
        if transport is None:
            raise pika.exceptions.StreamLostError("the connection is lost")
        if isinstance(transport, _AsyncPlaintextTransport) and not transport.get_write_buffer_size():
            packed = self._rest_of(packed, transport)
        if packed:
            self._output_marshaled_frames([packed])

    def _rest_of(self, packed: bytes, transport: Any) -> bytes:
        """What the socket does not take now. Whether it will take it ever, pika finds out."""
        opened = transport._sock
        try:
            sent = 0 if opened is None else opened.send(packed)
        except OSError:
            sent = 0
        self.bytes_sent += sent
        return packed[sent:]

    def abort(self, error: Exception) -> None:
        """Drop the connection without a word to the other side; ends in the callback for a closed connection."""
        self._terminate_stream(error)

    def drop(self) -> None:
        """Close the socket. Only when the loop has ended, and nothing else can be done any more."""
        opened = getattr(self._transport, "_sock", None)
        if opened is not None:
            with contextlib.suppress(OSError):
                opened.close()

    def _proto_connection_made(self, transport: nbio_interface.AbstractStreamTransport) -> None:
        transport._MAX_RECV_BYTES = READ_AT_ONCE_BYTES
        super()._proto_connection_made(transport)

    def _on_data_available(self, data_in: bytes) -> None:
        self.heard_at = time.monotonic()
        try:
            self._read(self._frame_buffer + data_in if self._frame_buffer else data_in)
        except Exception as error:
            self._failed(error)  # pika would take it for a broken connection
            raise

    def _read(self, data: bytes) -> None:
        position, end = 0, len(data)
        told: set[Reader] = set()
        while end - position >= frames.OVERHEAD:
            kind, channel, size = frames.FRAME.unpack_from(data, position)
            after = position + size + frames.OVERHEAD
            if kind > frames.HEARTBEAT:
                if not data.startswith(_PROTOCOL, position):
                    raise NotAMQP(data[position : position + 20])
                after = end  # another version's greeting: pika knows what to make of it
            if after > end:
                break
            if not self._is_ours(kind, channel, data[position + 7 : after - 1], told):
                _, frame = decode_frame(data[position:after])
                if frame is None:
                    break
                self._process_frame(frame)
                if self.is_closed:
                    return
            self.bytes_received += after - position
            position = after
        self._frame_buffer = data[position:]
        for reader in told:
            reader.burst_ended()

    def _is_ours(self, kind: int, channel: int, payload: bytes, told: set[Reader]) -> bool:
        """Take a frame that belongs to a content or is a confirm; False: it is pika's."""
        reader = self.readers.get(channel)
        if kind > frames.BODY:
            return False
        if reader is None:
            # Of one that was broken off, the rest of a content is nobody's; pika has not seen its beginning.
            return kind != frames.METHOD and channel in self._contents
        if kind != frames.METHOD:
            if self._take(kind, channel, payload, reader):
                told.add(reader)
            return True
        (method,) = frames.METHOD_NUMBER.unpack_from(payload)
        if method in _CONTENT_METHODS:
            self._contents[channel] = _Content(method, payload)
        elif method in _CONFIRMS:
            reader.confirm_arrived(method, payload)
            told.add(reader)
        else:
            return False
        return True

    def _take(self, kind: int, channel: int, payload: bytes, reader: Reader) -> bool:
        """One more frame of a content; whether it is complete."""
        content = self._contents[channel]
        if kind == frames.HEADER:
            (content.missing,) = frames.BODY_SIZE.unpack_from(payload, 4)
            content.properties = payload[12:]
        else:
            content.missing -= len(payload)
            content.body.append(payload)
        if content.missing > 0:
            return False
        del self._contents[channel]
        body = content.body[0] if len(content.body) == 1 else b"".join(content.body)
        reader.content(content.method, content.arguments, content.properties, body)
        return True


def connect(
    parameters: Sequence[pika.ConnectionParameters],
    loop: IOLoop,
    *,
    on_tried: Callable[[WireConnection], None],
    on_done: Callable[[Any], None],
    failed: Callable[[Exception], None],
) -> AbstractAMQPConnectionWorkflow:
    """Try these one after the other; ``on_done`` is called with a WireConnection, or with an exception.

    ``on_tried`` is called with each connection that is not open yet, ``failed`` with what reading has raised; pika ends
    the connection then.
    """
    nbio = SelectorIOServicesAdapter(loop)

    def make(one: pika.connection.Parameters) -> WireConnection:
        made = WireConnection(one, nbio, failed)
        on_tried(made)
        return made

    return WireConnection._start_connection_workflow(
        connection_configs=parameters,
        connection_factory=make,
        nbio=nbio,
        workflow=None,
        on_done=on_done,
    )
