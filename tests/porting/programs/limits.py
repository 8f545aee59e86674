"""What ends a task from outside, or holds it back: time limits, revoking, rate limits."""

import threading
import time

from ekiden import Ekiden as Celery
from ekiden.exceptions import SoftTimeLimitExceeded

app = Celery("limits", broker="memory://limits", backend="memory://limits")

started = threading.Event()


@app.task(soft_time_limit=0.2)
def tidy_up_when_late():
    try:
        while True:
            time.sleep(0.01)
    except SoftTimeLimitExceeded:
        return "tidied up"


@app.task(time_limit=0.5)
def never_ends():
    while True:
        time.sleep(0.01)


@app.task
def wait_for_ever():
    started.set()
    while True:
        time.sleep(0.01)


@app.task(rate_limit="5/s")
def politely():
    return time.time()


@app.task
def quick():
    return "done"
