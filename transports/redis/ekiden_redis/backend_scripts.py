"""The scripts of the result store: every change that must not fall into parts. ``store_keys`` says what there is.

All keys of one task have one hash tag, and so have all records, so that a script never needs two servers of a cluster.
Carried out a second time with the same arguments a script does no harm; only WRITE answers something else then, so it
is the one that is never repeated without the caller's knowledge.

A record and its place in the two sets are written by one script. What has expired leaves the sets bit by bit with
each write, and where every record expires the sets do so, too: no record, no keys.
Time is the server's: ``now`` is its clock in milliseconds.

A server that has reached its maxmemory refuses a command that needs memory, unless the script has written before. So
what may go ``beyond`` begins with a command that counts as writing and changes nothing; ``ekiden_redis.full`` says what
may. BEGIN always may: a note is small, and who asks holds a message already.

What cannot be read counts as not there: a result without its order, a note without its step, a record without its
version. The next one is written over it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ekiden.states import FINAL_RANK, RETRY, rank

from ekiden_redis.client import Script
from ekiden_redis.stored_results import ORDER_BASE, ORDER_DIGITS, VERSION_DIGITS

LONGEST_TOLD = 65_536
"""Bytes. What is longer is not sent to who waits: a server hangs up on whoever is behind by some megabytes."""

ENDED_AT_ONCE = 20
"""Of the records that have ended, so many leave the sets at once."""

_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

_ORDER = """
-- How far the task of a stored result has come; nil for what is no result.
local function order(stored)
  local digits = string.match(stored, '^(<<ORDER_PATTERN>>)[\\144-\\159]')
  return digits and tonumber(digits)
end
"""

_TIDY = """
local ended = redis.call('ZRANGEBYSCORE', ends, '-inf', string.format('(%.0f', now), 'LIMIT', 0, <<AT_ONCE>>)
for _, each in ipairs(ended) do
  redis.call('ZREM', all, each)
  redis.call('ZREM', ends, each)
end
"""

_FILL_IN = {
    "NOW": _NOW.strip(),
    "TIDY": _TIDY.strip(),
    "ORDER": _ORDER.strip(),
    "ORDER_PATTERN": "%d" * ORDER_DIGITS,
    "BASE": ORDER_BASE,
    "DIGITS": ORDER_DIGITS,
    "FINAL": FINAL_RANK,
    "RETRY": rank(RETRY),
    "LONGEST_TOLD": LONGEST_TOLD,
    "AT_ONCE": ENDED_AT_ONCE,
    "VERSION_DIGITS": VERSION_DIGITS,
}


def _script(source: str, *, kinds: Sequence[str], repeatable: bool = True) -> Script:
    for name, value in _FILL_IN.items():  # in this order: some are filled in themselves
        source = source.replace(f"<<{name}>>", str(value))
    assert "<<" not in source, source
    return Script(source.strip(), kinds=kinds, repeatable=repeatable)


PUT = _script(
    """
-- KEYS: a result's key for each result. ARGV: what publishes, how a channel's name ends, '1' for what may go beyond,
-- then for each result the milliseconds that it is kept ('' for ever) and what to store. Returns '1' or '0' for each.
-- What may follow what is stored_results.follows: nothing a final result, a final one everything else, and
-- otherwise the order may not fall. Mostly there is nothing yet, so that is tried before it is looked.
local publish, channel_end = ARGV[1], ARGV[2]
if ARGV[3] == '1' then redis.call('GETEX', KEYS[1]) end
<<NOW>>
local kept, ends_at

local function set(key, value, condition)
  if ends_at then
    return redis.call('SET', key, value, condition, 'PXAT', ends_at)
  end
  return redis.call('SET', key, value, condition)
end

<<ORDER>>
local answers = {}
for i = 1, #KEYS do
  local key, value = KEYS[i], ARGV[2 * i + 3]
  if kept ~= ARGV[2 * i + 2] then
    kept = ARGV[2 * i + 2]
    ends_at = kept ~= '' and string.format('%.0f', now + kept)
  end
  local is_final = string.sub(value, <<DIGITS>>, <<DIGITS>>) == '<<FINAL>>'
  local stored = set(key, value, 'NX')
  if not stored then
    local old = order(redis.call('GETRANGE', key, 0, <<DIGITS>>))
    if not old or old % <<BASE>> ~= <<FINAL>> and (is_final or order(value) >= old) then
      stored = set(key, value, 'XX')
    end
  end
  if stored and is_final then
    redis.call(publish, key .. channel_end, #value <= <<LONGEST_TOLD>> and value or '')
  end
  answers[i] = stored and '1' or '0'
end
return table.concat(answers)
""",
    kinds=("string",),
)

BEGIN = _script(
    """
-- KEYS: for each start its result's key and its note's key. ARGV: for each its step, its message's id, and the
-- milliseconds that the note is kept ('' for ever). Returns for each 'GO', 'SECOND', or what is stored: it has ended.
<<ORDER>>
local answers = {}
for i = 1, #KEYS / 2 do
  local result_key, note_key = KEYS[2 * i - 1], KEYS[2 * i]
  local step, message_id, kept = tonumber(ARGV[3 * i - 2]), ARGV[3 * i - 1], ARGV[3 * i]
  local stored = redis.call('GET', result_key)
  local noted = redis.call('GETEX', note_key)
  local stored_step, stored_rank = -1, -1
  local reached = stored and order(stored)
  if reached then
    stored_step, stored_rank = math.floor(reached / <<BASE>>), reached % <<BASE>>
  end
  local noted_step, noted_id = -1, nil
  if noted then
    local digits
    digits, noted_id = string.match(noted, '^(%d+) (.*)$')
    noted_step = tonumber(digits or '-1')
  end
  if stored_step > step or noted_step > step then
    answers[i] = 'SECOND'
  elseif stored_rank == <<FINAL>> or (stored_rank == <<RETRY>> and stored_step == step) then
    answers[i] = stored
  elseif noted_step == step and noted_id ~= message_id then
    answers[i] = 'SECOND'
  else
    local note = ARGV[3 * i - 2] .. ' ' .. message_id
    if kept == '' then
      redis.call('SET', note_key, note)
    else
      redis.call('SET', note_key, note, 'PX', kept)
    end
    answers[i] = 'GO'
  end
end
return answers
""",
    kinds=("string",),
)

FORGET = _script(
    """
-- KEYS: a result's key. ARGV: what was found there. Deletes that, unless it is something else by now.
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('UNLINK', KEYS[1]) end
""",
    kinds=("string",),
)

JOIN = _script(
    """
-- KEYS: the join's key. ARGV: the member, its outcome, how many members there are, the milliseconds that the join is
-- kept from now ('' for ever), and '1' for what may go beyond. Returns how many have arrived and, once that is all,
-- every member and its outcome.
if ARGV[5] == '1' then redis.call('HDEL', KEYS[1], '\\0') end
redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2])
if ARGV[4] == '' then
  redis.call('PERSIST', KEYS[1])
else
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
local arrived = redis.call('HLEN', KEYS[1])
if arrived < tonumber(ARGV[3]) then
  return {arrived, {}}
end
return {arrived, redis.call('HGETALL', KEYS[1])}
""",
    kinds=("hash",),
)

WRITE = _script(
    """
-- KEYS: the record's key, the set of all, the set of those that end. ARGV: the record's KEY, the version that is
-- expected ('' any), 'write' or 'delete', the milliseconds that it is kept ('' for ever), the value, and '1' for what
-- may go beyond.
-- Returns the new version, 0 when it was deleted, or -1 when the version is another one: then nothing is changed.
local record_key, all, ends = KEYS[1], KEYS[2], KEYS[3]
local key, expected, kept = ARGV[1], ARGV[2], ARGV[4]
<<NOW>>

local digits = string.match(redis.call('GETRANGE', record_key, 0, <<VERSION_DIGITS>>), '^(%d+) ')
local version = tonumber(digits or '0')
if ARGV[6] == '1' then redis.call('ZREM', ends, '\\0') end
if expected ~= '' and tonumber(expected) ~= version then
  return -1
end

if ARGV[3] == 'delete' then
  version = 0
  redis.call('ZREM', all, key)
  redis.call('ZREM', ends, key)
  redis.call('UNLINK', record_key)
else
  -- The sets first: where one of them holds something else, this fails, and nothing is written.
  version = version + 1
  local value = string.format('%.0f ', version) .. ARGV[5]
  redis.call('ZADD', all, 0, key)
  if kept == '' then
    redis.call('ZREM', ends, key)
    redis.call('SET', record_key, value)
  else
    local ends_at = string.format('%.0f', now + kept)
    redis.call('ZADD', ends, ends_at, key)
    redis.call('SET', record_key, value, 'PXAT', ends_at)
  end
end

<<TIDY>>

-- Where every record ends, the sets end with the last of them.
local last = redis.call('ZRANGE', ends, -1, -1, 'WITHSCORES')
if last[1] and redis.call('ZCARD', all) == redis.call('ZCARD', ends) then
  redis.call('PEXPIREAT', all, last[2])
  redis.call('PEXPIREAT', ends, last[2])
else
  redis.call('PERSIST', all)
  redis.call('PERSIST', ends)
end
return version
""",
    kinds=("string", "zset", "zset"),
    repeatable=False,
)

TIDY = _script(
    """
-- KEYS: the set of all records' KEYs, the set of those that end. Takes some that have ended out of both.
local all, ends = KEYS[1], KEYS[2]
<<NOW>>
<<TIDY>>
return false
""",
    kinds=("zset",),
)
