"""The names of everything that the result store keeps in Redis.

    {PREFIX:result:ID}         string   what ``stored_results`` makes of a StoredResult     vanishes when it expires
    {PREFIX:result:ID}/begun   string   "STEP MESSAGE-ID": the fence's note                 vanishes when it expires
    {PREFIX:join:ID}           hash     member -> its outcome                               vanishes when it expires
    {PREFIX:record}=KEY        string   "VERSION VALUE": a record                           vanishes when it expires
    {PREFIX:record}/keys       zset     the KEYs of all records with score 0, to find them by how they begin
    {PREFIX:record}/ends       zset     the KEYs of those that expire -> the millisecond in which they do

    {PREFIX:result:ID}/told/DB channel  a final result, in the moment in which it is stored, as it is stored;
                                        empty where it is too long for that: who is told looks for it

The part in braces is what a cluster looks at to place a key: what is of one task is on one server, and so are all
records. A channel is a whole server's, not a database's, so its name says which.
``backend_scripts`` says who writes what.
"""

from __future__ import annotations

from ekiden_redis.keys import prefix_in_keys


class StoreKeys:
    """The keys and channels of the store with this ``prefix``, in this ``database``."""

    def __init__(self, prefix: str, database: int) -> None:
        prefix = prefix_in_keys(prefix)
        self._result = f"{{{prefix}:result:".encode()
        self._join = f"{{{prefix}:join:".encode()
        self._record = f"{{{prefix}:record}}".encode()
        self.channel_end = f"/told/{database}".encode()
        self.record_keys = self._record + b"/keys"
        self.record_ends = self._record + b"/ends"

    def result(self, task_id: str) -> bytes:
        """Where a task's result is."""
        return b"%b%b}" % (self._result, task_id.encode())

    def note(self, task_id: str) -> bytes:
        """Where the fence notes that a task has begun."""
        return b"%b%b}/begun" % (self._result, task_id.encode())

    def channel(self, task_id: str) -> bytes:
        """Where a task's final result is told."""
        return b"%b%b}%b" % (self._result, task_id.encode(), self.channel_end)

    def told_of(self, channel: bytes) -> str:
        """The task whose result is told on ``channel``."""
        return channel[len(self._result) : -len(self.channel_end) - 1].decode()

    def join(self, join_id: str) -> bytes:
        """Where the members of a join arrive."""
        return b"%b%b}" % (self._join, join_id.encode())

    def record(self, key: str) -> bytes:
        """Where a record is."""
        return b"%b=%b" % (self._record, key.encode())
