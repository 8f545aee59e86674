"""An app whose results come as replies; broker and backend are in its environment. Its tasks are called by name."""

import os
import time

from ekiden import Ekiden

app = Ekiden("replies")


@app.task(name="add")
def add(x: int, y: int) -> int:
    return x + y


@app.task(name="add_inside", pool="process")
def add_inside(x: int, y: int) -> int:
    """Waits, in a process that has no connection, for another task."""
    return add.delay(x, y).get(20, allow_join=True)


@app.task(name="told", bind=True, pool="process")
def told(self, text: str) -> str:  # type: ignore[no-untyped-def]  # self is what bind=True gives
    self.update_state(state="TOLD", meta=text)
    return text


@app.task(name="die_once", bind=True)
def die_once(self, path: str) -> int:  # type: ignore[no-untyped-def]
    """Kills its worker the first time."""
    if not os.path.exists(path):
        with open(path, "w", encoding="ascii"):
            os._exit(1)
    return int(self.request.delivery_info["redelivered"])


@app.task(name="sleep")
def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


if __name__ == "__main__":
    # A caller that goes before the answer comes.
    with app:
        print(add.delay(1, 2).id)
