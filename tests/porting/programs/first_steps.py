"""An app with a broker and a backend, settings assigned and updated, one task."""

from ekiden import Ekiden as Celery

app = Celery("first_steps", broker="memory://first_steps", backend="memory://first_steps")

app.conf.result_expires = 3600
app.conf.update(
    task_track_started=True,
    task_routes={"tests.porting.programs.first_steps.multiply": "slow"},
)


@app.task
def add(x, y):
    return x + y


@app.task
def multiply(x, y):
    return x * y


@app.task
def divide(x, y):
    return x / y
