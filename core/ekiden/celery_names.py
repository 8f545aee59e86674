"""What programs import from Celery and kombu and ekiden has not: a sentence for each that says what to do instead."""

from __future__ import annotations

_SCHEDULES = "ekiden has no schedules yet; a cron job or a systemd timer can send the call: `ekiden call`"
_WORKFLOWS = "ekiden has no workflows yet; link=, link_error= and signatures are there"
_NO_OBJECTS = "queues need no declaration and no connection of yours: name them in task_routes and --queues"
_NO_PARTS = "the worker has no replaceable parts; signals and Task subclasses are there"

MISSING = {
    "celery.beat": _SCHEDULES,
    "celery.bootsteps": _NO_PARTS,
    "celery.concurrency": _NO_PARTS,
    "celery.contrib.abortable": "use revoke(terminate=True), or a soft_time_limit",
    "celery.contrib.pytest": "ekiden's pytest plugin has a worker fixture: see docs/testing.md",
    "celery.contrib.rdb": "use pytest's debugger, with app.worker() in the test's process",
    "celery.contrib.testing": "use app.worker(): a real worker in the test's process, see docs/testing.md",
    "celery.events": "connect to ekiden.signals in the worker",
    "celery.five": "Python 3 has it",
    "celery.loaders": "apps are loaded by name: MODULE:APP",
    "celery.local": "there are no proxies: @app.task returns the task itself",
    "celery.platforms": "a service manager looks after process ids, users and limits",
    "celery.utils": "the standard library has it: uuid.uuid4(), functools, time",
    "celery.worker": _NO_PARTS,
    "celery:abstract": "the types are ekiden.Task, ekiden.Signature and ekiden.AsyncResult",
    "celery:Proxy": "there are no proxies: @app.task returns the task itself",
    "celery:app_or_default": "there is no current app: import yours",
    "celery:bugreport": "say `ekiden doctor`",
    "celery:chain": _WORKFLOWS,
    "celery:chord": _WORKFLOWS,
    "celery:chunks": "use enqueue_many()",
    "celery:crontab": _SCHEDULES,
    "celery:current_app": "there is no current app: import yours; in a bound task it is self.app",
    "celery:current_task": "declare the task with bind=True; it is self, and the call is self.request",
    "celery:group": _WORKFLOWS,
    "celery:maybe_signature": "a signature is a signature already",
    "celery:periodic_task": _SCHEDULES,
    "celery:schedule": _SCHEDULES,
    "celery:set_default_app": "there is no default app: a shared task goes through the app that includes it",
    "celery:signature": "a task makes its own: task.s(...), or app.signature(NAME)",
    "celery:solar": _SCHEDULES,
    "celery:starmap": _WORKFLOWS,
    "celery:subtask": "task.s(...) makes a signature",
    "celery:task": "use @app.task, or @shared_task",
    "celery:uuid": "use str(uuid.uuid4()), or leave the id out",
    "celery:xmap": _WORKFLOWS,
    "celery:xstarmap": _WORKFLOWS,
    "django_celery_beat": _SCHEDULES,
    "django_celery_results": "results are kept at the broker, where it stores them; take it out of INSTALLED_APPS",
    "kombu": _NO_OBJECTS,
}
"""By module, or by ``celery:NAME`` for a name of any module of Celery's: what to do instead."""
