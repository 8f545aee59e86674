"""Every table and every SQL statement of the SQLite transport and backend, in their own words.

    message      every message that a queue holds; see the states below
    reply_queue  the ``reply.*`` queues that exist, and until when if their consumer does not return
    event        what was broadcast lately; numbers only rise, also after the newest was deleted
    result       the latest stored result of a task; a changed one gets a new number, so that ``number > ?`` finds
                 everything that changed since
    start        the latest try of a task that has begun, and the message it began out of
    joining      how many members of a join have arrived      arrival   each of them and what it brought
    record       small values under a key

A message is in one of these states, and in the index of that state:

    0 ready      by priority, then age       claim, holder and until are NULL
    1 delayed    by ``until``: when it is due
    2 leased     by ``until``: when the lease ends; ``claim`` is the number of this hand-out, ``holder`` the consumer
    3 set aside  in none: it could not be read; its ``seq`` is negative

``due`` is the time the publisher asked for and never changes. ``seq`` is the age. Times are seconds of the wall
clock. ``ends`` is when a stored thing vanishes; what has ended is treated as absent and deleted a little later.
Lists are passed as JSON: one statement carries a whole batch.
"""

from __future__ import annotations

APPLICATION_ID = 0x656B646E
"""Says in the file's header that the file is ours ("ekdn")."""

FORMAT_VERSION = 1

READY, DELAYED, LEASED, ASIDE = 0, 1, 2, 3

TABLES = (
    """
    CREATE TABLE message (
        seq INTEGER PRIMARY KEY, queue TEXT NOT NULL, id TEXT NOT NULL, priority INTEGER NOT NULL,
        state INTEGER NOT NULL, until REAL, claim INTEGER, holder TEXT, attempt INTEGER NOT NULL DEFAULT 0,
        due REAL, headers TEXT, body BLOB NOT NULL)
    """,
    "CREATE UNIQUE INDEX message_held ON message (queue, id)",
    "CREATE INDEX message_ready ON message (queue, priority DESC) WHERE state = 0",
    "CREATE INDEX message_delayed ON message (queue, until) WHERE state = 1",
    "CREATE INDEX message_leased ON message (queue, until) WHERE state = 2",
    "CREATE TABLE reply_queue (name TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID",
    """
    CREATE TABLE event (
        number INTEGER PRIMARY KEY AUTOINCREMENT, topic TEXT NOT NULL, at REAL NOT NULL, payload BLOB NOT NULL)
    """,
    "CREATE INDEX event_topic ON event (topic)",
    """
    CREATE TABLE result (
        number INTEGER PRIMARY KEY AUTOINCREMENT, task_id TEXT NOT NULL UNIQUE, state TEXT NOT NULL,
        step INTEGER NOT NULL, ends REAL, expires REAL, body BLOB NOT NULL)
    """,
    "CREATE INDEX result_ends ON result (ends) WHERE ends IS NOT NULL",
    """
    CREATE TABLE start (
        task_id TEXT PRIMARY KEY, step INTEGER NOT NULL, message_id TEXT NOT NULL, ends REAL, expires REAL)
        WITHOUT ROWID
    """,
    "CREATE INDEX start_ends ON start (ends) WHERE ends IS NOT NULL",
    "CREATE TABLE joining (join_id TEXT PRIMARY KEY, arrived INTEGER NOT NULL, ends REAL) WITHOUT ROWID",
    "CREATE INDEX joining_ends ON joining (ends) WHERE ends IS NOT NULL",
    """
    CREATE TABLE arrival (
        join_id TEXT NOT NULL, member TEXT NOT NULL, outcome BLOB NOT NULL, PRIMARY KEY (join_id, member))
        WITHOUT ROWID
    """,
    """
    CREATE TABLE record (key TEXT PRIMARY KEY, version INTEGER NOT NULL, ends REAL, value BLOB NOT NULL)
        WITHOUT ROWID
    """,
    "CREATE INDEX record_ends ON record (ends) WHERE ends IS NOT NULL",
)

WHOSE = """
    SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master)
    FROM pragma_application_id, pragma_user_version
"""
"""What the file says of itself: the program, the format, and how many tables and indexes there are."""

# Publishing.

_INSERT_MESSAGE = "INSERT OR IGNORE INTO message (queue, id, priority, state, until, due, headers, body) VALUES "
_MESSAGE_VALUES = "(?, ?, ?, ?, ?, ?, ?, ?)"
INSERT_MESSAGES = {size: _INSERT_MESSAGE + ", ".join([_MESSAGE_VALUES] * size) for size in (100, 25, 5, 1)}
"""By how many messages one statement stores. One with many rows costs half of as many with one."""

REPLY_QUEUES_THAT_EXIST = """
    SELECT name FROM reply_queue WHERE name IN (SELECT value FROM json_each(?)) AND until > ?
"""

# Receiving.

LOOK = """
    SELECT value,
        EXISTS (SELECT 1 FROM message WHERE state = 0 AND queue = value),
        (SELECT until FROM message WHERE state = 1 AND queue = value AND until < 9e999 ORDER BY until LIMIT 1),
        (SELECT until FROM message WHERE state = 2 AND queue = value AND until < 9e999 ORDER BY until LIMIT 1)
    FROM json_each(?)
"""
"""For each queue: whether anything is ready, when the next delayed one is due, when the next lease ends.

9e999 is infinity. Below it are numbers alone, and neither NULL nor texts, which another program may have written.
"""

MAKE_DUE_READY = """
    UPDATE message SET state = 0, until = NULL WHERE seq IN (
        SELECT seq FROM message WHERE state = 1 AND queue = ? AND until <= ? ORDER BY until LIMIT ?)
"""
TAKE_BACK_ENDED_LEASES = """
    UPDATE message SET state = 0, until = NULL, claim = NULL, holder = NULL WHERE seq IN (
        SELECT seq FROM message WHERE state = 2 AND queue = ? AND until <= ? ORDER BY until LIMIT ?)
"""
FIRST_READY = """
    SELECT id, body, headers, priority, due, seq, attempt + 1 FROM message
    WHERE state = 0 AND queue = ? ORDER BY priority DESC, seq LIMIT ?
"""
CLAIM = """
    UPDATE message SET state = 2, until = ?, claim = ?, holder = ?, attempt = attempt + 1
    WHERE seq IN (SELECT value FROM json_each(?))
"""
# RETURNING instead of the two above costs half as much again.

# Ending. A message is held when its claim is the one in the delivery's tag.

STILL_HELD = "SELECT seq FROM message WHERE seq IN (SELECT value FROM json_each(?)) AND claim = ?"
SETTLE = "DELETE FROM message WHERE seq IN (SELECT value FROM json_each(?)) AND claim = ?"
EXTEND = "UPDATE message SET until = ? WHERE seq IN (SELECT value FROM json_each(?)) AND claim = ?"
RELEASE = """
    UPDATE message SET state = ?, until = ?, claim = NULL, holder = NULL, attempt = attempt - ?
    WHERE seq IN (SELECT value FROM json_each(?)) AND claim = ?
"""
GIVE_BACK = """
    UPDATE message SET state = 0, until = NULL, claim = NULL, holder = NULL
    WHERE seq IN (SELECT value FROM json_each(?)) AND claim = ?
"""
GIVE_BACK_ALL_OF = """
    UPDATE message SET state = 0, until = NULL, claim = NULL, holder = NULL WHERE state = 2 AND holder = ?
"""

# What cannot be read: it is set aside, below zero, where nobody else looks. The log says which.

SET_ASIDE = """
    UPDATE message SET state = 3, until = NULL, claim = NULL, holder = NULL,
        seq = min(0, (SELECT min(seq) FROM message)) - 1
    WHERE seq = ?
"""
WITHOUT_TIME = """
    SELECT seq, id FROM message WHERE state = 1 AND queue = ?1 AND (until IS NULL OR until >= 9e999)
    UNION ALL
    SELECT seq, id FROM message WHERE state = 2 AND queue = ?1 AND (until IS NULL OR until >= '')
"""
"""Never due, or held for ever: no number says until when. Texts and blobs are greater than every number."""

COUNT_SET_ASIDE = "SELECT queue, count(*) FROM message WHERE seq < 0 AND state = 3 GROUP BY queue"

# Temporary queues.

KEEP_REPLY_QUEUE = """
    INSERT INTO reply_queue (name, until) SELECT value, ?2 FROM json_each(?1) WHERE true
    ON CONFLICT (name) DO UPDATE SET until = max(until, excluded.until)
"""
END_REPLY_QUEUE = "UPDATE reply_queue SET until = ?2 WHERE name IN (SELECT value FROM json_each(?1))"
ENDED_REPLY_QUEUES = "SELECT name FROM reply_queue WHERE until <= ?"
DELETE_QUEUE = "DELETE FROM message WHERE queue = CAST(? AS TEXT)"  # its bytes, where it is not UTF-8
DELETE_REPLY_QUEUE = "DELETE FROM reply_queue WHERE name = CAST(? AS TEXT) AND until <= ?"

# Looking.

BROWSE = """
    SELECT id, body, headers, priority, due, seq, attempt, state, until FROM message WHERE seq IN (
        SELECT seq FROM message WHERE queue = ? AND +seq > ? ORDER BY +seq LIMIT ?) ORDER BY seq
"""
"""The inner part reads the index of the queue alone; the plus signs keep it from walking through all other queues."""

DEPTH = """
    SELECT
        (SELECT count(*) FROM message WHERE state = 0 AND queue = ?1)
            + (SELECT count(*) FROM message WHERE state = 1 AND queue = ?1 AND until <= ?2)
            + (SELECT count(*) FROM message WHERE state = 2 AND queue = ?1 AND until <= ?2),
        (SELECT count(*) FROM message WHERE state = 1 AND queue = ?1 AND until > ?2),
        (SELECT count(*) FROM message WHERE state = 2 AND queue = ?1 AND until > ?2)
"""
_PURGE = "DELETE FROM message WHERE seq IN (SELECT seq FROM message WHERE queue = ?1 AND {} LIMIT ?3)"
PURGE = (
    _PURGE.format("state = 0"),
    _PURGE.format("state = 1"),
    _PURGE.format("state = 2 AND until <= ?2"),
    _PURGE.format("state = 3"),
)

# Broadcasting.

BROADCAST = "INSERT INTO event (topic, at, payload) VALUES (?, ?, ?)"
NEWEST_EVENT = "SELECT seq FROM sqlite_sequence WHERE name = 'event'"
NEWEST_EVENT_BEFORE = "SELECT coalesce(max(number), 0) FROM event WHERE at < ?"
HEAR = "SELECT number, payload FROM event WHERE topic = ? AND number > ? ORDER BY number LIMIT ?"
TRIM_EVENTS = """
    DELETE FROM event WHERE number IN (SELECT number FROM event ORDER BY number LIMIT 1000)
        AND (at < ? OR number <= (SELECT seq FROM sqlite_sequence WHERE name = 'event') - ?)
"""

# Results.

STORED_STATES = """
    SELECT task_id, state, step, ends IS NULL OR ends > ?2 FROM result
    WHERE task_id IN (SELECT value FROM json_each(?1))
"""
DELETE_RESULTS = "DELETE FROM result WHERE task_id IN (SELECT value FROM json_each(?))"
_INSERT_RESULT = "INSERT INTO result (task_id, state, step, ends, expires, body) VALUES "
INSERT_RESULTS = {size: _INSERT_RESULT + ", ".join(["(?, ?, ?, ?, ?, ?)"] * size) for size in (100, 25, 5, 1)}
STORED_RESULTS = """
    SELECT task_id, state, step, body, expires FROM result
    WHERE task_id IN (SELECT value FROM json_each(?)) AND (ends IS NULL OR ends > ?)
"""
NEWEST_RESULT = "SELECT seq FROM sqlite_sequence WHERE name = 'result'"
CHANGED_RESULTS = "SELECT number, task_id FROM result WHERE number > ? ORDER BY number"
STARTS = """
    SELECT task_id, step, message_id, expires FROM start
    WHERE task_id IN (SELECT value FROM json_each(?)) AND (ends IS NULL OR ends > ?)
"""
_INSERT_START = "INSERT OR REPLACE INTO start (task_id, step, message_id, ends, expires) VALUES "
INSERT_STARTS = {size: _INSERT_START + ", ".join(["(?, ?, ?, ?, ?)"] * size) for size in (100, 25, 5, 1)}
DELETE_STARTS = "DELETE FROM start WHERE task_id IN (SELECT value FROM json_each(?))"

# Joins.

ENDED_JOIN = "SELECT 1 FROM joining WHERE join_id = ? AND ends <= ?"
DELETE_JOIN = (
    "DELETE FROM joining WHERE join_id = CAST(? AS TEXT)",
    "DELETE FROM arrival WHERE join_id = CAST(? AS TEXT)",
)
"""Its id, or its bytes where another program has written a text that is not UTF-8."""
ARRIVE = "INSERT OR IGNORE INTO arrival (join_id, member, outcome) VALUES (?, ?, ?)"
COUNT_ARRIVAL = """
    INSERT INTO joining (join_id, arrived, ends) VALUES (?, ?, ?)
    ON CONFLICT (join_id) DO UPDATE SET arrived = arrived + excluded.arrived, ends = excluded.ends
    RETURNING arrived
"""
ARRIVED = "SELECT member, outcome FROM arrival WHERE join_id = ?"

# Records.

READ_RECORDS = """
    SELECT key, value, version FROM record
    WHERE key IN (SELECT value FROM json_each(?)) AND (ends IS NULL OR ends > ?)
"""
WRITE_RECORD = "INSERT OR REPLACE INTO record (key, version, ends, value) VALUES (?, ?, ?, ?)"
DELETE_RECORD = "DELETE FROM record WHERE key = ?"
SCAN_RECORDS = """
    SELECT key, value, version FROM record
    WHERE key >= ? AND (?2 IS NULL OR key < ?2) AND (ends IS NULL OR ends > ?3) ORDER BY key
"""

# Tidying: some of what has ended, by table.

DELETE_ENDED = (
    "DELETE FROM result WHERE number IN (SELECT number FROM result WHERE ends <= ? ORDER BY ends LIMIT ?)",
    "DELETE FROM start WHERE task_id IN (SELECT task_id FROM start WHERE ends <= ? ORDER BY ends LIMIT ?)",
    "DELETE FROM record WHERE key IN (SELECT key FROM record WHERE ends <= ? ORDER BY ends LIMIT ?)",
)
ENDED_JOINS = "SELECT join_id FROM joining WHERE ends <= ? ORDER BY ends LIMIT ?"
