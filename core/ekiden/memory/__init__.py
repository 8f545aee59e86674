"""The broker and the result store in this process's memory: the reference for every other transport and backend.

``memory://`` and ``memory://NAME`` each mean one broker and one result store per process and name, shared by all
who open that URL, in any thread. They live until the process ends; nothing of them is seen by another process, and a
forked child begins with empty ones.

A message is in exactly one of three places, and always in its queue's ``held`` as well:

    queue.ready[priority]    waiting to be received, oldest first
    queue.delayed            a heap by due time
    consumer.leased          handed out, by tag; the next lease to end comes first

``receive`` moves it from ready to leased, the passing of time from delayed to ready, ``release``, ``close`` and the
end of a lease from leased to ready, and ``settle`` removes it. Nothing watches the clock: whoever looks at a queue
first moves what is due and takes back ended leases, and whoever waits does so until the next of these.

One lock guards a whole broker, another a whole store.

    transport    MemoryTransport, MemoryConsumer, MemoryListener: the contract, method by method
    broker       the queues behind it; its methods expect the broker's lock held
    backend      MemoryBackend: the contract, method by method
    store        what is behind it; its methods expect the store's lock held
    shared       which broker and store a name means in this process
"""

from ekiden.memory.backend import MemoryBackend
from ekiden.memory.options import MemoryOptions
from ekiden.memory.shared import discard
from ekiden.memory.transport import MemoryConsumer, MemoryListener, MemoryTransport

__all__ = ["MemoryBackend", "MemoryConsumer", "MemoryListener", "MemoryOptions", "MemoryTransport", "discard"]
