"""RabbitMQ as a broker for ekiden."""

from ekiden_rabbitmq.transport import RabbitMQTransport

__all__ = ["RabbitMQTransport"]
