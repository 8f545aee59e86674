"""Ways to call a task: links, delays, expiry, queues, priorities, headers."""

import threading
from datetime import UTC, datetime

from ekiden import Ekiden as Celery

app = Celery("calling", broker="memory://calling", backend="memory://calling")

seen = []
"""What the tasks below have noted, in this process."""

opened = threading.Event()
"""``hold`` runs until this is set."""


@app.task
def add(x, y):
    return x + y


@app.task
def fail(text):
    raise ValueError(text)


@app.task
def note(value):
    seen.append(value)
    return value


@app.task
def note_failed(task_id):
    result = app.AsyncResult(task_id)
    seen.append((task_id, result.state, str(result.result)))


@app.task(bind=True)
def started_at(self):
    return {"now": datetime.now(UTC).timestamp(), "eta": self.request.eta}


@app.task(bind=True)
def where(self):
    return {
        **self.request.delivery_info,
        "headers": dict(self.request.headers),
        "soft_time_limit": self.request.timelimit[1],
    }


@app.task
def hold():
    opened.wait(20)


@app.task
def fan_out(count):
    return [add.delay(number, number).id for number in range(count)]
