"""The raw client's queue for this measurement: the one of the broker's raw_....py."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def opened() -> Any:
    """It, on the server that is measured; whoever opens it closes it."""
    return raw_queue(os.environ)


def raw_queue(told: Mapping[str, str]) -> Any:
    """The same for whom the server's ``environment`` is told."""
    url, name = told["BENCH_URL"], f"{told['BENCH_NAME']}-raw"
    match told["BENCH_BROKER"]:
        case "redis":
            import raw_redis

            return raw_redis.Raw(url, name)
        case "rabbitmq":
            import raw_rabbitmq

            return raw_rabbitmq.Raw(url, name, told["BENCH_QUEUE_TYPE"])
        case "mongodb":
            import raw_mongodb

            return raw_mongodb.Raw(url, name)
        case "couchdb":
            import raw_couchdb

            return raw_couchdb.Raw(url, name)
        case broker:
            raise ValueError(broker)
