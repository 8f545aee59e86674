"""Tasks that leave in their worker process what keeps an interpreter from ending, and one that ends the worker."""

from __future__ import annotations

import atexit
import multiprocessing
import threading
import time

from tasks import app


@app.task(name="leave")
def leave(what: str) -> list[int]:
    """Leave it; the numbers of the processes that were started."""
    everything = what == "everything"
    if what == "a thread" or everything:
        threading.Thread(target=threading.Event().wait).start()
    if what == "an exit handler" or everything:
        atexit.register(time.sleep, 600)
    if what == "a child" or everything:
        # Not a daemon: at its exit the interpreter waits for it.
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
        return [child.pid or 0]
    return []


@app.task(name="fail_the_worker", ignore_result=True)
def fail_the_worker() -> None:
    """End what the worker cannot do without: it ends on that error."""
    app.transport.close()
