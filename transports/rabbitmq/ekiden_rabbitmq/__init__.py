"""RabbitMQ as a broker for ekiden."""

from ekiden_rabbitmq.pika_loading import load_pika

load_pika()  # before any module below imports it

from ekiden_rabbitmq.transport import RabbitMQTransport  # noqa: E402 - see above

__all__ = ["RabbitMQTransport"]
