"""The app that ``explain`` sends a call through: tasks that do nothing, on a broker of this process's own.

It is a module, so that a body process can import it as it would import the user's.
"""

from __future__ import annotations

from ekiden.app import Ekiden

STORE = "memory://ekiden-probe"
app = Ekiden("probe", broker="memory://ekiden-probe", backend=STORE)


@app.task
def nothing() -> None:
    """Stands where a ``def`` task's body would be."""


@app.task
async def nothing_async() -> None:
    """Stands where an ``async def`` task's body would be."""
