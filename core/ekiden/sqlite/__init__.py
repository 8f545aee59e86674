"""A broker and a result store in one SQLite file, for all processes of one machine.

    statements   every table and every SQL statement, with a legend: begin here
    database     the file: two connections, transactions, locks between processes, checkpoints, forks
    bell         how who waits learns that another process has committed something
    transport    messages: publish, claim, settle; topics
    backend      results, the fence, joins, records
    waits        who waits for results, and the thread that tells them
    location     URLs and options

Nothing runs in the background, save one thread per backend from the first ``wait`` on.
"""

from ekiden.sqlite.backend import SQLiteBackend
from ekiden.sqlite.transport import SQLiteTransport

__all__ = ["SQLiteBackend", "SQLiteTransport"]
