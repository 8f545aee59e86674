"""What pika reaches alone, on a durable queue, with persistent messages: the ceiling for the RabbitMQ transport.

    python benchmarks/raw_rabbitmq.py [--messages N] [--url URL] [--queue-type quorum|classic]

Publishes are ``mandatory`` and confirmed: one at a time by BlockingChannel, which waits for each; in windows of 1,000
by SelectConnection, which counts the confirms. The consumer is a SelectConnection with a prefetch of 512 that
acknowledges every 64 with ``multiple``. It leaves out: priorities, delays, attempts on classic queues, headers,
several queues, follow-ups, answers for each message, the decoding of calls, threads, running anything, and every error.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import pika
from ekiden.message import new_id
from timing import rate_of

PREFETCH = 512
ACKNOWLEDGE_EVERY = 64
WINDOW = 1000
BODY = b'["bench.noop","0191f0c2a5d7f3c09f6e4a8b1d2c7e55",1763821000.123456,[12345],{},{"retries":0,"expires":null}]'


class Raw:
    """One queue, by pika."""

    def __init__(self, url: str, name: str, queue_type: str) -> None:
        self._parameters = pika.URLParameters(url)
        self._name = name
        self._queue_type = queue_type
        with pika.BlockingConnection(self._parameters) as connection:
            self._declare(connection.channel())
        self._publisher: pika.BlockingConnection | None = None
        self._channel: Any = None
        self._confirmed: _Confirmed | None = None

    def publish_one_by_one(self, count: int) -> None:
        """Each waits for its confirm."""
        if self._publisher is None:
            self._publisher = pika.BlockingConnection(self._parameters)
            self._channel = self._publisher.channel()
            self._channel.confirm_delivery()
        for _ in range(count):
            self._channel.basic_publish("", self._name, BODY, _properties(), mandatory=True)

    def publish_in_batches(self, count: int) -> None:
        """At most WINDOW of them unconfirmed."""
        if self._confirmed is None:
            self._confirmed = _Confirmed(self._parameters, self._name)
        self._confirmed.publish(count)

    def drain(self, count: int) -> float:
        """Consume and acknowledge ``count``; how many a second, from the first to the last."""
        return _Drain(self._parameters, self._name, count).rate

    def close(self) -> None:
        """Delete the queue."""
        if self._confirmed is not None:
            self._confirmed.close()
        if self._publisher is not None:
            self._publisher.close()
        with pika.BlockingConnection(self._parameters) as connection:
            connection.channel().queue_delete(self._name)

    def _declare(self, channel: Any) -> None:
        channel.queue_declare(self._name, durable=True, arguments={"x-queue-type": self._queue_type})


class _Selecting:
    """A SelectConnection with one channel, whose loop runs in this thread while there is something to do."""

    def __init__(self, parameters: pika.URLParameters) -> None:
        self._connection = pika.SelectConnection(
            parameters,
            on_open_callback=lambda connection: connection.channel(on_open_callback=self._opened),
            on_open_error_callback=self._failed,
        )
        self._loop = self._connection.ioloop
        self._channel: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Until somebody stops the loop."""
        self._loop.start()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """And wait until it is."""
        self._connection.add_on_close_callback(lambda *_: self._loop.stop())
        self._connection.close()
        self._loop.start()

    def _opened(self, channel: Any) -> None:
        self._channel = channel
        channel.add_on_close_callback(self._failed)
        self._ready()

    def _ready(self) -> None:
        self._loop.stop()

    def _failed(self, _who: Any, error: BaseException) -> None:
        if not self._connection.is_closing:
            self._error = error
            self._loop.stop()


class _Confirmed(_Selecting):
    """Publishes, and counts the confirms."""

    def __init__(self, parameters: pika.URLParameters, name: str) -> None:
        super().__init__(parameters)
        self._name = name
        self._sent = 0
        self._answered = 0
        self._wanted = 0
        self.run()

    def _ready(self) -> None:
        self._channel.add_on_return_callback(self._returned)
        self._channel.confirm_delivery(self._confirmed, callback=lambda _: self._loop.stop())

    def publish(self, count: int) -> None:
        self._wanted += count
        self._send()
        self.run()

    def _send(self) -> None:
        for _ in range(min(WINDOW - (self._sent - self._answered), self._wanted - self._sent)):
            self._channel.basic_publish("", self._name, BODY, _properties(), mandatory=True)
            self._sent += 1

    def _confirmed(self, frame: Any) -> None:
        if isinstance(frame.method, pika.spec.Basic.Nack):
            self._failed(None, RuntimeError("the broker refused a message"))
        self._answered = frame.method.delivery_tag  # one channel, its confirms in order as far as matters here
        if self._answered == self._wanted:
            self._loop.stop()
        elif self._sent - self._answered <= WINDOW // 2:
            self._send()

    def _returned(self, *_: Any) -> None:
        self._failed(None, RuntimeError("a message came back: its queue is gone"))


class _Drain(_Selecting):
    """Consumes one time, ``count`` messages."""

    def __init__(self, parameters: pika.URLParameters, name: str, count: int) -> None:
        super().__init__(parameters)
        self._name = name
        self._count = count
        self._seen = 0
        self._began = 0.0
        self.rate = 0.0
        self.run()
        self.close()

    def _ready(self) -> None:
        self._channel.basic_qos(prefetch_count=PREFETCH, callback=lambda _: self._consume())

    def _consume(self) -> None:
        self._channel.basic_consume(self._name, self._received)

    def _received(self, channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
        if self._seen == self._count:
            return  # it is more than was asked for, and goes back
        if not self._seen:
            self._began = time.perf_counter()
        self._seen += 1
        if self._seen == self._count:
            channel.basic_ack(method.delivery_tag, multiple=True)
            self.rate = (self._count - 1) / (time.perf_counter() - self._began)
            self._loop.stop()
        elif self._seen % ACKNOWLEDGE_EVERY == 0:
            channel.basic_ack(method.delivery_tag, multiple=True)


def _properties() -> pika.BasicProperties:
    return pika.BasicProperties(delivery_mode=2, message_id=new_id(), priority=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--url", default="amqp://guest:guest@127.0.0.1:5672/%2F")
    parser.add_argument("--queue-type", choices=("quorum", "classic"), default="quorum")
    options = parser.parse_args()
    raw = Raw(options.url, f"bench-{new_id()}", options.queue_type)
    rates: dict[str, list[float]] = {}
    try:
        raw.publish_in_batches(PREFETCH)  # connects
        raw.drain(PREFETCH)
        for _ in range(5):
            one_by_one = options.messages // 20
            rates.setdefault("publish, one at a time", []).append(rate_of(raw.publish_one_by_one, one_by_one))
            rates.setdefault("publish in windows of 1,000", []).append(
                rate_of(raw.publish_in_batches, options.messages)
            )
            rates.setdefault("consume, acknowledge every 64", []).append(raw.drain(one_by_one + options.messages))
    finally:
        raw.close()
    for what, values in rates.items():
        print(f"{what:32} {statistics.median(values):10.0f} per s   ({min(values):.0f} to {max(values):.0f})")


if __name__ == "__main__":
    main()
