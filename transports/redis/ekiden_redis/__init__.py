"""Redis and Valkey as a broker and result store: ``redis://``, ``rediss://``, ``unix://``, Sentinel and Cluster."""

from ekiden_redis.backend import RedisBackend
from ekiden_redis.transport import RedisTransport

__all__ = ["RedisBackend", "RedisTransport"]
