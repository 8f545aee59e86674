"""What moves messages inside Redis: every script, in its own words. ``ekiden_redis.keys`` names what they move.

What always holds, because a script is carried out as a whole or, in a full server, not at all:

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
it finish. So PUBLISH and HAND_OVER begin with what needs memory and are refused as a whole; the others begin with a
deletion, often of nothing, and do their work, which makes room.

**Bounded work.** No script handles more than ``AT_ONCE`` messages of a kind, whatever lies in the queue. Every
claimer promotes and takes back, so there is no leader and nothing that runs by itself.
"""

from __future__ import annotations

from ekiden_redis.client import Script

AT_ONCE = 256
"""How many messages one script publishes, promotes, takes back, hands out, settles, shows or purges."""

TOKEN_BYTES, NAME_BYTES = 16, 8
ENTRY_BYTES = 12 + TOKEN_BYTES
PADDING_BYTES = 65 - ENTRY_BYTES
TAG_ID_STARTS = TOKEN_BYTES

RANKS = 2**48
"""Places of one priority: a place is (9 - priority) * RANKS + sequence, below 2**53, where doubles are exact."""

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
  if redis.call('LLEN', bell) == 0 then redis.call('RPUSH', bell, '') end
end
"""

_ENTRIES = f"""
local NO_TOKEN = string.rep('\\0', {TOKEN_BYTES})
local function entry(attempts, place, token) return struct.pack('<I4dc{TOKEN_BYTES}', attempts, place, token) end
local function attempts_and_place(packed) return struct.unpack('<I4d', packed) end
"""

_STORE = f"""
-- The last of `count` new sequence numbers. A queue that has none starts from the clock, which is beyond all that it
-- had before: so the key of a queue that nobody uses may expire.
local function sequence_numbers(sequence, count, now)
  local last = redis.call('INCRBY', sequence, count)
  if last == count then
    last = now * {_SEQUENCE_PER_MILLISECOND} + count
    redis.call('SET', sequence, string.format('%.0f', last), 'PX', {_SEQUENCE_KEPT_MS})
  end
  return last
end

-- Store one message, unless its id is taken. Returns whether it was stored, and whether somebody should look:
-- it is ready, or the first that will be due, while consumers wait until what was the first is. `due` is '' for now.
local function store(messages, held, ready, delayed, id, place, due, packed, now)
  if redis.call('HSETNX', messages, id, packed) == 0 then return false, false end
  if due == '' or tonumber(due) <= now then
    redis.call('ZADD', ready, place, id)
    return true, true
  end
  redis.call('HSET', held, id, entry(0, place, NO_TOKEN))
  redis.call('ZADD', delayed, due, id)
  return true, redis.call('ZRANK', delayed, id) == 0
end
"""

_STILL_HELD = f"""
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
local function make_ready(from, held, ready, ids)
  local entries = redis.call('HMGET', held, unpack(ids))
  redis.call('ZREM', from, unpack(ids))
  local places, changed = {}, {}
  for i = 1, #ids do
    if entries[i] then
      local attempts, place = attempts_and_place(entries[i])
      places[#places + 1] = place
      places[#places + 1] = ids[i]
      changed[#changed + 1] = ids[i]
      changed[#changed + 1] = entry(attempts, place, NO_TOKEN)
    end
  end
  if #places > 0 then
    redis.call('ZADD', ready, unpack(places))
    redis.call('HSET', held, unpack(changed))
  end
end
"""


def _script(*parts: str, repeatable: bool = True) -> Script:
    return Script("\n".join(part.strip("\n") for part in parts), repeatable=repeatable)


PUBLISH = _script(
    _CLOCK,
    _RING,
    _ENTRIES,
    _STORE,
    f"""
-- KEYS: messages held ready delayed bell sequence, and of a reply queue open. ARGV: how long a reply queue's keys live
-- on (ms), then for each message its id, 9 - priority, when it is due (ms; '' for now), packed.
-- Returns the positions (from 0) of those whose id was taken. What is for a reply queue that is not open vanishes.
local messages, held, ready, delayed, bell, sequence, open = unpack(KEYS)
if open and redis.call('EXISTS', open) == 0 then return {{}} end
local now = clock()
local count = (#ARGV - 1) / 4
local last = sequence_numbers(sequence, count, now)
local taken, look = {{}}, false
for i = 1, count do
  local place = ARGV[4 * i - 1] * {RANKS} + last - count + i
  local id, due, packed = ARGV[4 * i - 2], ARGV[4 * i], ARGV[4 * i + 1]
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
    make_ready(from, held, ready, redis.call('ZRANGEBYSCORE', from, '-inf', now, 'LIMIT', 0, {AT_ONCE}))
    head = redis.call('ZRANGE', from, 0, 0, 'WITHSCORES')
  end
  if head[2] and (not next_change or tonumber(head[2]) < next_change) then next_change = tonumber(head[2]) end
end

for q = 0, #KEYS / 6 - 1 do
  local messages, held, ready, delayed, leased, bell = unpack(KEYS, 6 * q + 1, 6 * q + 6)
  redis.call('DEL', bell)
  promote(delayed, held, ready)
  promote(leased, held, ready)
  local popped = room > 0 and redis.call('ZPOPMIN', ready, room) or {{}}
  if #popped > 0 then
    local ids, changed, leases, attempts = {{}}, {{}}, {{}}, {{}}
    for i = 1, #popped, 2 do ids[#ids + 1] = popped[i] end
    local packed = redis.call('HMGET', messages, unpack(ids))
    local entries = redis.call('HMGET', held, unpack(ids))
    for i = 1, #ids do
      attempts[i] = (entries[i] and attempts_and_place(entries[i]) or 0) + 1
      -- Without its message (a server that evicts keys) there is nothing to hand out.
      if packed[i] then
        changed[#changed + 1] = ids[i]
        changed[#changed + 1] = entry(attempts[i], popped[2 * i], token) .. PADDING
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
    repeatable=False,
)

SETTLE = _script(
    _STILL_HELD,
    """
-- KEYS: messages held leased. ARGV: tags. Returns the positions (from 0) of those that are lost.
local messages, held, leased = unpack(KEYS)
local ids, _, lost = still_held(held, 1)
if #ids > 0 then
  redis.call('ZREM', leased, unpack(ids))
  redis.call('HDEL', held, unpack(ids))
  redis.call('HDEL', messages, unpack(ids))
end
return lost
""",
)

HAND_OVER = _script(
    _CLOCK,
    _RING,
    _ENTRIES,
    _STORE,
    f"""
-- KEYS: for each queue that is concerned: messages held ready delayed leased bell sequence open.
-- ARGV: how long a reply queue's keys live on (ms), then for each ending its queue's position (from 0), its tag, how
-- many messages follow, and for each of these its queue's position, whether that is a reply queue ('1' or '0'), its id,
-- 9 - priority, when it is due (ms; '' for now), packed.
-- Returns the positions (from 0) of the endings that are lost; nothing follows on those.
local now = clock()
local at, number, lost = 2, 0, {{}}

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
    lost[#lost + 1] = number
  end
  number = number + 1
end
return lost
""",
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
redis.call('ZREM', leased, unpack(ids))
local due = clock() + delay
for i = 1, #ids do
  local attempts, place = attempts_and_place(entries[i])
  redis.call('HSET', held, ids[i], entry(math.max(0, attempts - less), place, NO_TOKEN))
  if delay > 0 then redis.call('ZADD', delayed, due, ids[i]) else redis.call('ZADD', ready, place, ids[i]) end
end
ring(bell)
""",
)

RECLAIM = _script(
    _RING,
    _ENTRIES,
    f"""
-- KEYS: held ready leased bell. ARGV: what the tokens begin with, how many attempts are taken back of each (0 or 1),
-- where the last call ended ('0' at first). Looks at some {AT_ONCE} leases, and makes ready those with such a token.
-- Returns where this call ended: '0' when it has seen all.
local held, ready, leased, bell = unpack(KEYS)
local owner, less = ARGV[1], tonumber(ARGV[2])
redis.call('HDEL', held, '')
local page = redis.call('ZSCAN', leased, ARGV[3], 'COUNT', {AT_ONCE})
local ids = {{}}
for i = 1, #page[2], 2 do ids[#ids + 1] = page[2][i] end
local found = false
if #ids > 0 then
  local entries = redis.call('HMGET', held, unpack(ids))
  for i = 1, #ids do
    if entries[i] and string.sub(entries[i], 13, 12 + #owner) == owner then
      local attempts, place = attempts_and_place(entries[i])
      redis.call('ZREM', leased, ids[i])
      redis.call('HSET', held, ids[i], entry(math.max(0, attempts - less), place, NO_TOKEN))
      redis.call('ZADD', ready, place, ids[i])
      found = true
    end
  end
end
if found then ring(bell) end
return page[1]
""",
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
      set, at, id, redis.call('HGET', messages, id), found and attempts_and_place(found) or 0,
      set > 1 and tonumber(at) <= now and 1 or 0,
    }}
    room = room - 1
  end
  set, score = set + 1, ''
end
return answer
""",
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
)

RING = _script(
    _RING,
    """
-- KEYS: ready bell. Rings if something is ready: whoever was rung before has not looked.
if redis.call('EXISTS', KEYS[1]) == 1 then ring(KEYS[2]) end
""",
)

KEEP = _script(
    """
-- KEYS: messages held ready delayed leased bell sequence open, of a reply queue. ARGV: how many ms it lives on.
for i = 1, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[1]) end
redis.call('SET', KEYS[#KEYS], '', 'PX', ARGV[1])
""",
)

BROADCAST = _script(
    """
-- KEYS: events. ARGV: about how many events are kept, for how long after the last one (ms), then payloads.
for i = 3, #ARGV do redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', '', ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
""",
    repeatable=False,
)
