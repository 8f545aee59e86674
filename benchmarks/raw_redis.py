"""What redis-py reaches alone, with a queue of the same promises: the ceiling for the Redis transport.

    python benchmarks/raw_redis.py [--messages N] [--url URL]

Like ekiden's, its messages have ids that are refused a second time, priorities, due times, leases that end, attempts
that are counted and a fresh token for each hand-out, all in scripts that are sent by their hash. It leaves out:
headers, several queues, consumer names, follow-ups, answers for each message, the decoding of calls, threads,
running anything, and every error.

    :messages  hash        id -> body
    :claims    hash        id -> attempt:token
    :ready     sorted set  id -> (9 - priority) * 2**44 + number
    :delayed   sorted set  id -> when it is due (ms)
    :leased    sorted set  id -> when its lease ends (ms)
    :bell      list        what waiting consumers wait for
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import redis
from ekiden.message import new_id
from timing import rate_of

BATCH = 100
PRIORITY = 4
LEASE_MS = 60_000
BODY = b'["bench.noop","0191f0c2a5d7f3c09f6e4a8b1d2c7e55",1763821000.123456,[12345],{},{"retries":0,"expires":null}]'

PUBLISH = """
local published = 0
for i = 2, #ARGV, 2 do
  if redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1]) == 1 then
    local number = redis.call('INCR', KEYS[2])
    redis.call('ZADD', KEYS[3], (9 - ARGV[1]) * 17592186044416 + number, ARGV[i])
    published = published + 1
  end
end
if redis.call('LLEN', KEYS[4]) < 8 then redis.call('RPUSH', KEYS[4], '1') end
return published
"""

CLAIM = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, from in ipairs({KEYS[3], KEYS[4]}) do
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', from, '-inf', now, 'LIMIT', 0, 100)) do
    redis.call('ZREM', from, id)
    redis.call('ZADD', KEYS[1], (9 - 4) * 17592186044416 + redis.call('INCR', KEYS[2]), id)
  end
end
local popped = redis.call('ZPOPMIN', KEYS[1], ARGV[1])
if #popped == 0 then return {} end
local ids, leases, claims = {}, {}, {}
local lease_ends = string.format('%.0f', now + ARGV[2])
for i = 1, #popped, 2 do ids[#ids + 1] = popped[i] end
local bodies = redis.call('HMGET', KEYS[5], unpack(ids))
local before = redis.call('HMGET', KEYS[6], unpack(ids))
for i, id in ipairs(ids) do
  leases[#leases + 1] = lease_ends
  leases[#leases + 1] = id
  local attempt = 1
  if before[i] then attempt = tonumber(before[i]:match('%d+')) + 1 end
  before[i] = attempt
  claims[#claims + 1] = id
  claims[#claims + 1] = attempt .. ':' .. ARGV[3]
end
redis.call('ZADD', KEYS[4], unpack(leases))
redis.call('HSET', KEYS[6], unpack(claims))
return {ids, bodies, before}
"""

SETTLE = """
local claims = redis.call('HMGET', KEYS[3], unpack(ARGV, 2))
local ours = {}
for i = 2, #ARGV do
  local claim = claims[i - 1]
  if claim and claim:match(':(.*)') == ARGV[1] then ours[#ours + 1] = ARGV[i] end
end
if #ours == 0 then return 0 end
redis.call('ZREM', KEYS[1], unpack(ours))
redis.call('HDEL', KEYS[2], unpack(ours))
redis.call('HDEL', KEYS[3], unpack(ours))
return #ours
"""


class Raw:
    """One queue, by redis-py and scripts."""

    def __init__(self, url: str, name: str) -> None:
        self._redis = redis.Redis.from_url(url)
        parts = ("messages", "claims", "ready", "delayed", "leased", "number", "bell")
        self._keys = {part: f"{{{name}}}:{part}" for part in parts}
        self._publish = self._redis.script_load(PUBLISH)
        self._claim = self._redis.script_load(CLAIM)
        self._settle = self._redis.script_load(SETTLE)
        self._publish_keys = [self._keys[part] for part in ("messages", "number", "ready", "bell")]

    def publish_one_by_one(self, count: int) -> None:
        """One script call each, which stores a message once, in its order, and rings."""
        keys = self._publish_keys
        for _ in range(count):
            self._redis.evalsha(self._publish, 4, *keys, PRIORITY, new_id(), BODY)

    def publish_in_batches(self, count: int) -> None:
        """The same for 100 messages in each call, and five calls in each round trip."""
        keys = self._publish_keys
        calls = count // BATCH
        while calls > 0:
            pipeline = self._redis.pipeline(transaction=False)
            for _ in range(min(5, calls)):
                arguments: list[str | bytes] = []
                for _ in range(BATCH):
                    arguments.append(new_id())
                    arguments.append(BODY)
                pipeline.evalsha(self._publish, 4, *keys, PRIORITY, *arguments)
            pipeline.execute()
            calls -= 5

    def drain(self, count: int) -> float:
        """Claim 100, settle 100, until ``count`` are settled; how many a second."""
        claim_keys = [self._keys[part] for part in ("ready", "number", "delayed", "leased", "messages", "claims")]
        settle_keys = [self._keys[part] for part in ("leased", "messages", "claims")]
        began = time.perf_counter()
        left = count
        while left > 0:
            token = os.urandom(32).hex()  # so long that Redis keeps the claims in a real hash, as ekiden has it
            ids, _bodies, _attempts = self._redis.evalsha(self._claim, 6, *claim_keys, BATCH, LEASE_MS, token)
            settled = self._redis.evalsha(self._settle, 3, *settle_keys, token, *ids)
            if settled != len(ids):
                raise SystemExit("a lease was lost in the raw loop")
            left -= settled
        return count / (time.perf_counter() - began)

    def close(self) -> None:
        """Delete its keys."""
        self._redis.delete(*self._keys.values())
        self._redis.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--url", default="redis://127.0.0.1:6379/9")
    options = parser.parse_args()
    raw = Raw(options.url, f"bench-{new_id()}")
    rates: dict[str, list[float]] = {}
    for _ in range(5):
        one_by_one = options.messages // 4
        rates.setdefault("publish, one at a time", []).append(rate_of(raw.publish_one_by_one, one_by_one))
        raw.drain(one_by_one)
        rates.setdefault("publish, 100 at a time", []).append(rate_of(raw.publish_in_batches, options.messages))
        rates.setdefault("claim 100 and settle 100", []).append(raw.drain(options.messages))
    raw.close()
    for what, values in rates.items():
        print(f"{what:32} {statistics.median(values):10.0f} per s   ({min(values):.0f} to {max(values):.0f})")


if __name__ == "__main__":
    main()
