"""What the modules and names that programs import from Celery and kombu are here.

Whether a name exists is asked of ekiden itself, so what is added there is known here at once. ``MISSING`` has a
sentence for what is not.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import msgspec

MODULES = {
    "celery": "ekiden",
    "celery.app": "ekiden",
    "celery.app.base": "ekiden",
    "celery.app.control": "ekiden",
    "celery.app.task": "ekiden",
    "celery.canvas": "ekiden",
    "celery.exceptions": "ekiden.exceptions",
    "celery.result": "ekiden.result",
    "celery.schedules": "ekiden.schedules",
    "celery.signals": "ekiden.signals",
    "celery.states": "ekiden.states",
    "celery.utils.log": "ekiden.logs",
}
"""By Celery's module: the one here that has the same names."""

RENAMED = {"Celery": "Ekiden"}
"""Names that differ; all others are Celery's."""

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
    "celery:app_or_default": "there is no current app: import yours",
    "celery:bugreport": "say `ekiden doctor`",
    "celery:chain": _WORKFLOWS,
    "celery:chord": _WORKFLOWS,
    "celery:chunks": "use enqueue_many()",
    "celery:crontab": _SCHEDULES,
    "celery:current_app": "there is no current app: import yours; in a bound task it is self.app",
    "celery:current_task": "declare the task with bind=True; it is self, and the call is self.request",
    "celery:get_task_logger": "logging.getLogger(__name__): records in a body carry the task's id and name anyway",
    "celery:group": _WORKFLOWS,
    "celery:maybe_signature": "a signature is a signature already",
    "celery:periodic_task": _SCHEDULES,
    "celery:register_task": "declare a function with @app.task(base=...)",
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


class Moved(msgspec.Struct, frozen=True):
    """A name of Celery's, and where it is here."""

    module: str
    name: str


def moved(module: str, name: str) -> Moved | None:
    """Where ``from module import name`` finds it here; None where it is missing."""
    here = MODULES.get(module)
    ours = RENAMED.get(name, name)
    if here is None or not _has(here, ours):
        is_submodule = MODULES.get(f"{module}.{name}") == f"ekiden.{name}" and _is_there(f"ekiden.{name}")
        return Moved("ekiden", name) if is_submodule else None
    return Moved(here, ours)


def instead_of(module: str, name: str) -> str:
    """What to do about a name, or a whole module (``*``), that is missing here."""
    if f"celery:{name}" in MISSING:
        return MISSING[f"celery:{name}"]
    parts = module.split(".")
    found = (MISSING.get(".".join(parts[:length])) for length in range(len(parts), 0, -1))
    return next((sentence for sentence in found if sentence), "ekiden has nothing of that name")


def _has(module: str, name: str) -> bool:
    if not _is_there(module):
        return False
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:  # a name that only says what to use instead
        return False
    return found is not None and not isinstance(found, ModuleType)


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
