"""What moves messages inside Redis: every script, in its own words. ``ekiden_redis.keys`` names what they move.

What always holds, because a script is carried out as a whole or, where it cannot be, not at all:

- A message is in ``messages`` from when it is published until it is settled or purged, and its id meanwhile in
  exactly one of ``ready``, ``delayed`` and ``leased``.
- Its *place* is its priority and its age in one number: 9 - priority, then a sequence number. It keeps it, so what is
  released, or comes back after its lease, is where it was.
- ``held`` has ATTEMPTS (how often it was handed out, 4 bytes), PLACE (8 bytes) and TOKEN (16 bytes) for what is
  delayed or leased, and for what is ready and has been handed out before. The token is zero unless it is leased;
  then spaces follow it, to a length (beyond ``hash-max-listpack-value``) at which Redis keeps ``held`` as a real hash.
- The token is drawn by the consumer, afresh for each claim: 8 bytes that are always the same for its name, 8 random
  ones. Whoever shows another one has lost the message. A delivery's tag is its token followed by the id.
- Time is the server's, in milliseconds.

Who does what:

    PUBLISH      messages +, ready + or delayed +, rings the bell
    CLAIM        delayed -> ready when due, leased -> ready when the lease has ended, ready -> leased;
                 rings again when it leaves something
    SETTLE       leased -, messages -                     HAND_OVER    the same, after publishing what follows
    EXTEND       leased: later                            GIVE_BACK    leased -> ready or delayed
    RECLAIM      leased -> ready for all that a consumer of some name holds
    DEPTH, BROWSE    read                                 PURGE        ready -, delayed -, messages -
    RING         rings where something is ready           KEEP         has the keys of a reply queue live on

**The bell.** A consumer that finds nothing blocks on ``bell`` (BLPOP). Whoever makes messages ready puts one element
there, if there is none; Redis hands it to whoever has waited longest. Whoever claims takes the element away, and puts
it back if something stays ready: so the ring is passed on from consumer to consumer, as many as are needed. A ring
that is lost costs time only: every consumer looks once a second.

**A full server** (maxmemory) refuses a command that needs memory, unless the script has written before: then it lets
it finish. So PUBLISH and HAND_OVER begin with what needs memory and are refused as a whole, unless they are told to go
``beyond``; the others begin with a deletion, often of nothing, and do their work, which makes room. What may go beyond
is said in ``ekiden_redis.full``.

**What others have written** under these keys holds nothing up. A key that holds another kind of thing makes a script
fail before it has done anything that would lose a message, and ``Client`` sets the key aside and runs it again; what
is written before is undone, or repeated without harm. An entry of ``held`` that cannot be read counts as none: the
message has attempt 0 then, and a place in the middle. A message that cannot be read is handed out like any other, and
the consumer sends it to the dead letters.

**Bounded work.** No script handles more than ``AT_ONCE`` messages of a kind, whatever lies in the queue. Every
claimer promotes and takes back, so there is no leader and nothing that runs by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from ekiden_redis.client import Script

AT_ONCE = 256
"""How many messages one script publishes, promotes, takes back, hands out, settles, shows or purges."""

TOKEN_BYTES, NAME_BYTES = 16, 8
ENTRY_BYTES = 12 + TOKEN_BYTES
PADDING_BYTES = 65 - ENTRY_BYTES
RANKS = 2**48
"""Places of one priority: a place is (9 - priority) * RANKS + sequence, below 2**53, where doubles are exact."""

MIDDLE_RANK = 5
LATEST_MS = 253_402_300_799_000
"""The end of the year 9999. What is due later is due then, and no lease ends later."""

_SEQUENCE_PER_MILLISECOND = 64
_SEQUENCE_KEPT_MS = 24 * 3600 * 1000

_CLOCK = """
-- The server's clock in milliseconds. (Since Redis 5 a script may write after it has asked.)
local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
"""

_RING = """
local function ring(bell)
  local rung = redis.pcall('LLEN', bell)
  if type(rung) == 'table' then rung = redis.call('DEL', bell) - 1 end
  if rung == 0 then redis.call('RPUSH', bell, '') end
end
"""

_ENTRIES = f"""
local NO_TOKEN = string.rep('\\0', {TOKEN_BYTES})
local function entry(attempts, place, token) return struct.pack('<I4dc{TOKEN_BYTES}', attempts, place, token) end

local function is_place(number) return number >= 0 and number < {10 * RANKS} end
local function middle(now) return {MIDDLE_RANK * RANKS} + now * {_SEQUENCE_PER_MILLISECOND} end

-- The attempts and the place that `held` has; 0, and one in the middle, for nothing or for what cannot be read.
local function attempts_and_place(packed, now)
  if packed and #packed >= 12 then
    local attempts, place = struct.unpack('<I4d', packed)
    if is_place(place) then return attempts, place end
  end
  return 0, middle(now)
end
"""

_STORE = f"""
-- Whether `sequence` holds a text that is no place.
local function is_text(sequence)
  if redis.call('TYPE', sequence).ok ~= 'string' then return false end
  local text = redis.call('GETRANGE', sequence, 0, 20)
  return not string.match(text, '^%d+$') or tonumber(text) >= {RANKS}
end

-- The last of `count` new sequence numbers. A queue that has none starts from the clock, which is beyond all that it
-- had before: so the key of a queue that nobody uses may expire. A text that is no place is replaced.
local function sequence_numbers(sequence, count, now)
  local last = redis.pcall('INCRBY', sequence, count)
  if type(last) == 'table' then
    if is_text(sequence) then redis.call('DEL', sequence) end
    last = redis.call('INCRBY', sequence, count)
  end
  if last <= count or last >= {RANKS} then
    last = now * {_SEQUENCE_PER_MILLISECOND} + count
    redis.call('SET', sequence, string.format('%.0f', last), 'PX', {_SEQUENCE_KEPT_MS})
  end
  return last
end

-- A command has failed: forget the message `id` that was stored for it, and fail as the command does.
local function forget(messages, id, ...)
  redis.call('HDEL', messages, id)
  redis.call(...)
end

-- Store one message, unless its id is taken. Returns whether it was stored, and whether somebody should look:
-- it is ready, or the first that will be due, while consumers wait until what was the first is. `due` is '' for now.
local function store(messages, held, ready, delayed, id, place, due, packed, now)
  if redis.call('HSETNX', messages, id, packed) == 0 then return false, false end
  if due == '' or tonumber(due) <= now then
    if type(redis.pcall('ZADD', ready, place, id)) == 'table' then forget(messages, id, 'ZADD', ready, place, id) end
    return true, true
  end
  local noted = entry(0, place, NO_TOKEN)
  if type(redis.pcall('HSET', held, id, noted)) == 'table' then forget(messages, id, 'HSET', held, id, noted) end
  if type(redis.pcall('ZADD', delayed, due, id)) == 'table' then forget(messages, id, 'ZADD', delayed, due, id) end
  return true, redis.call('ZRANK', delayed, id) == 0
end
"""

_STILL_HELD = f"""
local TOKEN_ENDS = {TOKEN_BYTES}

-- Of the tags ARGV[first], ...: the ids that are held by these tokens, what `held` has for each, and the positions
-- (from 0) of those that are not.
local function still_held(held, first)
  local all, ids, entries, lost = {{}}, {{}}, {{}}, {{}}
  for i = first, #ARGV do all[#all + 1] = string.sub(ARGV[i], {TOKEN_BYTES + 1}) end
  local found = redis.call('HMGET', held, unpack(all))
  for i = 1, #all do
    if found[i] and string.sub(found[i], 13, {ENTRY_BYTES}) == string.sub(ARGV[first + i - 1], 1, {TOKEN_BYTES}) then
      ids[#ids + 1] = all[i]
      entries[#entries + 1] = found[i]
    else
      lost[#lost + 1] = i - 1
    end
  end
  return ids, entries, lost
end
"""

_MAKE_READY = """
-- Make these ids, of `from` (delayed or leased), ready: nobody holds them, and their attempts stay.
local function make_ready(from, held, ready, ids, now)
  local entries = redis.call('HMGET', held, unpack(ids))
  local places, changed = {}, {}
  for i = 1, #ids do
    local attempts, place = attempts_and_place(entries[i], now)
    places[#places + 1] = place
    places[#places + 1] = ids[i]
    changed[#changed + 1] = ids[i]
    changed[#changed + 1] = entry(attempts, place, NO_TOKEN)
  end
  redis.call('ZADD', ready, unpack(places))
  redis.call('ZREM', from, unpack(ids))
  redis.call('HSET', held, unpack(changed))
end
"""


def _script(*parts: str, kinds: Sequence[str], repeatable: bool = True) -> Script:
    return Script("\n".join(part.strip("\n") for part in parts), kinds=kinds, repeatable=repeatable)


_MESSAGES, _HELD, _READY, _DELAYED, _LEASED = "hash", "hash", "zset", "zset", "zset"
_BELL, _SEQUENCE, _OPEN, _EVENTS = "list", "string", "string", "stream"
"""What kind of thing is under which key."""


PUBLISH = _script(
    _CLOCK,
    _RING,
    _ENTRIES,
    _STORE,
    f"""
-- KEYS: messages held ready delayed bell sequence, and of a reply queue open. ARGV: how long a reply queue's keys live
-- on (ms), '1' for what may go beyond a full server's memory, then for each message its id, 9 - priority, when it is
-- due (ms; '' for now), packed. Replies may go beyond: they are taken away soon.
-- Returns the positions (from 0) of those whose id was taken. What is for a reply queue that is not open vanishes.
local messages, held, ready, delayed, bell, sequence, open = unpack(KEYS)
if open and redis.call('EXISTS', open) == 0 then return {{}} end
if open or ARGV[2] == '1' then redis.call('HDEL', messages, '') end
local now = clock()
local count = (#ARGV - 2) / 4
local last = sequence_numbers(sequence, count, now)
local taken, look = {{}}, false
for i = 1, count do
  local place = ARGV[4 * i] * {RANKS} + last - count + i
  local id, due, packed = ARGV[4 * i - 1], ARGV[4 * i + 1], ARGV[4 * i + 2]
  local stored, rings = store(messages, held, ready, delayed, id, place, due, packed, now)
  if not stored then taken[#taken + 1] = i - 1 end
  look = look or rings
end
if look then ring(bell) end
if open then
  for i = 1, 6 do redis.call('PEXPIRE', KEYS[i], ARGV[1]) end
end
return taken
""",
    kinds=(_MESSAGES, _HELD, _READY, _DELAYED, _BELL, _SEQUENCE, _OPEN),
)

CLAIM = _script(
    _CLOCK,
    _RING,
    _ENTRIES,
    _MAKE_READY,
    f"""
-- KEYS: for each queue, in the order in which they are to be served, messages held ready delayed leased bell.
-- ARGV: how many (at most {AT_ONCE}), the lease in ms, the token.
-- Returns in how many ms the next one of them may become ready ('' for never as yet), then for each queue that gave
-- some its position (from 0), the ids, what was packed, and the attempts.
local room, lease, token = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local now = clock()
local lease_ends = string.format('%.0f', now + lease)
local next_change
local answer = {{''}}
-- Redis looks for a field of a small hash from its beginning on, field by field, until a value in it is longer than 64
-- bytes: for 256 claimed among some hundreds that was more than half of all it did.
local PADDING = string.rep(' ', {PADDING_BYTES})

-- Make ready what the clock has reached in `from`, and note when it reaches the next.
local function promote(from, held, ready)
  local head = redis.call('ZRANGE', from, 0, 0, 'WITHSCORES')
  if head[2] and tonumber(head[2]) <= now then
    make_ready(from, held, ready, redis.call('ZRANGEBYSCORE', from, '-inf', now, 'LIMIT', 0, {AT_ONCE}), now)
    head = redis.call('ZRANGE', from, 0, 0, 'WITHSCORES')
  end
  local change = head[2] and tonumber(head[2])
  if change and change <= {LATEST_MS} and (not next_change or change < next_change) then next_change = change end
end

-- What is popped of `ready`, its ids, what is packed, and the entries. Where one of the keys holds something else: what
-- was popped is ready again, and this fails as reading that did; or returns nothing where others were claimed before,
-- so that they are handed out and the next call fails.
local function take(messages, held, ready)
  local popped = redis.pcall('ZPOPMIN', ready, room)
  if not popped.err then
    local ids = {{}}
    for i = 1, #popped, 2 do ids[#ids + 1] = popped[i] end
    if #ids == 0 then return popped, ids end
    local packed = redis.pcall('HMGET', messages, unpack(ids))
    local entries = redis.pcall('HMGET', held, unpack(ids))
    if not packed.err and not entries.err then return popped, ids, packed, entries end
    for i = 1, #popped, 2 do redis.call('ZADD', ready, popped[i + 1], popped[i]) end
  end
  if #answer == 1 then
    redis.call('ZCARD', ready)
    redis.call('HLEN', messages)
    redis.call('HLEN', held)
  end
  return {{}}, {{}}
end

-- First of all queues, since it may fail.
for q = 0, #KEYS - 6, 6 do
  redis.call('DEL', KEYS[q + 6])
  promote(KEYS[q + 4], KEYS[q + 2], KEYS[q + 3])
  promote(KEYS[q + 5], KEYS[q + 2], KEYS[q + 3])
end

for q = 0, #KEYS / 6 - 1 do
  local messages, held, ready, delayed, leased, bell = unpack(KEYS, 6 * q + 1, 6 * q + 6)
  local popped, ids, packed, entries = {{}}, {{}}, nil, nil
  if room > 0 then popped, ids, packed, entries = take(messages, held, ready) end
  if #ids > 0 then
    local changed, leases, attempts = {{}}, {{}}, {{}}
    for i = 1, #ids do
      attempts[i] = (entries[i] and attempts_and_place(entries[i], now) or 0) + 1
      -- Without its message (a server that evicts keys) there is nothing to hand out.
      if packed[i] then
        local place = tonumber(popped[2 * i])
        if not is_place(place) then place = middle(now) end
        changed[#changed + 1] = ids[i]
        changed[#changed + 1] = entry(attempts[i], place, token) .. PADDING
        leases[#leases + 1] = lease_ends
        leases[#leases + 1] = ids[i]
      end
    end
    if #changed > 0 then
      redis.call('HSET', held, unpack(changed))
      redis.call('ZADD', leased, unpack(leases))
    end
    room = room - #ids
    answer[#answer + 1] = q
    answer[#answer + 1] = ids
    answer[#answer + 1] = packed
    answer[#answer + 1] = attempts
    if not next_change or now + lease < next_change then next_change = now + lease end
  end
  if redis.call('EXISTS', ready) == 1 then ring(bell) end
end
if next_change then answer[1] = math.max(0, next_change - now) end
return answer
""",
    kinds=(_MESSAGES, _HELD, _READY, _DELAYED, _LEASED, _BELL),
    repeatable=False,
)

SETTLE = _script(
    _STILL_HELD,
    """
-- KEYS: messages held leased. ARGV: tags. Returns the positions (from 0) of those that are lost; of those that are
-- not there at all, which may have been settled, -1 - position.
local messages, held, leased = unpack(KEYS)
local ids, _, lost = still_held(held, 1)
for i = 1, #lost do
  local id = string.sub(ARGV[lost[i] + 1], TOKEN_ENDS + 1)
  if redis.call('HEXISTS', messages, id) == 0 then lost[i] = -1 - lost[i] end
end
if #ids > 0 then
  redis.call('ZREM', leased, unpack(ids))
  redis.call('HDEL', held, unpack(ids))
  redis.call('HDEL', messages, unpack(ids))
end
return lost
""",
    kinds=(_MESSAGES, _HELD, _LEASED),
)

HAND_OVER = _script(
    _CLOCK,
    _RING,
    _ENTRIES,
    _STORE,
    f"""
-- KEYS: for each queue that is concerned: messages held ready delayed leased bell sequence open.
-- ARGV: how long a reply queue's keys live on (ms), '1' for what may go beyond a full server's memory, then for each
-- ending its queue's position (from 0), its tag, how many messages follow, and for each of these its queue's position,
-- whether that is a reply queue ('1' or '0'), its id, 9 - priority, when it is due (ms; '' for now), packed.
-- Returns the positions (from 0) of the endings that are lost, as SETTLE does; nothing follows on those.
if ARGV[2] == '1' then redis.call('HDEL', KEYS[2], '') end
local now = clock()
local at, number, lost = 3, 0, {{}}

local function follow(queue, temporary, id, rank, due, packed)
  queue = 8 * queue
  local messages, held, ready, delayed, _, bell, sequence, open = unpack(KEYS, queue + 1, queue + 8)
  if temporary == '1' and redis.call('EXISTS', open) == 0 then return end
  local place = rank * {RANKS} + sequence_numbers(sequence, 1, now)
  local _, rings = store(messages, held, ready, delayed, id, place, due, packed, now)
  if rings then ring(bell) end
  if temporary == '1' then
    for i = 1, 7 do redis.call('PEXPIRE', KEYS[queue + i], ARGV[1]) end
  end
end

while at <= #ARGV do
  local queue, tag, count = 8 * ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  local messages, held, leased = KEYS[queue + 1], KEYS[queue + 2], KEYS[queue + 5]
  at = at + 3
  local id = string.sub(tag, {TOKEN_BYTES + 1})
  local found = redis.call('HGET', held, id)
  local is_held = found and string.sub(found, 13, {ENTRY_BYTES}) == string.sub(tag, 1, {TOKEN_BYTES})
  for _ = 1, count do
    if is_held then follow(unpack(ARGV, at, at + 5)) end
    at = at + 6
  end
  if is_held then
    redis.call('ZREM', leased, id)
    redis.call('HDEL', held, id)
    redis.call('HDEL', messages, id)
  else
    lost[#lost + 1] = redis.call('HEXISTS', messages, id) == 0 and -1 - number or number
  end
  number = number + 1
end
return lost
""",
    kinds=(_MESSAGES, _HELD, _READY, _DELAYED, _LEASED, _BELL, _SEQUENCE, _OPEN),
)

EXTEND = _script(
    _CLOCK,
    _STILL_HELD,
    """
-- KEYS: held leased. ARGV: the lease in ms, then tags. Returns the positions (from 0) of those that are lost.
local held, leased = unpack(KEYS)
redis.call('HDEL', held, '')
local ids, _, lost = still_held(held, 2)
if #ids > 0 then
  local leases, lease_end = {}, clock() + ARGV[1]
  for i = 1, #ids do
    leases[#leases + 1] = lease_end
    leases[#leases + 1] = ids[i]
  end
  redis.call('ZADD', leased, unpack(leases))
end
return lost
""",
    kinds=(_HELD, _LEASED),
)

GIVE_BACK = _script(
    _CLOCK,
    _RING,
    _ENTRIES,
    _STILL_HELD,
    """
-- KEYS: held ready delayed leased bell. ARGV: how many attempts are taken back of each (0 or 1), in how many ms it is
-- due (0 for now), then tags. What is lost is passed over.
local held, ready, delayed, leased, bell = unpack(KEYS)
local less, delay = tonumber(ARGV[1]), tonumber(ARGV[2])
local ids, entries = still_held(held, 3)
if #ids == 0 then return end
redis.call('HDEL', held, '')
local now = clock()
local due = string.format('%.0f', now + delay)
for i = 1, #ids do
  local attempts, place = attempts_and_place(entries[i], now)
  if delay > 0 then redis.call('ZADD', delayed, due, ids[i]) else redis.call('ZADD', ready, place, ids[i]) end
  redis.call('HSET', held, ids[i], entry(math.max(0, attempts - less), place, NO_TOKEN))
end
redis.call('ZREM', leased, unpack(ids))
ring(bell)
""",
    kinds=(_HELD, _READY, _DELAYED, _LEASED, _BELL),
)

RECLAIM = _script(
    _CLOCK,
    _RING,
    _ENTRIES,
    f"""
-- KEYS: held ready leased bell. ARGV: what the tokens begin with, how many attempts are taken back of each (0 or 1),
-- where the last call ended ('0' at first). Looks at some {AT_ONCE} leases, and makes ready those with such a token,
-- and those that would never end. Returns where this call ended: '0' when it has seen all.
local held, ready, leased, bell = unpack(KEYS)
local owner, less = ARGV[1], tonumber(ARGV[2])
redis.call('HDEL', held, '')
local now = clock()
local page = redis.call('ZSCAN', leased, ARGV[3], 'COUNT', {AT_ONCE})
local ids, ends = {{}}, {{}}
for i = 1, #page[2], 2 do
  ids[#ids + 1] = page[2][i]
  ends[#ends + 1] = tonumber(page[2][i + 1])
end
local found = false
if #ids > 0 then
  local entries = redis.call('HMGET', held, unpack(ids))
  for i = 1, #ids do
    local is_ours = entries[i] and string.sub(entries[i], 13, 12 + #owner) == owner
    if is_ours or ends[i] > {LATEST_MS} then
      local attempts, place = attempts_and_place(entries[i], now)
      redis.call('ZADD', ready, place, ids[i])
      redis.call('HSET', held, ids[i], entry(math.max(0, attempts - (is_ours and less or 0)), place, NO_TOKEN))
      redis.call('ZREM', leased, ids[i])
      found = true
    end
  end
end
if found then ring(bell) end
return page[1]
""",
    kinds=(_HELD, _READY, _LEASED, _BELL),
)

DEPTH = _script(
    _CLOCK,
    """
-- KEYS: ready delayed leased. Returns how many are ready, delayed, leased. What is due, or whose lease has ended, is
-- ready, although no claim has moved it yet.
local ready, delayed, leased = unpack(KEYS)
local now = clock()
local due, ended = redis.call('ZCOUNT', delayed, '-inf', now), redis.call('ZCOUNT', leased, '-inf', now)
local waiting = redis.call('ZCARD', ready) + due + ended
return {waiting, redis.call('ZCARD', delayed) - due, redis.call('ZCARD', leased) - ended}
""",
    kinds=(_READY, _DELAYED, _LEASED),
)

BROWSE = _script(
    _CLOCK,
    _ENTRIES,
    f"""
-- KEYS: messages held ready delayed leased. ARGV: how many (at most {AT_ONCE}), and behind which one: in which set
-- (1 ready, 2 delayed, 3 leased), its score there ('' for the beginning), its id. Returns for each its set, its score,
-- its id, what is packed, its attempts, and whether the clock has reached its score.
local messages, held = KEYS[1], KEYS[2]
local room, set, score, after = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local now = clock()
local answer = {{}}

-- How many members come before or are the one with `score` and the id `after`, whether or not it is still there.
-- Members of one score are ordered by their ids, so it is searched for among them by halves.
local function rank_behind(key)
  if score == '' then return 0 end
  local low = redis.call('ZCOUNT', key, '-inf', '(' .. score)
  local high = redis.call('ZCOUNT', key, '-inf', score)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if redis.call('ZRANGE', key, middle, middle)[1] <= after then low = middle + 1 else high = middle end
  end
  return low
end

while set <= 3 and room > 0 do
  local from = rank_behind(KEYS[set + 2])
  local page = redis.call('ZRANGE', KEYS[set + 2], from, from + room - 1, 'WITHSCORES')
  for i = 1, #page, 2 do
    local id, at = page[i], page[i + 1]
    local found = redis.call('HGET', held, id)
    answer[#answer + 1] = {{
      set, at, id, redis.call('HGET', messages, id), found and attempts_and_place(found, now) or 0,
      set > 1 and tonumber(at) <= now and 1 or 0,
    }}
    room = room - 1
  end
  set, score = set + 1, ''
end
return answer
""",
    kinds=(_MESSAGES, _HELD, _READY, _DELAYED, _LEASED),
)

PURGE = _script(
    _CLOCK,
    f"""
-- KEYS: messages held ready delayed leased. Deletes {AT_ONCE} of what is ready, delayed, or was leased until its lease
-- ended, and returns how many there were.
local messages, held, ready, delayed, leased = unpack(KEYS)
local now = clock()
local ids = {{}}
local function take(key, highest)
  local found = redis.call('ZRANGEBYSCORE', key, '-inf', highest, 'LIMIT', 0, {AT_ONCE} - #ids)
  if #found > 0 then redis.call('ZREM', key, unpack(found)) end
  for i = 1, #found do ids[#ids + 1] = found[i] end
end
take(ready, '+inf')
take(delayed, '+inf')
take(leased, now)
if #ids > 0 then
  redis.call('HDEL', held, unpack(ids))
  redis.call('HDEL', messages, unpack(ids))
end
return #ids
""",
    kinds=(_MESSAGES, _HELD, _READY, _DELAYED, _LEASED),
)

RING = _script(
    """
-- KEYS: ready bell. Rings if something is ready: whoever was rung before has not looked.
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('DEL', KEYS[2])
  redis.call('RPUSH', KEYS[2], '')
end
""",
    kinds=(_READY, _BELL),
)

KEEP = _script(
    """
-- KEYS: messages held ready delayed leased bell sequence open, of a reply queue. ARGV: how many ms it lives on.
for i = 1, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[1]) end
redis.call('SET', KEYS[#KEYS], '', 'PX', ARGV[1])
""",
    kinds=(_MESSAGES, _HELD, _READY, _DELAYED, _LEASED, _BELL, _SEQUENCE, _OPEN),
)

BROADCAST = _script(
    """
-- KEYS: events. ARGV: about how many events are kept, for how long after the last one (ms), '1' for what may go beyond
-- a full server's memory, then payloads.
if ARGV[3] == '1' then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
for i = 4, #ARGV do redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', '', ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
""",
    kinds=(_EVENTS,),
    repeatable=False,
)
