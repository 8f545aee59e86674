"""A worker that is killed, once, between storing a result and settling its message."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from ekiden import Ekiden
from ekiden.results import Backend, StoredResult
from ekiden.states import is_final
from ledger import LEDGER, note


class App(Ekiden):
    """Its backend stores, and then kills its process; the next process has one that does not."""

    def opened_backend(self) -> Backend:
        backend = super().opened_backend()
        if "put" not in vars(backend):
            store = backend.put

            def put(results: Sequence[StoredResult]) -> list[bool]:
                answers = store(results)
                if any(is_final(result.state) or result.state == "RETRY" for result in results) and first_time():
                    os.kill(os.getpid(), signal.SIGKILL)
                return answers

            backend.put = put
        return backend


def first_time() -> bool:
    """Whether nobody has asked before."""
    try:
        os.close(os.open(os.environ[LEDGER] + ".died", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


app = App("dies after storing")


@app.task(name="first")
def first() -> str:
    """The task whose worker is killed after its result was stored."""
    note("first")
    return "first"


@app.task(name="fails", autoretry_for=(ValueError,), default_retry_delay=0.0, bind=True)
def fails(self) -> str:
    """Fails in its first try."""
    note("fails", retries=self.request.retries)
    if self.request.retries == 0:
        raise ValueError("the first try fails")
    return "second try"


@app.task(name="after")
def after(value: str) -> None:
    """What follows."""
    note("after", value=value)
